"""Tiny runs for the tests of the trainer: one layer, 16 features, a dozen documents."""

import dataclasses
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import loop, prepare
from jaxlib_methods.train.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "its",
    "shadow",
)
CACHE = {
    "jax_compilation_cache_dir": "",
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve documents of sixty words."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=60)))
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `compile_once` and the processes of a test keep compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compile_once(cache_folder: Path) -> Iterator[None]:
    """Keeps compiled programs, so that the same tiny run starts quickly a second time."""
    before = {name: jax.config.values[name] for name in CACHE}
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(cache_folder)}).items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process use one device: two of them are then equal bit for bit."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    for module in (loop, prepare):
        monkeypatch.setattr(module, "mesh_of", lambda config: mesh)


@pytest.fixture
def tiny(text: Path) -> Callable[..., RunConfig]:
    """`tiny(workdir, num_steps=8, ...)`: a run whose fields are found by name in its parts."""

    def make(workdir: Path, *, method: str = "next_token", **fields: Any) -> RunConfig:
        parts = {
            "model": TransformerConfig(
                num_layers=1,
                embed_dim=16,
                num_heads=2,
                mlp_dim=32,
                max_length=16,
                compute_dtype="float32",
            ),
            "data": DataConfig(
                source=str(text), validation_fraction=0.2, sequence_length=16, batch_size=2
            ),
            "train": TrainConfig(num_steps=8, log_every=1, eval_every=4, eval_batches=1),
            "optimizer": OptimizerConfig(),
            "checkpoint": CheckpointConfig(every=2),
            "mesh": MeshConfig(),
            "method_config": None,
        }
        own = {"seed", "compare", "preset", "method_config"}
        run = {name: fields.pop(name) for name in own & fields.keys()}
        for part, value in parts.items():
            known = {field.name for field in dataclasses.fields(value)} if value else set()
            chosen = {name: fields.pop(name) for name in known & fields.keys()}
            parts[part] = dataclasses.replace(value, **chosen) if value else value
        assert not fields, f"no part of a run has {fields}"
        return RunConfig(method=method, workdir=str(workdir), **(parts | run))

    return make


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steady = [
        {k: v for k, v in line.items() if not k.endswith(("_secs", "_per_sec", "/goodput"))}
        for line in lines
    ]
    return [line for line in steady if line.keys() != {"step"}]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C is heard; what a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(name="read_metrics")
def read_metrics_fixture() -> Callable[[Path], list[dict[str, Any]]]:
    """`read_metrics(workdir)`."""
    return read_metrics
