"""Entropy files: what they hold, what they belong to, and the tiers made from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlib_methods.method import TieredBatch
from jaxlib_methods.train import entropies
from jaxlib_methods.train.data import TextDataset
from jaxlib_methods.train.token_cache import TokenStream

L = 4


def text(num_tokens: int, order: Any = "shuffled", first: int = 1) -> TextDataset:
    tokens = np.arange(first, first + num_tokens, dtype=np.uint16)
    tokens[0] = 0
    stream = TokenStream(tokens, np.array([0], np.int64), num_tokens, f"{num_tokens} {first}")
    return TextDataset([stream], sequence_length=L, order=order, seed=3)


TRAIN, VALIDATION = text(4 * 9 + 3), text(4 * 2 + 2, "sequential", first=500)


def provenance(**fields: Any) -> entropies.Provenance:
    given: dict[str, Any] = {
        "model": "m", "tokenizer": "bytes", "train": TRAIN.fingerprint,
        "validation": VALIDATION.fingerprint, "sequence_length": L, "num_train": 10,
        "num_validation": 3, "top_k": None,
    }  # fmt: skip
    return entropies.Provenance(**given | fields)


def entropy_of(example: int) -> np.ndarray:
    """Entropies that say which example and place they are of."""
    return example + np.arange(L) / 4


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = str(tmp_path / "a.array_record")
    rows = np.stack([entropy_of(example) for example in range(13)])
    rows[9, 2:] = np.nan
    entropies.write(path, provenance(), [rows[:8], rows[8:]])
    return path


def test_an_example_has_its_entropies(file: str):
    found = entropies.Entropies(file)
    assert found.provenance == provenance()
    assert found.rows("train", [3, 0, -1])[:2].tolist() == [
        entropy_of(3).tolist(), entropy_of(0).tolist(),
    ]  # fmt: skip
    assert np.isnan(found.rows("train", [-1])).all()
    assert found.rows("validation", [2])[0].tolist() == entropy_of(12).tolist()
    sample = found.sample()
    assert sample.shape == (10, L)
    assert np.isnan(sample).sum() == 2


def test_tiers_follow_the_order_of_the_examples(file: str):
    found = entropies.Entropies(file)
    data = entropies.TieredText(TRAIN, found, "train", (2.5, 4.0, 6.25))
    rows = data.rows([0, 5, 12])
    plain = TRAIN.rows([0, 5, 12])
    assert isinstance(rows, TieredBatch)
    for name in plain._fields:
        np.testing.assert_array_equal(getattr(rows, name), getattr(plain, name))
    for row, number in enumerate(TRAIN.numbers([0, 5, 12])):
        assert rows.inputs[row, 1] == 1 + 4 * number + 1  # it is this example
        cuts = np.searchsorted([2.5, 4.0, 6.25], entropy_of(number), side="right") - 1
        expected = np.where(plain.where[row], cuts, -1)
        assert rows.tier[row].tolist() == expected.tolist()
    behind = entropies.TieredText(VALIDATION, found, "validation", (0.0, 1.0, 2.0)).rows([2, 3])
    assert behind.tier[0].tolist() == [2, -1, -1, -1]
    assert (behind.tier[1] == -1).all()
    other = entropies.TieredText(TRAIN, found, "train", (2.5, 4.0, 6.0))
    assert other.fingerprint != data.fingerprint
    assert (data.num_examples, data.sequence_length) == (TRAIN.num_examples, L)


@pytest.mark.parametrize(
    ("fields", "tokenizer", "message"),
    [
        ({}, "other", "data.tokenizer is bytes there and other here"),
        ({"sequence_length": 8}, "bytes", "data.sequence_length is 8 there and 4 here"),
        ({"train": "x"}, "bytes", "the training text is x there"),
        ({"validation": "x"}, "bytes", "the validation text is x there"),
    ],
)
def test_entropies_of_another_corpus_are_refused(
    tmp_path: Path, fields: dict[str, Any], tokenizer: str, message: str
):
    path = str(tmp_path / "a.array_record")
    entropies.write(path, provenance(**fields), [np.zeros((13, L))])
    found = entropies.Entropies(path)
    with pytest.raises(ValueError, match=message):
        found.check(TRAIN, VALIDATION, tokenizer)
    entropies.write(path, provenance(), [np.zeros((13, L))])
    entropies.Entropies(path).check(TRAIN, VALIDATION, "bytes")


def test_files_that_are_none(tmp_path: Path, file: str):
    with pytest.raises(FileNotFoundError, match=r"there is no entropy file .*--mode=entropy"):
        entropies.Entropies(str(tmp_path / "nothing"))
    (tmp_path / "text").write_text("no records at all")
    with pytest.raises(ValueError, match="text is no entropy file"):
        entropies.Entropies(str(tmp_path / "text"))

    def fails() -> Any:
        yield np.zeros((1, L))
        raise KeyboardInterrupt

    before = Path(file).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        entropies.write(file, provenance(), fails())
    assert Path(file).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.array_record", "text"]


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = str(tmp_path / "a.array_record")
    monkeypatch.setattr(entropies, "VERSION", 2)
    entropies.write(path, provenance(), [np.zeros((13, L))])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 2, this library reads 1"):
        entropies.Entropies(path)
    assert json.dumps(provenance()._asdict())
