"""A small random model, as it would be restored."""

from typing import Any

import jax
import pytest

from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.train.tokenizer import ByteTokenizer

MODEL = TransformerConfig(
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=64,
    compute_dtype="float32",
)


def restored_on(devices: list[Any], **sizes: int) -> Restored:
    """The same random model on any mesh."""
    mesh = partitioning.make_mesh(**sizes, devices=devices)
    boxed = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    params = jax.device_put(
        jax.jit(lambda: partitioning.unbox(init_params(MODEL, jax.random.key(0))))(),
        partitioning.param_shardings(boxed, mesh),
    )
    return Restored(None, MODEL, params, ByteTokenizer(), None, mesh, 0, (0,))


@pytest.fixture(scope="session")
def restored() -> Restored:
    """On one device."""
    return restored_on(jax.devices()[:1])


@pytest.fixture(scope="session")
def restored_on_eight() -> Restored:
    """On a mesh of eight devices."""
    return restored_on(jax.devices(), data=4, tensor=2)
