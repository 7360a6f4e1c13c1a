"""A small recurrent-depth model whose core contracts, as that of a trained one does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jaxlib_methods.models import recurrent_depth
from jaxlib_methods.models.config import TransformerConfig


class Contraction(NamedTuple):
    """cfg, params: of the model. prompts, lengths: two rows, `[2, 5]` and `[2]`, left-padded."""

    cfg: TransformerConfig
    params: dict
    prompts: jax.Array
    lengths: jax.Array


@pytest.fixture(scope="session")
def contraction() -> Contraction:
    """Each iteration takes about half of the distance of two states."""
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
