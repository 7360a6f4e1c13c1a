"""Validation loss: every token once, whatever the batch size and the mesh."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.infer import evaluate as evaluate_module
from jaxlib_methods.infer import report
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.evaluate import data_config, evaluate
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models.transformer import forward
from jaxlib_methods.train import data
from jaxlib_methods.train.config import DataConfig, RunConfig


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("text")
    words = ["a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(words[i % 7 :] + words[: i % 5]) + " é\n")
    return DataConfig(source=str(folder), sequence_length=32, batch_size=8, validation_fraction=0.3)


def test_loss_is_the_mean_over_every_target_by_numpy(restored: Restored, cfg: DataConfig):
    dataset = data.open_dataset(cfg, restored.tokenizer, split="validation")
    rows = dataset.rows(range(dataset.num_examples))
    logits = jax.jit(forward, static_argnums=0)(
        restored.model,
        restored.params,
        jnp.asarray(rows.inputs),
        positions=jnp.asarray(rows.positions),
        segments=jnp.asarray(rows.segments),
    ).logits
    wide = np.asarray(logits, np.float64)
    log_prob = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_prob, np.asarray(rows.targets)[..., None], -1)[..., 0]
    expected = -picked[np.asarray(rows.where)]
    got = evaluate(restored, cfg)
    assert got.num_tokens == len(expected)
    np.testing.assert_allclose(got.nats_per_token, expected.mean(), rtol=1e-5)
    assert dataset.bytes_per_token is not None
    bits = got.nats_per_token / math.log(2) / dataset.bytes_per_token
    np.testing.assert_allclose(got.bits_per_byte, bits, rtol=1e-6)
    assert dataset.num_examples % cfg.batch_size  # the last batch is padded
    other = evaluate(restored, dataclasses.replace(cfg, batch_size=5))
    assert other.num_tokens == got.num_tokens
    np.testing.assert_allclose(other.nats_per_token, got.nats_per_token, rtol=1e-6)


def test_a_mesh_changes_nothing(restored: Restored, restored_on_eight: Restored, cfg: DataConfig):
    one, eight = evaluate(restored, cfg), evaluate(restored_on_eight, cfg)
    assert one.num_tokens == eight.num_tokens
    np.testing.assert_allclose(one.nats_per_token, eight.nats_per_token, rtol=1e-5)


def test_some_batches_are_those_of_training(restored: Restored, cfg: DataConfig):
    part = evaluate(restored, cfg, max_batches=1)
    assert 0 < part.num_tokens <= 8 * 32 < evaluate(restored, cfg).num_tokens


def test_a_sequence_longer_than_the_context_is_refused(restored: Restored, cfg: DataConfig):
    with pytest.raises(ValueError, match=r"sequence_length=65 .* context of 64"):
        evaluate(restored, dataclasses.replace(cfg, sequence_length=65))


def test_data_of_the_run_unless_flags_replace_it(restored: Restored, cfg: DataConfig):
    assert data_config(restored, {}).sequence_length == 64
    run = restored._replace(config=RunConfig(data=cfg))
    assert data_config(run, {}) == cfg
    assert data_config(run, {"batch_size": 3}) == dataclasses.replace(cfg, batch_size=3)


def test_an_output_without_permission_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Of a file that is written beside its place the folder counts, of another the file."""
    path = tmp_path / "made" / "out.json"
    asked = InferConfig(workdir="runs/a", mode="evaluate", output=str(path))
    report.check_output(asked)
    assert list(tmp_path.iterdir()) == [path.parent]
    monkeypatch.setattr(report.os, "access", lambda found, mode: str(found) == str(path))
    with pytest.raises(ValueError, match=r"--output=.*out.json cannot be written: permission"):
        report.check_output(asked)
    path.touch()
    report.check_output(asked)
    with pytest.raises(ValueError, match="permission is denied; give another"):
        report.check_output(dataclasses.replace(asked, mode="entropy"))


def test_output_is_json(
    restored: Restored, cfg: DataConfig, tmp_path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "out.json"
    run = restored._replace(config=RunConfig(data=cfg), step=7)
    asked = InferConfig(workdir="runs/a", mode="evaluate", output=str(path))
    evaluate_module.run(asked, run)
    expected = evaluate(restored, cfg)
    assert json.loads(path.read_text()) == {
        "workdir": "runs/a",
        "step": 7,
        **expected._asdict(),
    }
    shown = capsys.readouterr().out
    assert f"step 7: {expected.nats_per_token:.4f} nats per token" in shown
