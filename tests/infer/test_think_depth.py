"""The frontier of a reasoning run, against single forward passes, and what is written of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import depth_reasoning, registry
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig, Questions
from jaxlib_methods.infer import restore, think, think_depth
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.infer.think_depth import Frontier
from jaxlib_methods.models import depth_recurrent, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import run_record
from jaxlib_methods.train.checkpoint import Checkpoints
from jaxlib_methods.train.config import DataConfig, RunConfig
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState
from jaxlib_methods.train.tokenizer import ByteTokenizer

MODEL = TransformerConfig(embed_dim=8, num_heads=2, mlp_dim=8, compute_dtype="float32")
CFG = DepthRecurrenceConfig(
    task="reachability",
    min_steps=2,
    max_steps=3,
    most_steps=5,
    easiest=2,
    hardest=3,
    eval_difficulties=(1, 2, 3, 4),
    per_bucket=6,
    max_nodes=8,
    most_nodes=8,
    test_fewest_nodes=8,
    test_most_nodes=8,
)
RUN = RunConfig(
    method="depth_recurrence", model=MODEL, method_config=CFG, data=DataConfig(batch_size=7)
)


@pytest.fixture(scope="module")
def run() -> Restored:
    """A classifier of random weights, whose answers differ."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])

    @jax.jit
    def make() -> Any:
        key = jax.random.key(3)
        params = partitioning.unbox(registry.init_model(RUN.method, MODEL, CFG, key))
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        params = treedef.unflatten(moved)
        params["readout_logit"]["bias"] -= 1.0  # near the mean of the logits
        return params

    return Restored(RUN, MODEL, make(), ByteTokenizer(), 5, mesh, 0, (0,))


@pytest.fixture(scope="module")
def found(run: Restored) -> Frontier:
    return think_depth.frontier(run)


def by_hand(num_steps: int) -> Frontier:
    """A frontier of four difficulties in which k is solved from k steps on."""
    accuracy = [[1.0 if t >= k else 0.5 for t in range(1, num_steps + 1)] for k in (1, 2, 3, 9)]
    accuracy[2][3] = float("nan")
    movement = {"trained": [1.0] * num_steps, "other": [2.0] * num_steps}
    return Frontier(
        (1, 2, 3, 9), [4, 4, 4, 4], accuracy, [1, 2, 3, None], (1, 2), (2, 3), *[movement] * 3
    )


def test_every_number_of_steps_is_a_forward_pass_of_its_own(run: Restored, found: Frontier):
    questions = CFG.resolved()
    model = questions.model(MODEL)
    dataset = questions.dataset("validation")
    rows = dataset.rows(range(dataset.num_examples))
    assert dataset.num_examples % 7, "the last batch is padded"
    assert found.counts == [6, 6, 6, 6]
    assert np.array(found.accuracy).shape == (4, 5)
    forward = jax.jit(depth_recurrent.forward, static_argnums=0, static_argnames="num_steps")
    label, difficulty = np.asarray(rows.label), np.asarray(rows.difficulty)
    for steps in range(1, 6):
        logits = forward(model, run.params, *depth_reasoning.inputs(rows), num_steps=steps)
        right = (np.asarray(logits) > 0) == (label == 1)
        expected = [right[difficulty == k].mean() for k in (1, 2, 3, 4)]
        np.testing.assert_allclose([row[steps - 1] for row in found.accuracy], expected)
    assert len({value for row in found.accuracy for value in row}) > 2, "weights that tell nothing"


def test_movement_is_apart_for_trained_difficulties_and_others(run: Restored, found: Frontier):
    questions: Questions = CFG.resolved()
    rows = questions.dataset("validation").rows(range(24))
    path = depth_reasoning.trajectory(questions, questions.model(MODEL), run.params, rows)
    trained = (np.asarray(rows.difficulty) >= 2) & (np.asarray(rows.difficulty) <= 3)
    for name in ("norm", "change", "gate"):
        values, got = np.asarray(getattr(path, name)), getattr(found, name)
        np.testing.assert_allclose(got["trained"], values[:, trained].mean(axis=1), rtol=1e-4)
        np.testing.assert_allclose(got["other"], values[:, ~trained].mean(axis=1), rtol=1e-4)
        assert not np.allclose(got["trained"], got["other"], rtol=1e-3), name


def test_solved_is_the_fewest_steps_with_the_accuracy():
    sums = np.zeros((4, 5, 4))
    sums[0, :, 0] = [10, 19, 18, 20, 20]
    sums[0, :, 1] = [18, 18, 18, 18, 18]
    sums[0, :, 2] = 20
    counts = np.array([20.0, 20.0, 20.0, 0.0])
    got = think_depth._summarise(CFG.resolved(), sums, counts)
    assert got.first_solved == [2, None, 1, None]
    assert np.isnan(got.accuracy[3]).all()
    assert got.trained_difficulties == (2, 3)
    assert got.trained_steps == (2, 3)


def test_some_batches_are_spread_over_the_difficulties(run: Restored):
    got = think_depth.frontier(run, max_batches=2)
    assert sum(got.counts) == 14
    assert min(got.counts) >= 3


@pytest.mark.parametrize(
    ("sizes", "count"), [({"data": 8}, 8), ({"data": 3}, 3), ({"fsdp": 2, "sequence": 2}, 4)]
)
def test_other_devices_than_those_of_training_answer_the_same(
    run: Restored, found: Frontier, sizes: dict[str, int], count: int
):
    # Seven questions at once in training: no mesh of more than one device or seven divides them.
    mesh = partitioning.make_mesh(**{"data": 1, **sizes}, devices=jax.devices()[:count])
    params = jax.device_put(run.params, partitioning.replicated(mesh))
    got = think_depth.frontier(run._replace(mesh=mesh, params=params))
    assert got.counts == found.counts
    np.testing.assert_allclose(got.accuracy, found.accuracy)
    for name in ("norm", "change", "gate"):
        for group, values in getattr(got, name).items():
            np.testing.assert_allclose(values, getattr(found, name)[group], rtol=1e-4)


def test_a_mesh_that_cuts_a_question_unevenly_is_refused(run: Restored):
    mesh = partitioning.make_mesh(data=1, sequence=3, devices=jax.devices()[:3])
    message = "mesh.sequence=3 does not divide the 8 tokens of this run's .*; give --mesh.sequence"
    with pytest.raises(ValueError, match=message):
        think_depth.frontier(run._replace(mesh=mesh))


def test_the_table_marks_what_was_trained():
    lines = think_depth.table(by_hand(30)).splitlines()
    titles, steps = lines[0].split()[:4], lines[0].split()[4:]
    assert titles == ["difficulty", "questions", "solved", "at"]
    assert steps == ["1", "2*", "3*", "4", "6", "8", "12", "16", "20", "28", "30"]
    assert lines[1].split()[:5] == ["1*", "4", "1", "1.000", "1.000"]
    assert lines[4].split()[:8] == ["9", "4", "-", *["0.500"] * 5]
    assert lines[4].split()[-1] == "1.000"
    assert len({len(line) for line in lines[:5]}) == 1


def test_a_run_is_restored_and_its_table_json_and_drawing_are_written(
    run: Restored, found: Frontier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib", reason="extra `plot` is not installed")
    record = Record(RUN, run.tokenizer.fingerprint, "questions")
    run_record.write_config(tmp_path, record)
    with Checkpoints(str(tmp_path), keep=1, record=record) as checkpoints:
        checkpoints.save(TrainState(jnp.array(5), run.params, {"count": jnp.array(5)}))
    again = restore.restore(str(tmp_path), mesh=run.mesh)
    assert again.kind == "questions"
    output = tmp_path / "out.json"
    think.run(InferConfig(workdir=str(tmp_path), mode="think", output=str(output)), again)
    shown, values = capsys.readouterr().out, json.loads(output.read_text())
    assert shown.startswith(f"{tmp_path}, step 5: 24 validation questions\n")
    assert think_depth.table(found) in shown
    assert values["step"] == 5
    np.testing.assert_allclose(values["accuracy"], found.accuracy)
    assert values["trained_steps"] == [2, 3]
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_a_frontier_with_holes_is_drawn_and_is_json(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="extra `plot` is not installed")
    path = restore.epath.Path(tmp_path) / "a.png"
    assert think_depth.draw(by_hand(30), path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert think_depth.report.finite(by_hand(5)._asdict())["accuracy"][2][3] is None


def test_what_it_cannot_do_is_refused(run: Restored):
    asked = InferConfig(workdir="runs/a", mode="think", data={"source": "b"})
    with pytest.raises(ValueError, match=r"--data.source is for text; runs/a draws its questions"):
        think.check(asked, run)
    with pytest.raises(ValueError, match="a run on reasoning questions predicts no text"):
        _ = run.language_model
    wrong = dataclasses.replace(asked, mode="evaluate")
    with pytest.raises(ValueError, match="runs/a is a run on reasoning questions: give --mode=th"):
        think.run(wrong, run)
