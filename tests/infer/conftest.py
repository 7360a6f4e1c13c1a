"""Small random models, as they would be restored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlib_methods import energy
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train.config import DataConfig, RunConfig, TrainConfig
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


THOUGHTS = ReinforcementMidtrainingConfig(
    task="parity", max_thought=6, budget=6, budget_decay=0.5, temperature=0.9
)
SMALL = dataclasses.replace(MODEL, vocab_size=64, num_layers=1)  # of the bytes up to "?"


def thoughts_on(devices: list[Any], **sizes: int) -> Restored:
    """The same random model that thinks about parity, on any mesh."""
    mesh = partitioning.make_mesh(**sizes, devices=devices)
    boxed = jax.eval_shape(lambda: init_params(SMALL, jax.random.key(0)))

    def create() -> Any:
        params = partitioning.unbox(init_params(SMALL, jax.random.key(0)))
        blocks = jax.tree.map(lambda p: 3 * p, params["blocks"])  # rows that differ
        likely = jnp.zeros(128).at[jnp.array([3, *b"01.=<"])].set(2.0)  # 3 ends a thought
        return params | {
            "blocks": blocks,
            "head": {"kernel": params["head"]["kernel"] * likely[None]},
        }

    params = jax.device_put(jax.jit(create)(), partitioning.param_shardings(boxed, mesh))
    run = RunConfig(
        method="reinforcement_midtraining",
        model=SMALL,
        method_config=THOUGHTS,
        data=DataConfig(batch_size=16, sequence_length=32),
        train=TrainConfig(num_steps=10),
    )
    return Restored(run, SMALL, params, ByteTokenizer(), 10, mesh, 0, (0,))


@pytest.fixture(scope="session")
def restored_thoughts() -> Restored:
    """A run that thinks about parity, on one device."""
    return thoughts_on(jax.devices()[:1])


@pytest.fixture(scope="session")
def restored_thoughts_on_eight() -> Restored:
    """The same on a mesh of eight devices."""
    return thoughts_on(jax.devices(), data=4, tensor=2)
