"""A small recurrent-depth model whose core contracts, as that of a trained one does."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.depth_sampling import Draws
from jaxlib_methods.models import decoding, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig


class Contraction(NamedTuple):
    """cfg, params: of the model. prompts, lengths: two rows, `[2, 5]` and `[2]`, left-padded."""

    cfg: TransformerConfig
    params: dict
    prompts: jax.Array
    lengths: jax.Array


@pytest.fixture(scope="session")
def contraction() -> Contraction:
    """Each iteration takes half or so of the distance between two states."""
    cfg = TransformerConfig(
        vocab_size=13,
        num_layers=3,
        embed_dim=16,
        num_heads=2,
        mlp_dim=32,
        max_length=32,
        block="sandwich",
        recurrence=8,
        compute_dtype="float32",
    )
    draw = np.random.default_rng(0)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if "scale" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape)
        return jnp.asarray(draw.normal(size=leaf.shape) / 4, jnp.float32)

    shapes = jax.eval_shape(lambda: recurrent_depth.init_params(cfg, jax.random.key(0)))
    params = jax.tree.map_with_path(value, meta.unbox(shapes))
    kernel = params["adapter"]["kernel"]
    params["adapter"]["kernel"] = kernel.at[: cfg.embed_dim].multiply(0.5)
    # Predictions that are far from uniform, else every token is a near tie.
    params["head"]["kernel"] = params["head"]["kernel"] * 2
    return Contraction(
        cfg, params, jnp.array([[0, 0, 5, 7, 2], [3, 1, 4, 1, 12]]), jnp.array([3, 5])
    )


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _continue(
    model: RecurrentModel,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    draws: Draws,
    *,
    max_new_tokens: int,
) -> jax.Array:
    slots = tokens.shape[1] + max_new_tokens - 1
    cache: Any = model.init_cache(params, batch_size=len(tokens), length=slots)
    return decoding.generate(
        model,
        params,
        tokens,
        lengths,
        cache=cache,
        max_new_tokens=max_new_tokens,
        sampling=draws.sampling,
        key=draws.key,
        stop_tokens=draws.stop_tokens,
    )[0]


@pytest.fixture(scope="session")
def one_by_one(contraction: Contraction) -> Callable[..., np.ndarray]:
    """What `decoding` writes after the prompts, or some rows of them: a token after the other."""

    def write(
        model: RecurrentModel, draws: Draws, max_new_tokens: int, rows: tuple[int, int] = (0, 1)
    ) -> np.ndarray:
        _, params, prompts, lengths = contraction
        arguments = (params, prompts[jnp.array(rows)], lengths[jnp.array(rows)], draws)
        return np.asarray(_continue(model, *arguments, max_new_tokens=max_new_tokens))

    return write
