"""Every sampler of a recurrent model writes the text of one token after the other."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.infer import generate as generate_module
from jaxlib_methods.infer.generate import generate
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import decoding, partitioning, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.decoding import SamplingConfig, Stream
from jaxlib_methods.train.tokenizer import ByteTokenizer

MODEL = TransformerConfig(
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    mlp_dim=16,
    max_length=64,
    block="sandwich",
    recurrence=6,
    compute_dtype="float32",
)
HOT = SamplingConfig(temperature=0.8, top_k=20)
PROMPTS = ["a fox", "", "over the dog"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 7, "sampling": HOT, "seed": 5}


@pytest.fixture(scope="module")
def restored() -> Restored:
    """Random weights whose core contracts: a state forgets where it began."""
    boxed = jax.eval_shape(lambda: recurrent_depth.init_params(MODEL, jax.random.key(0)))
    draw = np.random.default_rng(1)

    def value(path: Any, leaf: Any) -> np.ndarray:
        if "scale" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return 0.3 * draw.normal(size=leaf.shape).astype(np.float32)

    params = jax.tree.map_with_path(value, partitioning.unbox(boxed))
    params["adapter"]["kernel"][: MODEL.embed_dim] *= 0.05
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    params = jax.device_put(params, partitioning.param_shardings(boxed, mesh))
    return Restored(None, MODEL, params, ByteTokenizer(), None, mesh, 0, (0,))


@pytest.fixture(scope="module")
def expected(restored: Restored) -> Any:
    completions = generate(restored, PROMPTS, **SETTINGS)
    assert len({tuple(c.tokens) for c in completions}) == len(PROMPTS)
    assert all(len(c.tokens) > 3 for c in completions)
    return completions


@pytest.mark.parametrize("sampler", ["continuous", "parallel", "speculative"])
def test_a_sampler_changes_the_work_and_not_the_text(
    restored: Restored, expected: Any, sampler: Any
) -> None:
    model = restored._replace(depth=DepthConfig(sampler=sampler, freeze_tolerance=1e-3))
    assert generate_module._sampler(model.language_model) is not None
    assert generate(model, PROMPTS, **SETTINGS) == expected


def test_a_parallel_text_is_streamed_piece_by_piece(restored: Restored, expected: Any) -> None:
    model = restored._replace(depth=DepthConfig(sampler="parallel", freeze_tolerance=1e-3))
    pieces: list[str] = []
    found = generate(model, PROMPTS, show=pieces.append, **SETTINGS)
    assert found == expected
    assert "".join(pieces) == expected[0].text
    assert len(pieces) > 1


@pytest.mark.parametrize("sampler", ["sequential", "continuous"])
def test_a_text_is_looked_at_once_a_token_while_it_is_shown(
    restored: Restored, monkeypatch: pytest.MonkeyPatch, sampler: Any
) -> None:
    """And not after each iteration. Another seed of the states takes no other program."""
    model = restored._replace(depth=DepthConfig(sampler=sampler, freeze_tolerance=1e-3))
    steps, looks, keys = cast(Any, generate_module._steps), [], []

    def counted(*arguments: Any, **settings: Any) -> Any:
        looks.append(settings["num_tokens"])
        keys.append(settings["key"])
        return steps(*arguments, **settings)

    monkeypatch.setattr(generate_module, "_steps", counted)
    shown = generate(model, PROMPTS, show=lambda _: None, **SETTINGS)
    # The rows are in step.
    assert looks == [1] * max(len(c.tokens) for c in shown)
    assert (jnp.stack(keys) == decoding.stream_key(SETTINGS["seed"], Stream.TOKENS)).all()
    before = steps._cache_size()
    generate(model._replace(seed=7), PROMPTS, show=lambda _: None, **SETTINGS)
    assert steps._cache_size() == before


def test_a_plain_model_has_no_other_sampler(restored: Restored) -> None:
    assert generate_module._sampler(restored.language_model) is None
