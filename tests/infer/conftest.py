"""Small random models, as they would be restored."""

from typing import Any

import jax
import pytest

from jaxlib_methods import energy
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.train.config import DataConfig, RunConfig
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


ENERGY = EnergyConfig(num_steps=2, step_size=0.02, noise=0.5)


def energy_on(devices: list[Any], **sizes: int) -> Restored:
    """The same random energy model on any mesh."""
    mesh = partitioning.make_mesh(**sizes, devices=devices)
    key = jax.random.key(0)
    boxed = jax.eval_shape(lambda: energy.init_params(MODEL, ENERGY, key))
    params = jax.device_put(
        jax.jit(lambda: partitioning.unbox(energy.init_params(MODEL, ENERGY, key)))(),
        partitioning.param_shardings(boxed, mesh),
    )
    run = RunConfig(
        method="energy", model=MODEL, method_config=ENERGY, data=DataConfig(sequence_length=64)
    )
    return Restored(run, MODEL, params, ByteTokenizer(), None, mesh, 0, (0,))


@pytest.fixture(scope="session")
def restored_energy() -> Restored:
    """An energy model on one device."""
    return energy_on(jax.devices()[:1])


@pytest.fixture(scope="session")
def restored_energy_on_eight() -> Restored:
    """An energy model on a mesh of eight devices."""
    return energy_on(jax.devices(), data=4, tensor=2)
