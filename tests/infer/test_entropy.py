"""The entropy pass: against numpy, on any mesh and batch size, from the command's function."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.infer import entropy
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models.transformer import forward
from jaxlib_methods.train import data, entropies
from jaxlib_methods.train.config import DataConfig


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"{i} bottles of beer on the wall, take {i % 5} down\n")
    return DataConfig(source=str(folder), sequence_length=32, batch_size=8, validation_fraction=0.3)


def measured(restored: Restored, dataset: Any, **options: Any) -> np.ndarray:
    given = {"batch_size": 8, "top_k": None, "label": "x"} | options
    return np.concatenate(list(entropy.measure(restored, dataset, **given)))


def test_entropies_by_numpy_whatever_the_batch_and_mesh(
    restored: Restored, restored_on_eight: Restored, cfg: DataConfig
):
    dataset = data.open_dataset(cfg, restored.tokenizer, split="train", in_order=True)
    assert dataset.num_examples % 8
    rows = dataset.rows(range(dataset.num_examples))
    logits = jax.jit(forward, static_argnums=0)(
        restored.model, restored.params, jnp.asarray(rows.inputs),
        positions=jnp.asarray(rows.positions), segments=jnp.asarray(rows.segments),
    ).logits  # fmt: skip
    wide = np.asarray(logits, np.float64)
    p = np.exp(wide - wide.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = np.where(rows.where, -(p * np.log(p)).sum(-1), np.nan)
    found = measured(restored, dataset)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(measured(restored, dataset, batch_size=3), found, rtol=1e-5)
    np.testing.assert_allclose(measured(restored_on_eight, dataset), found, rtol=1e-4)
    ranked = -np.sort(-p, axis=-1)[..., :3]
    ranked /= ranked.sum(-1, keepdims=True)
    three = np.where(rows.where, -(ranked * np.log(ranked)).sum(-1), np.nan)
    np.testing.assert_allclose(measured(restored, dataset, top_k=3), three, rtol=1e-4)


def test_progress_is_shown(
    restored: Restored, cfg: DataConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    dataset = data.open_dataset(cfg, restored.tokenizer, split="train", in_order=True)
    total = dataset.num_examples
    measured(restored, dataset, label="train")
    assert not capsys.readouterr().err  # it took less than `LINE_EVERY`
    monkeypatch.setattr(entropy, "LINE_EVERY", 0.0)
    measured(restored, dataset, label="train")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" examples, ")[0] for line in lines] == [
        f"train: {min(done, total)} of {total}" for done in range(8, total + 8, 8)
    ]
    assert all(line.endswith(" tokens/s") for line in lines)


def test_the_file_belongs_to_the_corpus(
    restored: Restored, cfg: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    class Version:
        version = "weights"

    monkeypatch.setattr(entropy.checkpoint, "load_pretrained", lambda *_, **__: Version)
    path = tmp_path / "a.array_record"
    fields = {"source": cfg.source, "sequence_length": 32, "batch_size": 8,
              "validation_fraction": 0.3}  # fmt: skip
    asked = InferConfig(workdir="x", mode="entropy", output=str(path), data=fields)
    entropy.run(asked, restored)
    assert "examples; mean entropy" in capsys.readouterr().out
    train, validation = (
        data.open_dataset(cfg, restored.tokenizer, split=split) for split in ("train", "validation")
    )
    found = entropies.Entropies(str(path))
    found.check(train, validation, "bytes")
    assert found.provenance.model == "weights"
    in_order = data.open_dataset(cfg, restored.tokenizer, split="train", in_order=True)
    expected = measured(restored, in_order)
    numbers = train.numbers(range(5))
    np.testing.assert_allclose(found.rows("train", numbers), expected[numbers], rtol=2e-3)
    last = measured(restored, validation)[-1]
    np.testing.assert_allclose(
        found.rows("validation", [validation.num_examples - 1])[0], last, rtol=2e-3
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "entropy"}, "--mode=entropy needs --output"),
        ({"mode": "evaluate", "entropy_top_k": 3}, "--entropy_top_k is for --mode=entropy"),
        ({"mode": "entropy", "output": "a", "entropy_top_k": 0}, "entropy_top_k=0 must be at"),
        ({"mode": "entropy", "output": "a", "eval_batches": 1}, "--eval_batches is for"),
    ],
)
def test_mistakes_are_one_sentence(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        InferConfig(workdir="x", **fields)
