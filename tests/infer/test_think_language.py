"""What depth gives a recurrent language model, against programs that say it one by one."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import depth_language, flops, losses
from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.infer import evaluate, restore, think, think_language, think_language_report
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.infer.think_language_report import Thinking
from jaxlib_methods.method import Batch
from jaxlib_methods.models import decoding, partitioning, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import data, run_record
from jaxlib_methods.train.checkpoint import Checkpoints
from jaxlib_methods.train.config import DataConfig, RunConfig
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState
from jaxlib_methods.train.tokenizer import ByteTokenizer

MODEL = TransformerConfig(
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    mlp_dim=16,
    max_length=32,
    block="sandwich",
    recurrence=3,
    backprop_steps=2,
    compute_dtype="float32",
)
MOST = 6
ASKED = DepthConfig(num_steps=MOST, exit="latent", tolerance=0.2)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        (folder / f"{i}.txt").write_text("a quick brown fox jumps over the dog"[i:] + "\n")
    return DataConfig(source=str(folder), sequence_length=16, batch_size=5, validation_fraction=0.5)


@pytest.fixture(scope="module")
def restored(cfg: DataConfig) -> Restored:
    """Random weights whose core contracts, so that tokens end early at different depths."""
    boxed = jax.eval_shape(lambda: recurrent_depth.init_params(MODEL, jax.random.key(0)))
    draw = np.random.default_rng(0)

    def value(path: Any, leaf: Any) -> np.ndarray:
        if "scale" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return 0.3 * draw.normal(size=leaf.shape).astype(np.float32)

    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    params = jax.tree.map_with_path(value, partitioning.unbox(boxed))
    params["adapter"]["kernel"][: MODEL.embed_dim] *= 0.4
    params = jax.device_put(params, partitioning.param_shardings(boxed, mesh))
    run = RunConfig(model=MODEL, data=cfg)
    return Restored(run, MODEL, params, ByteTokenizer(), 7, mesh, 0, (0,), depth=ASKED)


@pytest.fixture(scope="module")
def batch(restored: Restored, cfg: DataConfig) -> Batch:
    """The whole validation set."""
    dataset = data.open_dataset(cfg, restored.tokenizer, split="validation")
    assert dataset.num_examples <= 10, "two batches are the whole set"
    return jax.tree.map(jnp.asarray, dataset.rows(range(dataset.num_examples)))


@pytest.fixture(scope="module")
def found(restored: Restored, cfg: DataConfig) -> Thinking:
    return think_language.think(restored, cfg, max_batches=2)


@pytest.fixture(scope="module")
def states(restored: Restored, batch: Batch) -> dict[int, list[np.ndarray]]:
    """Seed -> s_0, s_1, ..., one iteration at a time, of the tokens that count."""
    reading = read(restored, batch)
    advance = jax.jit(lambda s: recurrent_depth.iterate(MODEL, restored.params, s, reading)[0])
    kept = {}
    for seed in (0, 1):
        key = decoding.stream_key(seed, decoding.Stream.STATE)
        state = recurrent_depth.state_at(MODEL, batch.positions, key)
        path = [state]
        for _ in range(MOST):
            path.append(advance(path[-1]))
        kept[seed] = [np.asarray(s)[np.asarray(batch.where)] for s in path]
    return kept


def read(restored: Restored, batch: Batch) -> recurrent_depth.Reading:
    places: dict[str, Any] = {"positions": batch.positions, "segments": batch.segments}
    return recurrent_depth.read(MODEL, restored.params, batch.inputs, **places)[0]


def test_the_loss_of_each_number_of_iterations_is_what_evaluation_gives(
    restored: Restored, cfg: DataConfig, found: Thinking
):
    measured = {s.iterations: s.nats_per_token for s in found.steps if s.nats_per_token is not None}
    assert list(measured) == [1, 2, 3, 4, 6]
    for count in (1, 3, 6):
        model = restored._replace(depth=DepthConfig(num_steps=count))
        got = evaluate.evaluate(model, cfg, max_batches=2)
        assert measured[count] == pytest.approx(got.nats_per_token, rel=1e-5)
        assert got.iterations == pytest.approx(count)
        assert got.num_tokens == found.num_tokens
    assert len({f"{nats:.3f}" for nats in measured.values()}) > 3


def test_change_norm_and_gap_are_those_of_the_states(
    found: Thinking, states: dict[int, list[np.ndarray]]
):
    size = np.linalg.norm
    for row in found.steps:
        i = row.iterations
        here, before, other = states[0][i], states[0][i - 1], states[1][i]
        assert row.change == pytest.approx(
            (size(here - before, axis=-1) / size(here, axis=-1)).mean(), rel=1e-3
        )
        assert row.norm == pytest.approx(np.sqrt((here**2).mean(axis=-1)).mean(), rel=1e-3)
        assert row.gap == pytest.approx(
            (size(here - other, axis=-1) / size(here, axis=-1)).mean(), rel=1e-3
        )
    assert found.steps[-1].gap < 0.5 * found.steps[0].gap


def test_without_injection_there_is_one_beginning(restored: Restored):
    model = dataclasses.replace(MODEL, injection="none")
    plan = think_language._plan(restored._replace(model=model, depth=DepthConfig(num_steps=1)))
    trace = {name: np.ones(1) for name in ("nll", "change", "norm", "gap")}
    one = {"nll": np.array(3.0), "counts": np.array([0.0, 2.0])}
    totals = {"count": 2.0, "trace": trace, "exits": [one] * 4, "gradients": np.array([4.0, 4.0])}
    got = think_language._summarise(plan, 16, totals, [math.nan] * 4)
    assert math.isnan(got.steps[0].gap)
    assert got.steps[0].norm == 0.5
    assert got.gradients == [1.0, 1.0]


def test_exits_are_those_of_think_steps(restored: Restored, batch: Batch, found: Thinking):
    assert [row.exit for row in found.exits] == ["kl", "latent", "entropy", "argmax", "latent"]
    assert [row.tolerance for row in found.exits] == [5e-4, 0.03, 1e-3, 5, 0.2]
    where = np.asarray(batch.where)
    deepest = RecurrentModel(MODEL, DepthConfig(num_steps=MOST))
    places: dict[str, Any] = {"positions": batch.positions, "segments": batch.segments}
    logits = deepest(restored.params, batch.inputs, **places).logits
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)[where]
    entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
    for index in (0, 4):
        row = found.exits[index]
        depth = DepthConfig(num_steps=MOST, exit=row.exit, tolerance=row.tolerance)  # pyright: ignore
        thought = depth_language.think_steps(
            RecurrentModel(MODEL, depth), restored.params, batch.inputs, **places
        )
        used = np.asarray(thought.steps_used)[where]
        nll = np.asarray(losses.token_nll(thought.logits, batch.targets))[where]
        assert len(set(used)) > 1, "all tokens end at once, which tells nothing"
        assert row.mean == pytest.approx(used.mean())
        expected = np.quantile(used, (0.1, 0.5, 0.9), method="inverted_cdf")
        assert [row.p10, row.p50, row.p90] == expected.tolist()
        np.testing.assert_allclose(row.shares, [(used == i).mean() for i in range(1, MOST + 1)])
        assert row.nats_per_token == pytest.approx(nll.mean(), rel=1e-5)
        assert row.difference == pytest.approx(
            nll.mean() - found.steps[-1].nats_per_token, abs=1e-5
        )
        assert row.correlation == pytest.approx(np.corrcoef(used, entropy)[0, 1], abs=1e-4)


def test_an_exit_pays_for_its_checks(found: Thinking):
    def forward(steps: float) -> float:
        return flops.recurrent_forward_flops(MODEL, 16, num_steps=steps)

    block = forward(0) / 2 - MODEL.embed_dim * MODEL.padded_vocab_size  # prelude and coda are alike
    head = 2 * MODEL.embed_dim * MODEL.padded_vocab_size
    kl, latent = found.exits[:2]
    assert kl.flops == pytest.approx(forward(kl.mean) + kl.mean * (block + head))
    assert latent.flops == pytest.approx(forward(latent.mean))
    assert [row.flops for row in found.steps] == [forward(i) for i in range(1, MOST + 1)]


def test_gradients_in_the_states_are_those_of_zeros_that_are_added(
    restored: Restored, batch: Batch, found: Thinking
):
    reading = read(restored, batch)

    def loss(probes: list[jax.Array]) -> jax.Array:
        key = decoding.stream_key(0, decoding.Stream.STATE)
        state = recurrent_depth.state_at(MODEL, batch.positions, key) + probes[0]
        for probe in probes[1:]:
            state = recurrent_depth.iterate(MODEL, restored.params, state, reading)[0] + probe
        logits = recurrent_depth.predict(MODEL, restored.params, state, reading)[0]
        return losses.mean(
            *losses.masked_sum(losses.token_nll(logits, batch.targets), where=batch.where)
        )

    zeros = [jnp.zeros((*batch.inputs.shape, MODEL.embed_dim))] * (MODEL.recurrence + 1)
    expected = [float(jnp.linalg.norm(g)) for g in jax.jit(jax.grad(loss))(zeros)]
    np.testing.assert_allclose(found.gradients, expected, rtol=1e-3)
    assert len({f"{g:.2g}" for g in expected}) == 4


def test_the_tables(found: Thinking):
    lines = think_language_report.table(found).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["1", "2", "3*", "4", "6"]
    assert [line.split()[0] for line in lines[7:12]] == [row.exit for row in found.exits]
    assert lines[13].startswith("difference: to 6 iterations")
    assert lines[14].startswith(f"|dL/ds_i| {found.gradients[3]:.3g} after 3 iterations, ")
    assert f"{found.gradients[1]:.3g} where the trained window of 2 begins" in lines[14]


def test_without_flags_four_times_the_recurrence():
    params: Any = None
    model: Any = dataclasses.replace(MODEL, recurrence=32)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    plan = think_language._plan(Restored(None, model, params, ByteTokenizer(), None, mesh, 0, (0,)))
    assert plan.steps == (1, 2, 4, 8, 16, 32, 64, 128)
    assert [exit.depth.exit for exit in plan.exits] == ["kl", "latent", "entropy", "argmax"]
    assert {exit.num_steps for exit in plan.exits} == {128}


def test_evaluation_counts_the_iterations_of_an_exit(
    restored: Restored, cfg: DataConfig, found: Thinking, capsys: pytest.CaptureFixture[str]
):
    evaluate.run(InferConfig(workdir="runs/a", mode="evaluate", eval_batches=2), restored)
    mean = found.exits[-1].mean
    assert f"{found.exits[-1].nats_per_token:.4f} nats per token" in capsys.readouterr().out
    got = evaluate.evaluate(restored, cfg, max_batches=2)
    assert got.iterations == pytest.approx(mean)
    assert 1 < mean < MOST


def test_a_run_is_restored_with_its_depth_and_all_is_written(
    restored: Restored, found: Thinking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib", reason="extra `plot` is not installed")
    assert restored.config is not None
    record = Record(restored.config, restored.tokenizer.fingerprint, "corpus")
    run_record.write_config(tmp_path, record)
    with Checkpoints(str(tmp_path), keep=1, record=record) as checkpoints:
        checkpoints.save(TrainState(jnp.array(7), restored.params, {"count": jnp.array(7)}))
    flags = {"num_steps": MOST, "exit": "latent", "tolerance": 0.2}
    again = restore.restore(str(tmp_path), mesh=restored.mesh, depth=flags)
    assert again.language_model == RecurrentModel(MODEL, ASKED)
    output = tmp_path / "out.json"
    asked = InferConfig(workdir=str(tmp_path), mode="think", eval_batches=2, output=str(output))
    think.run(asked, again)
    shown, values = capsys.readouterr().out, json.loads(output.read_text())
    assert f"{found.num_tokens} tokens of validation text" in shown
    assert think_language_report.table(found).splitlines()[1] in shown
    assert len(values["steps"]) == MOST
    assert values["exits"][1]["exit"] == "latent"
    np.testing.assert_allclose(values["gradients"], found.gradients, rtol=1e-4)
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"--think.noise is for an energy run; .* recurrent in"):
        restore.restore(str(tmp_path), mesh=restored.mesh, think={"noise": 1.0})
