"""The five families against transformers and torch themselves, both ways.

The first import of transformers takes some seconds.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.huggingface import config_from_huggingface, load_params, save_params
from jaxlib_methods.models.partitioning import make_mesh, param_shardings
from jaxlib_methods.models.transformer import Transformer, init_params

# Warnings of torch and transformers about themselves are not ours to mend.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

HERE = Path(__file__).parent
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_module(HERE / "golden" / "make.py")
base = load_module(HERE / "test_huggingface.py")


@pytest.fixture(scope="module")
def transformers() -> Any:
    """transformers, quiet; a skip with the reason where the extra is not installed."""
    pytest.importorskip("torch", reason="extra `oracle` is not installed (torch)")
    transformers = pytest.importorskip(
        "transformers", reason="extra `oracle` is not installed (transformers)"
    )
    transformers.utils.logging.set_verbosity_error()
    return transformers


@pytest.fixture(scope="module", params=make.VARIANTS)
def checkpoint(
    request: pytest.FixtureRequest, transformers: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray]]:
    """A random model's folder, and what torch computes with it."""
    model = make.make_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, make.run(model)


def config_of(folder: Path) -> TransformerConfig:
    config_json = json.loads((folder / "config.json").read_text())
    return config_from_huggingface(config_json, compute_dtype="float32")


def logits_of(folder: Path, transformers: Any) -> np.ndarray:
    return make.run(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())["logits"]


def test_ours_computes_what_torch_computes(
    checkpoint: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, expected = checkpoint
    cfg = config_of(folder)
    params = load_params(folder, cfg)
    apply = jax.jit(Transformer(cfg).apply, static_argnames="hidden_layer")
    assert np.abs(expected["logits"]).max() > 0.5
    # The last state that transformers gives is the one after the final norm.
    for layer, index in ((0, 0), (1, 1), ("final", cfg.num_layers)):
        out = apply({"params": params}, make.make_tokens(), hidden_layer=layer)
        np.testing.assert_allclose(out.hidden, expected["hidden"][index], **TOLERANCE)
        np.testing.assert_allclose(out.logits[..., :37], expected["logits"], **TOLERANCE)


def test_sharded_parameters_compute_the_same(
    checkpoint: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, expected = checkpoint
    cfg = config_of(folder)
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    boxed = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    params = load_params(folder, cfg, shardings=param_shardings(boxed, mesh))
    with jax.set_mesh(mesh):
        out = jax.jit(Transformer(cfg).apply)({"params": params}, make.make_tokens())
    np.testing.assert_allclose(out.logits[..., :37], expected["logits"], **TOLERANCE)


def test_torch_computes_the_same_from_our_export(
    checkpoint: tuple[Path, dict[str, np.ndarray]], transformers: Any, tmp_path: Path
) -> None:
    folder, expected = checkpoint
    cfg = config_of(folder)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    params = load_params(folder, cfg)
    save_params(tmp_path / "out", params, cfg, family=model_type, max_shard_bytes=10_000)
    # The same weights in the same program; only the names of the tanh GELU are not all equal.
    np.testing.assert_allclose(
        logits_of(tmp_path / "out", transformers), expected["logits"], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["gpt_neox", "qwen2"])
def test_torch_computes_the_same_from_the_export_of_two_processes(
    name: str, transformers: Any, tmp_path: Path
) -> None:
    model = make.make_model(name)
    model.save_pretrained(tmp_path / "in")
    base.run_workers(tmp_path / "in", tmp_path / "out")
    got = logits_of(tmp_path / "out", transformers)
    np.testing.assert_allclose(got, make.run(model)["logits"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("qwen2", {"qkv_bias": True, "head_dim": 6}),
        ("qwen3", {"qk_norm": True, "head_dim": 6}),
        ("gpt_neox", base.LAYER_NORM | {"mlp": "gelu_tanh"}),
        ("opt", base.VARIANTS["opt_untied"] | {"tie_embeddings": True}),
    ],
)
def test_a_model_of_ours_runs_in_torch(
    family: str, overrides: dict[str, Any], transformers: Any, tmp_path: Path
) -> None:
    """Parameters that never were Hugging Face's; the family is chosen from the configuration."""
    cfg = base.dataclasses.replace(base.TINY, compute_dtype="float32", **overrides)
    params = jax.tree.map(lambda leaf: 0.3 * leaf, base.random_params(cfg))
    save_params(tmp_path / "out", params, cfg)
    got = logits_of(tmp_path / "out", transformers)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    out = jax.jit(Transformer(cfg).apply)({"params": params}, make.make_tokens())
    np.testing.assert_allclose(got, out.logits[..., :37], **TOLERANCE)


def test_golden_files_are_what_torch_computes(transformers: Any) -> None:
    from safetensors.numpy import load_file

    for name in make.GOLDEN:
        expected = load_file(HERE / "golden" / name / "expected.safetensors")
        got = make.run(make.make_model(name))
        for key, array in expected.items():
            np.testing.assert_allclose(got[key], array, rtol=0, atol=1e-5)
