"""Ten thousand damaged files: each is read or refused by name, none crashes or fills the memory."""

import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from jaxlib_methods.models import huggingface
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import unbox
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.train.corpus import DamagedFileError, find_files, read_documents

TEXTS = [f"document {i} " * 5 for i in range(50)]
MODEL = TransformerConfig(
    vocab_size=11, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, max_length=8
)
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


def survive(path: Path, read: Callable[[], None], error: type[Exception], *, count: int) -> None:
    """Reads each damaged form of a file; some must be refused, and some are still whole."""
    whole, before = path.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for content in damaged(whole, count):
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


def test_safetensors(tmp_path: Path) -> None:
    params = unbox(init_params(MODEL, jax.random.key(0)))
    huggingface.save_params(tmp_path, params, MODEL)
    path = tmp_path / "model.safetensors"
    survive(path, lambda: huggingface.check_weights(tmp_path, MODEL), ValueError, count=600)
