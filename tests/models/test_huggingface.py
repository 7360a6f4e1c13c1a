"""Weights of the Hugging Face families, compared with what torch computed (see golden/make.py)."""

import dataclasses
import itertools
import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlib_methods.models import huggingface
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.huggingface import config_from_huggingface, load_params, save_params
from jaxlib_methods.models.partitioning import make_mesh, param_shardings, unbox
from jaxlib_methods.models.transformer import Transformer, init_params

HERE = Path(__file__).parent
FAMILIES = ["llama", "qwen2", "qwen3", "gpt_neox", "opt"]
TINY = TransformerConfig(
    vocab_size=37, num_layers=3, embed_dim=24, num_heads=6, mlp_dim=22, max_length=64
)
LAYER_NORM = {"norm": "layer_norm", "mlp": "relu", "mlp_bias": True}


def golden(family: str) -> Path:
    return HERE / "golden" / family


def config_of(folder: Path, **overrides: Any) -> TransformerConfig:
    overrides = {"compute_dtype": "float32"} | overrides
    return config_from_huggingface(json.loads((folder / "config.json").read_text()), **overrides)


def tokens() -> np.ndarray:
    """Token ids as golden/make.py draws them, int32 `[2, 11]`."""
    drawn = np.random.default_rng(0).integers(0, 37, (2, 11), np.int32)
    drawn[0, -1] = 36
    return drawn


def random_params(cfg: TransformerConfig) -> Any:
    """Random parameters, biases and norms too, but zero padding of the vocabulary."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = rng.normal(size=leaf.shape)
        if path[0].key == "embedding":
            drawn[cfg.vocab_size :] = 0
        if path[0].key == "head":
            drawn[:, cfg.vocab_size :] = 0
        return jnp.asarray(drawn, leaf.dtype)

    boxed = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, unbox(boxed))


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    flat = jax.tree_util.tree_flatten_with_path(got)[0]
    for (path, a), b in zip(flat, jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), str(path))


def shardings_of(cfg: TransformerConfig) -> Any:
    boxed = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    return param_shardings(boxed, make_mesh(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_hidden_states_are_those_of_torch(family: str) -> None:
    folder = golden(family)
    cfg = config_of(folder)
    params = load_params(folder, cfg)
    expected = load_file(folder / "expected.safetensors")
    apply = jax.jit(Transformer(cfg).apply, static_argnames="hidden_layer")
    assert np.abs(expected["logits"]).max() > 0.5
    # The last state that transformers gives is the one after the final norm.
    for layer, index in ((2, 2), ("final", cfg.num_layers)):
        out = apply({"params": params}, tokens(), hidden_layer=layer)
        np.testing.assert_allclose(out.hidden, expected["hidden"][index], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out.logits[..., :37], expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000], ids=["one_file", "sharded"])
def test_export_repeats_the_checkpoint(family: str, max_shard_bytes: int, tmp_path: Path) -> None:
    cfg = config_of(golden(family))
    params = load_params(golden(family), cfg)
    out = tmp_path / "new" / "folder"
    save_params(out, params, cfg, family=family, max_shard_bytes=max_shard_bytes)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 3) == (out / "model.safetensors.index.json").exists()
    assert (len(files) > 3) == (max_shard_bytes == 10_000)
    written = {name: a for file in files for name, a in load_file(file).items()}
    original = load_file(golden(family) / "model.safetensors")
    assert written.keys() == original.keys()
    for name, array in original.items():
        assert written[name].tobytes() == array.tobytes(), name
    assert config_of(out) == cfg
    assert_same(load_params(out, cfg), params)
    assert [path.name for path in out.parent.iterdir()] == ["folder"]


def test_index_gives_the_total_size_and_each_tensor_once(tmp_path: Path) -> None:
    cfg = config_of(golden("llama"))
    save_params(tmp_path, load_params(golden("llama"), cfg), cfg, max_shard_bytes=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    original = load_file(golden("llama") / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in original.values())
    assert index["weight_map"].keys() == original.keys()
    sizes = []
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(tmp_path / file)
        sizes.append(sum(a.nbytes for a in held.values()))
        assert all(index["weight_map"][name] == file for name in held)
    assert max(sizes) <= 10_000
    assert min(a + b for a, b in itertools.pairwise(sizes)) > 10_000  # none is spare


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_load_equals_unsharded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config_of(golden(family))
    shardings = shardings_of(cfg)
    reads = []
    read = huggingface.Placement.read
    monkeypatch.setattr(
        huggingface.Placement,
        "read",
        lambda self, tensor, index, dtype: (
            reads.append(self.path) or read(self, tensor, index, dtype)
        ),
    )
    sharded = load_params(golden(family), cfg, shardings=shardings)
    # Two replicas, but each part is read once: query is cut in four, a norm is whole.
    assert reads.count("blocks/attention/query/kernel") == 4
    assert reads.count("final_norm/scale") == 1
    assert_same(sharded, load_params(golden(family), cfg))
    placed = jax.tree.map(lambda leaf: leaf.sharding, sharded)
    assert placed == shardings


def test_shardings_of_another_configuration_are_refused() -> None:
    cfg = config_of(golden("llama"))
    with pytest.raises(ValueError, match="shardings must be a tree like the parameters"):
        load_params(golden("llama"), cfg, shardings=shardings_of(TINY))


def run_workers(source: Path, target: Path) -> list[dict[str, Any]]:
    """Loads and exports with two processes of four devices; what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    commands = [
        [sys.executable, HERE / "huggingface_worker.py", str(port), "2", str(rank), source, target]
        for rank in range(2)
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_two_processes_with_half_of_the_parameters_export_all_of_them(tmp_path: Path) -> None:
    results = run_workers(golden("qwen3"), tmp_path / "out")
    for result in results:
        assert 0.45 < result["read"] / result["total"] < 0.55
        assert result["refused"]  # by both, though only the first looks
    assert (tmp_path / "out" / "notes.txt").read_bytes() == b"of all"
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(golden("qwen3") / "model.safetensors")
    assert written.keys() == original.keys()
    for name, array in original.items():
        assert written[name].tobytes() == array.tobytes(), name


VARIANTS = {
    "llama_biased": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "qwen2_tied": {"qkv_bias": True, "tie_embeddings": True, "num_kv_heads": 2},
    "qwen3_biased": {"qk_norm": True, "qkv_bias": True, "output_bias": True, "head_dim": 6},
    "gpt_neox_unbiased": LAYER_NORM | {"rotary_fraction": 0.5, "parallel_residual": True},
    "opt_untied": LAYER_NORM
    | {"positions": "learned", "learned_position_offset": 2, "qkv_bias": True, "output_bias": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_keeps_every_parameter(name: str, tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, **VARIANTS[name])
    params = random_params(cfg)
    save_params(tmp_path, params, cfg)
    model_type = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert name.startswith(model_type)
    assert config_of(tmp_path, compute_dtype="bfloat16") == cfg
    assert_same(load_params(tmp_path, cfg), params)


def test_bfloat16_in_the_file_and_in_memory(tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, param_dtype="bfloat16")
    params = random_params(cfg)
    save_params(tmp_path, params, cfg)
    written = load_file(tmp_path / "model.safetensors")
    assert {array.dtype.name for array in written.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(load_params(tmp_path, cfg), params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert_same(load_params(tmp_path, cfg, dtype=jnp.float32), wide)


def test_vocabulary_is_padded_with_zeros_and_unpadded_on_export(tmp_path: Path) -> None:
    cfg = config_of(golden("qwen2"))
    params = load_params(golden("qwen2"), cfg)
    assert params["embedding"]["table"].shape == (128, 24)
    assert params["head"]["kernel"].shape == (24, 128)
    assert not params["embedding"]["table"][37:].any()
    assert not params["head"]["kernel"][:, 37:].any()
    junk = params | {"embedding": {"table": params["embedding"]["table"].at[37:].set(9.0)}}
    save_params(tmp_path, junk, cfg)
    written = load_file(tmp_path / "model.safetensors")
    original = load_file(golden("qwen2") / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(written[name], original[name])


def rewrite(folder: Path, changes: Mapping[str, np.ndarray | None]) -> Path:
    """A copy of the golden llama whose tensors are replaced, added or (None) left out."""
    tensors = load_file(golden("llama") / "model.safetensors") | dict(changes)
    kept = {name: array for name, array in tensors.items() if array is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def test_one_error_names_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    rewrite(
        tmp_path,
        {
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": np.ones((24, 22), np.float32),
            "model.layers.2.mlp.down_proj.weight": np.ones((24, 22), np.int8),
            "model.layers.3.mlp.up_proj.weight": np.ones((22, 24), np.float32),
        },
    )
    with pytest.raises(ValueError, match="does not hold this model") as error:
        load_params(tmp_path, config_of(golden("llama")))
    assert str(error.value).split(": ", 1)[1].split("; ") == [
        "model.layers.1.mlp.up_proj.weight is [24, 22], wanted [22, 24]",
        "model.layers.2.mlp.down_proj.weight is I8, wanted one of ('F64', 'F32', 'F16', 'BF16')",
        "model.layers.3.mlp.up_proj.weight is not known",
        "model.norm.weight is missing",
    ]


def test_more_layers_than_tensors_are_refused_before_any_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = golden("llama")
    cfg = config_of(folder, num_layers=10**9)
    monkeypatch.setattr(huggingface, "_placements", None)  # a billion names fill the memory
    for read in (load_params, huggingface.check_weights):
        with pytest.raises(ValueError, match="its 29 tensors are too few for 1000000000 layers"):
            read(folder, cfg)


def test_buffers_and_a_tied_head_may_stay_unread(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    buffers = ("self_attn.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
    extra = {f"model.layers.0.{name}": one for name in buffers} | {"lm_head.weight": one}
    cfg = config_of(golden("llama"))
    assert cfg.tie_embeddings
    got = load_params(rewrite(tmp_path, extra), cfg)
    assert_same(got, load_params(golden("llama"), cfg))


def test_a_head_is_not_ignored_where_it_is_not_tied() -> None:
    cfg = config_of(golden("qwen2"), tie_embeddings=True)
    load_params(golden("qwen2"), cfg)
    cfg = config_of(golden("llama"), tie_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        load_params(golden("llama"), cfg)


def test_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has neither model.safetensors nor"):
        load_params(tmp_path, TINY)


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/a.safetensors", "a\\b.safetensors", "a.bin"]
)
def test_index_may_not_lead_out_of_the_folder(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for target in ("a.safetensors", "model/a.bin"):
        save_file({"a": np.ones(1, np.float32)}, tmp_path / target)
    index = {"weight_map": {"a": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"it may name only \.safetensors beside it"):
        load_params(folder, TINY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"\xff\xfe", "is not JSON: 'utf-8' codec"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "has no weight_map from tensor names to files"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": null}', "has no weight_map"),
        (b'{"weight_map": ["a.safetensors"]}', "has no weight_map"),
        (b'{"weight_map": {"a": 1}}', "names 1 for 'a'; it may name only"),
        (b'{"weight_map": {"a": ["x.safetensors"]}}', r"names \['x.safetensors'\] for 'a'"),
        (b'{"weight_map": {"a": "x\\u0000.safetensors"}}', r"names 'x.x00.safetensors' for 'a'"),
    ],
)
def test_an_index_that_is_none_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json {message}"):
        huggingface.weight_files(tmp_path)


def test_index_that_names_an_absent_file(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks b\.safetensors"):
        load_params(tmp_path, TINY)


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{tmp_path} already exists"):
        save_params(tmp_path, random_params(TINY), TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_params(tmp_path / "out", random_params(TINY), TINY)
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_configuration_are_refused(tmp_path: Path) -> None:
    params = random_params(dataclasses.replace(TINY, tie_embeddings=True, mlp_dim=23))
    with pytest.raises(ValueError, match="do not fit") as error:
        save_params(tmp_path / "out", params, TINY)
    assert "blocks/mlp/up/kernel is (3, 24, 23), wanted (3, 24, 22)" in str(error.value)
    assert "head/kernel is missing, wanted (24, 128)" in str(error.value)


def test_extra_config_is_written(tmp_path: Path) -> None:
    save_params(tmp_path, random_params(TINY), TINY, extra_config={"eos_token_id": 5})
    config_json = json.loads((tmp_path / "config.json").read_text())
    assert config_json["eos_token_id"] == 5
    assert config_json["bos_token_id"] is None


def test_without_the_extra_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install jaxlib-methods\[hf\]"):
        load_params(golden("llama"), config_of(golden("llama")))


def test_every_dtype_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    cfg = config_of(golden("llama"))
    original = load_file(golden("llama") / "model.safetensors")
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
        rewrite(tmp_path, {name: array.astype(dtype) for name, array in original.items()})
        table = load_params(tmp_path, cfg)["embedding"]["table"][:37]
        want = original["model.embed_tokens.weight"].astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(table, want)
