"""Ten thousand damaged files: each is read or refused by name, none crashes or fills the memory."""

import dataclasses
import functools
import json
import math
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from jaxlib_methods.models import huggingface
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.huggingface_config import FAMILIES, Family
from jaxlib_methods.models.language_model import init_params
from jaxlib_methods.models.partitioning import unbox
from jaxlib_methods.train import run_record
from jaxlib_methods.train.corpus import DamagedFileError, find_files, read_documents

TEXTS = [f"document {i} " * 5 for i in range(50)]
MODEL = TransformerConfig(
    vocab_size=11, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, max_length=8
)
# What a family of Hugging Face may say beyond what MODEL's export says.
SPOKEN: dict[str, Any] = {
    "layer_types": ["full_attention"],
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "quantization_config": None,
    "word_embed_proj_dim": 8,
}
WRONG = (None, True, 0, -1, 1, 2, 8, 1.5, 10**9, 10**12, 10**400, math.inf, math.nan)
WRONG += ("", "8", "silu", "../a", "linear", [], [1], ["full_attention"], {}, {"a": {"a": 1}})
MOST_BYTES = 512 * 2**20


def damaged(whole: bytes, count: int) -> Iterator[bytes]:
    """Cut short, prolonged, or with up to 16 bytes replaced, half of the time in the header."""
    draw = random.Random(0)
    for _ in range(count):
        kind = draw.random()
        if kind < 0.2:
            yield whole[: draw.randrange(len(whole))]
            continue
        if kind < 0.3:
            yield whole + draw.randbytes(draw.randrange(1, 64))
            continue
        found = bytearray(whole)
        reach = min(len(whole), 256) if kind < 0.65 else len(whole)
        for _ in range(draw.choice((1, 1, 2, 4, 16))):
            found[draw.randrange(reach)] = draw.choice((0, 127, 128, 255, draw.randrange(256)))
        yield bytes(found)


def mutated(whole: bytes, count: int) -> Iterator[bytes]:
    """JSON with up to 4 values, at any depth, of another kind; one time in eight damaged bytes."""
    draw = random.Random(0)
    for content in damaged(whole, count):
        if draw.random() < 1 / 8:
            yield content
            continue
        values = json.loads(whole)
        for _ in range(draw.choice((1, 1, 2, 4))):
            holder, key = values, draw.choice(list(values))
            while isinstance(holder[key], dict) and holder[key] and draw.random() < 0.7:
                holder = holder[key]
                key = draw.choice(list(holder))
            if draw.random() < 0.1:
                del holder[key]
            else:
                holder[key] = draw.choice(WRONG)
            if not values:
                break
        yield json.dumps(values).encode()


def survive(
    path: Path,
    read: Callable[[], None],
    error: type[Exception] | tuple[type[Exception], ...],
    *,
    count: int,
    damage: Callable[[bytes, int], Iterator[bytes]] = damaged,
) -> None:
    """Reads each damaged form of a file; some must be refused, and some are still whole."""
    whole, before = path.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for content in damage(whole, count):
        path.write_bytes(content)
        try:
            read()
        except error as said:
            refused += 1
            assert path.name in str(said) or path.parent.name in str(said)  # noqa: PT017
            assert "\n" not in str(said)  # noqa: PT017
    assert count // 4 < refused < count
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < MOST_BYTES


def read_all(path: Path) -> None:
    for _ in read_documents(find_files(str(path))):
        pass


def test_arrayrecord(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "a.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    survive(path, lambda: read_all(path), DamagedFileError, count=6000)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="extra `parquet` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    survive(path, lambda: read_all(path), ValueError, count=4000)


def write_zeros(folder: Path, model: TransformerConfig, **options: Any) -> None:
    """A Hugging Face folder."""
    shapes = unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    huggingface.save_params(folder, params, model, **options)


@pytest.fixture
def shapes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow part of a check is done once for each of the configurations that are read."""
    monkeypatch.setattr(huggingface, "_placements", functools.cache(huggingface._placements))


@pytest.mark.usefixtures("shapes_once")
def test_safetensors(tmp_path: Path) -> None:
    write_zeros(tmp_path, MODEL)
    path = tmp_path / "model.safetensors"
    survive(path, lambda: huggingface.check_weights(tmp_path, MODEL), ValueError, count=600)


def in_family(family: Family) -> TransformerConfig:
    """MODEL as a family has it."""
    fields: dict[str, Any] = dict(family.fixed)
    fields["mlp"] = next(iter(family.activations.values()))
    for default, switched in family.switches.values():
        fields |= dict.fromkeys(switched, default)
    if family.recurrent:
        fields |= {"num_layers": 3, "recurrence": 2, "kernel_init": "takase"}
    return dataclasses.replace(MODEL, **fields)


@pytest.mark.usefixtures("shapes_once")
@pytest.mark.parametrize("name", FAMILIES)
def test_config_json(name: str, tmp_path: Path) -> None:
    model = in_family(FAMILIES[name])
    spoken = {} if FAMILIES[name].recurrent else SPOKEN
    write_zeros(tmp_path, model, family=name, extra_config=spoken)
    path = tmp_path / "config.json"

    def read() -> None:
        values = run_record.read_json(epath.Path(path))
        huggingface.check_weights(tmp_path, huggingface.config_from_huggingface(values))

    survive(path, read, ValueError, count=100, damage=mutated)


@pytest.mark.usefixtures("shapes_once")
def test_index_json(tmp_path: Path) -> None:
    write_zeros(tmp_path, MODEL, max_shard_bytes=500)
    path = tmp_path / "model.safetensors.index.json"
    errors = (ValueError, FileNotFoundError)
    read = functools.partial(huggingface.check_weights, tmp_path, MODEL)
    survive(path, read, errors, count=100, damage=mutated)
