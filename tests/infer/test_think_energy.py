"""An energy run at inference: text, evaluation, scores, and quality against compute."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags

from jaxlib_methods import energy_flops, thinking_text
from jaxlib_methods.infer import __main__ as infer_main
from jaxlib_methods.infer import config as infer_config
from jaxlib_methods.infer import correlation, restore, score, think, think_energy
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.evaluate import evaluate
from jaxlib_methods.infer.generate import generate
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import huggingface, partitioning
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.thinking import ThinkConfig
from jaxlib_methods.train import data, flags, run_record
from jaxlib_methods.train.checkpoint import Checkpoints
from jaxlib_methods.train.config import DataConfig
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState

ASKED = ThinkConfig(num_steps=3, num_candidates=2, stop="energy", tolerance=5.0)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        (folder / f"{i}.txt").write_text("a quick brown fox jumps over the dog"[i:] + "\n")
    return DataConfig(source=str(folder), sequence_length=16, batch_size=5, validation_fraction=0.5)


@pytest.fixture(scope="module")
def result(restored_energy: Restored, cfg: DataConfig) -> think_energy.Result:
    return think_energy.think(restored_energy, cfg, ASKED, max_batches=2)


@pytest.fixture(scope="module")
def workdir(
    restored_energy: Restored, cfg: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A run with one checkpoint."""
    folder = str(tmp_path_factory.mktemp("run"))
    assert restored_energy.config is not None
    run = dataclasses.replace(restored_energy.config, data=cfg)
    record = Record(run, restored_energy.tokenizer.fingerprint, "corpus")
    run_record.write_config(folder, record)
    with Checkpoints(folder, keep=1, record=record) as checkpoints:
        state = TrainState(jnp.array(7), restored_energy.params, {"count": jnp.array(7)})
        checkpoints.save(state)
    return folder


def infer(*arguments: str) -> None:
    """`python -m jaxlib_methods.infer`, in this process, on one device."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_integer("verbosity", -1, "", flag_values=values)
    infer_config.define(values)
    flags.parse(["infer", *arguments], values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer_main, "FLAGS", values)
        patch.setattr(infer_config.from_flags, "__defaults__", (values,))
        mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        patch.setattr(partitioning, "make_mesh", lambda **_: mesh)
        infer_main.main([])


def test_every_step_and_number_of_candidates_is_what_evaluation_gives(
    restored_energy: Restored, cfg: DataConfig, result: think_energy.Result
):
    def nats(**fields: Any) -> float:
        thinking = restored_energy._replace(think=ThinkConfig(**fields))
        return evaluate(thinking, cfg, max_batches=2).nats_per_token

    rows = {row.name: row for row in result.rows}
    assert [row.name for row in result.rows if row.kind == "steps"] == [
        "1 step", "2 steps", "3 steps",
    ]  # fmt: skip
    assert rows["3 steps"].nats_per_token == pytest.approx(nats(num_steps=3), rel=1e-4)
    assert rows["2 steps"].nats_per_token == pytest.approx(nats(), rel=1e-4)
    both = nats(num_steps=3, num_candidates=2)
    assert rows["min_energy of 2"].nats_per_token == pytest.approx(both, rel=1e-4)
    assert result.grid[2][1] == pytest.approx(both, rel=1e-4)
    worst = nats(num_steps=3, num_candidates=2, select="max_energy")
    assert rows["max_energy of 2"].nats_per_token == pytest.approx(worst, rel=1e-4)
    mean = rows["mean of 2"].nats_per_token
    assert mean == pytest.approx((both + worst) / 2, rel=1e-4)
    assert rows["oracle of 2"].nats_per_token < min(both, worst)
    early = nats(num_steps=3, stop="energy", tolerance=5.0)
    assert rows["energy below 5"].nats_per_token == pytest.approx(early, rel=1e-4)


def test_the_table_by_hand(restored_energy: Restored, cfg: DataConfig, result: think_energy.Result):
    assert restored_energy.thinker is not None
    model, length = restored_energy.thinker.model, cfg.sequence_length
    trained = next(row for row in result.rows if row.name == "2 steps")
    assert trained.gain == 0
    assert result.reference_steps == 2
    for row in result.rows:
        assert row.perplexity == pytest.approx(math.exp(row.nats_per_token))
        gain = 100 * (1 - row.perplexity / trained.perplexity)
        assert row.gain == pytest.approx(gain, rel=1e-6, abs=1e-9)
        flops = energy_flops.think_flops(
            model, length, num_steps=row.steps, num_candidates=row.candidates
        )
        assert row.flops == flops
    stops = [row for row in result.rows if row.kind == "stop_energy"]
    assert [row.name.split()[-1] for row in stops] == ["0.02", "0.1", "0.5", "5"]
    used = [row.steps for row in stops]
    assert used == sorted(used, reverse=True)
    assert used[0] > 2
    assert used[-1] == 2, "every change is below five times the first"
    assert any(row.kind == "stop_entropy" for row in result.rows)
    assert "2 steps *" in think_energy.table(result)
    assert len(think_energy.table(result).splitlines()) == len(result.rows) + 3


def test_energies_of_the_text_and_correlation_by_numpy(
    restored_energy: Restored, cfg: DataConfig, result: think_energy.Result
):
    model = restored_energy.thinker
    assert model is not None
    dataset = data.open_dataset(cfg, restored_energy.tokenizer, split="validation")
    assert dataset.num_examples <= 10, "two batches are the whole set"
    rows = dataset.rows(range(dataset.num_examples))

    @jax.jit
    def all_at_once(params: Any) -> Any:
        places = jnp.asarray(rows.positions), jnp.asarray(rows.segments)
        context = model.observe(params, jnp.asarray(rows.inputs), *places)
        found = think_energy._read(model, params, context, jnp.asarray(rows.targets))
        text = thinking_text.score(model.model, params, context, jnp.asarray(rows.targets))
        return text, found.energy[1, :, 0], found.nll[1, :, 0]

    text, energy, nll = (np.asarray(x)[rows.where] for x in all_at_once(restored_energy.params))
    assert result.num_tokens == len(text)
    assert result.text_energy == pytest.approx(text.mean(), rel=1e-4)
    assert result.energies[1] == pytest.approx(energy.mean(), rel=1e-4)
    assert result.correlation == pytest.approx(np.corrcoef(energy, nll)[0, 1], abs=1e-4)


def test_correlation_over_batches_is_that_of_all_tokens():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 5, 7)) + np.arange(5)[:, None]
    where = draw.random((5, 7)) < 0.7
    parts = [
        np.asarray(correlation.moments(jnp.asarray(x[i]), jnp.asarray(y[i]), jnp.asarray(where[i])))
        for i in range(5)
    ]
    expected = np.corrcoef(x[where], y[where])[0, 1]
    assert correlation.correlation(parts) == pytest.approx(expected, abs=1e-5)
    assert math.isnan(correlation.correlation([np.array([3.0, 1, 1, 0, 0, 0])]))


def test_a_hopeless_run_has_an_infinite_perplexity_and_json_without_it(
    restored_energy: Restored, result: think_energy.Result, tmp_path: Path, monkeypatch
):
    row = result.rows[0]._replace(nats_per_token=900.0, perplexity=math.inf, gain=-math.inf)
    monkeypatch.setattr(think_energy, "think", lambda *_, **__: result._replace(rows=[row] * 2))
    output = tmp_path / "think.json"
    think_energy.run(
        InferConfig(workdir="runs/a", mode="think", output=str(output)), restored_energy
    )
    assert "Infinity" not in output.read_text()
    assert json.loads(output.read_text())["rows"][0]["perplexity"] is None
    assert think_energy._exp(900.0) == math.inf
    assert think_energy._exp(2.0) == math.exp(2.0)


def test_text_is_that_of_the_prompt_alone_on_any_mesh(
    restored_energy: Restored, restored_energy_on_eight: Restored
):
    settings: dict[str, Any] = {"max_new_tokens": 4, "sampling": SamplingConfig(temperature=0.7)}
    prompts = ["one", "two three", "", "four"]
    together = generate(restored_energy, prompts, **settings)
    assert generate(restored_energy, prompts[:1], **settings) == together[:1]
    assert generate(restored_energy_on_eight, prompts, **settings) == together
    with pytest.raises(ValueError, match=r"54 tokens and max_new_tokens=11 .* 64; .*tokens=10"):
        generate(restored_energy, ["x" * 53], max_new_tokens=11, sampling=SamplingConfig())


def test_scores_are_energies_of_the_text_with_its_beginning(restored_energy: Restored):
    long, short = score.score(restored_energy, ["abcd", "ab"])
    assert (len(long.energies), len(short.nats)) == (4, 2)
    np.testing.assert_allclose(short.energies, long.energies[:2], rtol=1e-4)
    np.testing.assert_allclose(short.nats, long.nats[:2], rtol=1e-3)
    other = score.score(restored_energy, ["ad"])[0]
    assert other.energies[0] == pytest.approx(long.energies[0], rel=1e-4)
    assert other.energies[1] != pytest.approx(long.energies[1], rel=1e-3)
    for text in ("", "x" * 65):
        with pytest.raises(ValueError, match=rf"has {len(text)} tokens; a score takes 1 to 64"):
            score.score(restored_energy, ["fine", text])


def test_the_command_line(workdir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    output = tmp_path / "think.json"
    options = ("--mode=think", "--think.num_steps=2", "--think.num_candidates=1")
    infer(f"--workdir={workdir}", *options, "--eval_batches=1", f"--output={output}")
    shown, values = capsys.readouterr().out, json.loads(output.read_text())
    assert "step 7: " in shown
    assert "tokens of validation text" in shown
    assert [row["kind"] for row in values["rows"][:3]] == ["steps", "steps", "stop_energy"]
    assert (tmp_path / "think.png").read_bytes()[:4] == b"\x89PNG"
    infer(f"--workdir={workdir}", "--mode=score", "--prompt=ab", "--prompt=abc")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("energy ")
    assert lines[1].endswith("nats per token, 3 tokens: 'abc'")
    infer(f"--workdir={workdir}", "--prompt=ab", "--max_new_tokens=2", "--think.num_steps=1")
    assert capsys.readouterr().out.startswith("ab")


def test_without_matplotlib_the_table_is_still_there(
    result: think_energy.Result, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not think_energy.draw(result, restore.epath.Path(tmp_path) / "x.png")
    assert "pip install jaxlib-methods[plot]" in capsys.readouterr().out


def test_what_another_run_cannot_do_is_refused_in_one_line(
    workdir: str, restored: Restored, restored_energy: Restored, tmp_path: Path
):
    asked = InferConfig(workdir="runs/a", mode="think")
    with pytest.raises(ValueError, match=r"--mode=think is for .*; runs/a is a plain lang"):
        think.run(asked, restored)
    with pytest.raises(ValueError, match="--mode=score is for an energy run"):
        score.run(InferConfig(workdir="runs/a", mode="score", prompt=("x",)), restored)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    huggingface.save_params(tmp_path / "hf", restored.params, restored.model)
    with pytest.raises(ValueError, match=r"--think.noise is for an energy run; .*hf is a plain la"):
        restore.restore(str(tmp_path / "hf"), mesh=mesh, think={"noise": 1.0})
    assert restored_energy.config is not None
    record = run_record.read_record(workdir)
    assert record is not None
    run = dataclasses.replace(record.config, method="next_token", method_config=None)
    (tmp_path / "checkpoints").mkdir()
    run_record.write_config(tmp_path, record._replace(config=run))
    with pytest.raises(ValueError, match=r"--think.stop is for an energy run; .* is a plain lang"):
        restore.restore(str(tmp_path), mesh=mesh, think={"stop": "energy"})
    with pytest.raises(ValueError, match=r"--depth.exit is for a language model that is recurr"):
        restore.restore(workdir, mesh=mesh, depth={"exit": "kl"})
