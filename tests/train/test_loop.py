"""Whole tiny runs in this process: resuming, precedence, stopping, phases, what is left behind."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import next_token, registry
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.late_to_early import LateToEarlyConfig
from jaxlib_methods.models import huggingface
from jaxlib_methods.models.partitioning import make_mesh
from jaxlib_methods.train import (
    checkpoint,
    data,
    lock,
    loop,
    metrics,
    prepare,
    presets,
    report,
    run_record,
    watch,
)
from jaxlib_methods.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("compile_once", "one_device")
MESH = make_mesh(devices=jax.devices()[:1])
TEACHER_WIDTH = 24


class StopAfter(threading.Event):
    """Is set when it has been asked `steps` times: a signal that comes during that step."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def is_set(self):
        self.left -= 1
        return self.left <= 0


def start(config, *, stop_after=None):
    """Starts a run, which goes on for `stop_after` steps or to its end."""
    prepared = loop.prepare(config)
    if stop_after is None:
        loop.train(prepared, stop=threading.Event(), started=0.0)
        return
    with pytest.raises(SystemExit) as stopped:
        loop.train(prepared, stop=StopAfter(stop_after), started=0.0)
    assert stopped.value.code == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder of this file."""
    return tmp_path_factory.mktemp("loop")


@pytest.fixture
def teacher(shared, tiny):
    """A finished teacher, trained once."""
    config = tiny(shared / "teacher", num_steps=4, embed_dim=TEACHER_WIDTH)
    start(config)
    return config.workdir


@pytest.fixture
def unbroken(shared, tiny):
    """A finished plain run of eight steps, trained once."""
    config = tiny(shared / "unbroken")
    start(config)
    return config


def let(teacher, **fields):
    return {
        "method": "late_to_early",
        "method_config": LateToEarlyConfig(teacher=str(teacher), weight=0.5, **fields),
    }


def params_of(workdir):
    return checkpoint.load_pretrained(str(workdir), mesh=MESH).params


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def steps_with(lines, name):
    return [line["step"] for line in lines if name in line]


@pytest.mark.parametrize("stops", [(3,), (4, 1), (1, 1, 2)])
def test_a_resumed_run_is_an_unbroken_one(unbroken, stops, tiny, tmp_path, read_metrics):
    config = tiny(tmp_path)
    for steps in stops:
        start(config, stop_after=steps)
    start(config)
    lines = read_metrics(tmp_path)
    assert lines == read_metrics(Path(unbroken.workdir))
    assert steps_with(lines, "train/loss") == list(range(1, 9))
    assert steps_with(lines, "validation/loss") == [4, 8]
    assert_same(params_of(tmp_path), params_of(unbroken.workdir))


@pytest.mark.parametrize("stops", [(2,), (4,), (5,)])  # in the ramp, at its end, behind it
def test_late_to_early_resumes_anywhere(teacher, stops, tiny, shared, tmp_path, read_metrics):
    whole = shared / "late_to_early"
    start(tiny(whole, **let(teacher)))
    config = tiny(tmp_path, **let(teacher))
    for steps in stops:
        start(config, stop_after=steps)
    start(config)
    lines = read_metrics(tmp_path)
    assert lines == read_metrics(whole)
    weights = {line["step"]: line["train/alignment_weight"] for line in lines
               if "train/alignment_weight" in line}  # fmt: skip
    # Step n of the file is optimiser step n - 1: 0.5 (4 - s) / 4, then no teacher.
    assert weights == pytest.approx({1: 0.5, 2: 0.375, 3: 0.25, 4: 0.125})
    assert_same(params_of(tmp_path), params_of(whole))


def test_after_the_stop_step_the_teacher_has_left_the_device(teacher, tiny, tmp_path, monkeypatch):
    alive = {}
    evaluate = loop._Loop._evaluate
    others = jax.live_arrays()  # of earlier tests; held, so that no new array takes an old one's id

    def watched(self, state, step):
        known = {id(x) for x in others}
        arrays = [x for x in jax.live_arrays() if TEACHER_WIDTH in x.shape and id(x) not in known]
        alive[step] = len(arrays)
        evaluate(self, state, step)

    monkeypatch.setattr(loop._Loop, "_evaluate", watched)
    start(tiny(tmp_path, eval_every=1, num_steps=4, **let(teacher, stop_step=2)))
    assert alive[1] == alive[2] > 0
    assert alive[3] == alive[4] == 0


def test_a_hugging_face_folder_teaches_like_the_run_it_came_from(
    teacher, tiny, shared, tmp_path, read_metrics
):
    whole = shared / "late_to_early"
    start(tiny(whole, **let(teacher)))
    found = checkpoint.load_pretrained(teacher, mesh=MESH)
    folder = tmp_path / "folder"
    huggingface.save_params(folder, found.params, found.config)
    start(tiny(tmp_path / "run", **let(folder)))
    assert read_metrics(tmp_path / "run") == read_metrics(whole)


def test_a_longer_run_keeps_its_stop_step(teacher, tiny, tmp_path):
    start(tiny(tmp_path, num_steps=4, **let(teacher)))
    with pytest.raises(ValueError, match="at step 2, this run at 4"):
        loop.prepare(tiny(tmp_path, num_steps=8, **let(teacher)))


def test_learned_resize_resumes_and_is_left_out_of_the_model(teacher, tiny, tmp_path, read_metrics):
    fields = let(teacher, resize="learned_linear")
    start(tiny(tmp_path / "whole", num_steps=6, **fields))
    config = tiny(tmp_path / "broken", num_steps=6, **fields)
    start(config, stop_after=2)
    start(config)
    assert read_metrics(tmp_path / "broken") == read_metrics(tmp_path / "whole")
    assert "alignment" not in params_of(tmp_path / "whole")
    # Given weights have no such leaf: it is made new.
    given = tiny(tmp_path / "given", num_steps=2, init_from=str(tmp_path / "whole"), **fields)
    start(given)


def latest(workdir):
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_own_run_beats_given_run_beats_given_weights_beats_new(
    unbroken, tiny, tmp_path, capfd, read_metrics
):
    other = tmp_path / "other"
    start(tiny(other, num_steps=10), stop_after=5)
    both = {"restore_from": str(other), "init_from": unbroken.workdir}
    own = tiny(tmp_path / "own", num_steps=8, **both)
    capfd.readouterr()

    def said(config, **options):
        start(config, **options)
        return [line for line in capfd.readouterr().err.splitlines() if line.startswith(("c", "st"))
                and not line.startswith("step")]  # fmt: skip

    assert said(own, stop_after=1) == [f"continuing {other} from step 5",
                                       "stopped by a signal at step 6, saved; the same command "
                                       "goes on"]  # fmt: skip
    assert said(own) == ["continuing from step 6"]
    weights = tiny(tmp_path / "weights", num_steps=1, init_from=unbroken.workdir)
    assert said(weights) == [f"starting from the weights in {unbroken.workdir}"]
    assert said(tiny(tmp_path / "new", num_steps=1)) == []
    # The given run is continued as it would have gone on; given weights begin where it ended.
    first = {name: read_metrics(tmp_path / name)[0] for name in ("own", "weights", "new")}
    assert [line["step"] for line in first.values()] == [6, 1, 1]
    assert first["weights"]["train/loss"] < first["new"]["train/loss"] - 0.05
    assert latest(tmp_path / "own") == 8
    assert latest(other) == 5


def test_a_finished_run_given_is_refused(unbroken, tiny, tmp_path):
    config = tiny(tmp_path / "w", restore_from=unbroken.workdir)
    with pytest.raises(ValueError, match=r"is at step 8, train\.num_steps=8 leaves nothing"):
        start(config)


def test_given_runs_and_weights_are_checked_first(unbroken, tiny, tmp_path):
    refused = [
        ({"restore_from": str(tmp_path)}, FileNotFoundError, "holds no run with a checkpoint"),
        (
            {"restore_from": unbroken.workdir, "seed": 1},
            ValueError,
            "with seed=0, .* give another --checkpoint.restore_from, or the same value",
        ),
        ({"init_from": unbroken.workdir, "mlp_dim": 8}, ValueError, r"model\.mlp_dim=32"),
    ]
    for fields, kind, message in refused:
        with pytest.raises(kind, match=message):
            prepare.prepare(tiny(tmp_path / "w", **fields))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.usefixtures("interrupts")
def test_a_signal_saves_and_ends_the_run(number, status, tiny, tmp_path, monkeypatch, capfd):
    kill_at = 3
    add = metrics.Accumulator.add

    def signalled(self, step, values):
        if step == kill_at:
            os.kill(os.getpid(), number)
        add(self, step, values)

    monkeypatch.setattr(metrics.Accumulator, "add", signalled)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        loop.run(tiny(tmp_path, every=0))
    assert stopped.value.code == status
    assert latest(tmp_path) == 3
    assert "stopped by a signal at step 3, saved" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_run_that_never_saved_claims_nothing(tiny, tmp_path, capfd, read_metrics):
    start(tiny(tmp_path / "other", num_steps=8), stop_after=4)
    config = tiny(tmp_path / "run", num_steps=3, every=0)
    start(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had been killed before its end
    start(tiny(tmp_path / "run", num_steps=6, restore_from=str(tmp_path / "other")))
    assert "saved nothing; its metrics go" in capfd.readouterr().err
    lines = read_metrics(tmp_path / "run")
    assert steps_with(lines, "train/loss") == [5, 6]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    start(tiny(tmp_path / "run", num_steps=2, seed=1))
    assert steps_with(read_metrics(tmp_path / "run"), "train/loss") == [1, 2]
    with pytest.raises(ValueError, match="belongs to a run with seed=1"):
        loop.prepare(config)


def times(workdir):
    """The lines that say where the time went, one for each start."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "time/total_secs" in line]


def test_where_the_time_went_is_written_by_each_start(tiny, tmp_path, monkeypatch):
    def wait(self):
        time.sleep(0.25)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait)
    started = time.perf_counter()
    for stop_after in (3, None):
        prepared = loop.prepare(tiny(tmp_path, every=0))
        stop = StopAfter(stop_after) if stop_after else threading.Event()
        with contextlib.suppress(SystemExit):
            loop.train(prepared, stop=stop, started=time.perf_counter())
    assert [line["step"] for line in times(tmp_path)] == [3, 8]
    for line in times(tmp_path):
        parts = ("start", "compile", "input", "evaluation", "checkpoint", "steps")
        secs = {part: line.get(f"time/{part}_secs", 0.0) for part in parts}
        assert min(secs.values()) >= 0
        assert sum(secs.values()) == pytest.approx(line["time/total_secs"])
        assert line["time/total_secs"] < time.perf_counter() - started
        assert line["time/goodput"] == pytest.approx(secs["steps"] / line["time/total_secs"])
        assert secs["checkpoint"] >= 0.25
        assert min(secs["start"], secs["compile"], secs["input"]) > 0
    assert "time/evaluation_secs" in times(tmp_path)[1]


@pytest.mark.parametrize("busy", [True, False])
def test_a_wait_for_input_counts_where_nothing_else_goes_on(
    tiny, tmp_path, monkeypatch, busy: bool
):
    make = data.device_batches

    def slowly(*arguments, **settings):
        for batch in make(*arguments, **settings):
            time.sleep(0.1)
            yield batch

    monkeypatch.setattr(data, "device_batches", slowly)
    monkeypatch.setattr(type(jnp.zeros(())), "is_ready", lambda self: not busy)
    prepared = loop.prepare(tiny(tmp_path, every=0))
    loop.train(prepared, stop=threading.Event(), started=time.perf_counter())
    waited = times(tmp_path)[0].get("time/input_secs", 0.0)
    assert waited == 0 if busy else waited >= 8 * 0.1


def test_steps_that_are_done_again_are_lost_time(tiny, tmp_path, read_metrics):
    start(tiny(tmp_path, every=2), stop_after=4)
    recorded = report.seconds_so_far(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "4")  # as if the process had died before it
    start(tiny(tmp_path, every=2))
    assert len(times(tmp_path)) == 1  # the line of the first start went with its last steps
    first, second = starts(tmp_path)
    lost = times(tmp_path)[0]["time/lost_secs"]
    assert lost == second["lost_secs"]
    assert 0 < lost - first["start_secs"] - first["compile_secs"] < recorded
    assert steps_with(read_metrics(tmp_path), "train/loss") == list(range(1, 9))


def starts(workdir):
    """What each start has cost."""
    return [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]


class KillAfter(StopAfter):
    """Ends the run where it stands, with nothing saved, when it has been asked `steps` times."""

    def is_set(self):
        if super().is_set():
            raise OSError("killed")
        return False


def test_the_time_of_every_killed_start_is_lost(unbroken, tiny, tmp_path, read_metrics):
    config = tiny(tmp_path, every=0)
    recorded = []
    for steps in (5, 3):
        prepared = loop.prepare(config)
        with pytest.raises(OSError, match="killed"):
            loop.train(prepared, stop=KillAfter(steps), started=time.perf_counter())
        recorded.append(report.seconds_so_far(tmp_path))
    loop.train(loop.prepare(config), stop=threading.Event(), started=time.perf_counter())
    first, second, last = starts(tmp_path)
    assert min(recorded) > min(first["compile_secs"], second["compile_secs"]) > 0
    assert first["lost_secs"] == 0
    assert second["lost_secs"] == pytest.approx(first["start_secs"] + recorded[0])
    assert last["lost_secs"] == pytest.approx(
        second["lost_secs"] + second["start_secs"] + recorded[1]
    )
    assert times(tmp_path)[0]["time/lost_secs"] == last["lost_secs"]
    assert read_metrics(tmp_path) == read_metrics(Path(unbroken.workdir))


def test_compilation_and_evaluation_are_watched(tiny, tmp_path, monkeypatch, capfd):
    for name, secs in (("LEAST_SECS", 0.1), ("COMPILE_SECS", 0.0), ("_CHECK_SECS", 0.01)):
        monkeypatch.setattr(watch, name, secs)
    drain = metrics.Accumulator.drain

    def slowly(self):
        time.sleep(0.5 if self._prefix == "validation" else 0.0)
        drain(self)

    def batches(*arguments, make=data.device_batches, **settings):
        time.sleep(0.5)
        yield from make(*arguments, **settings)

    monkeypatch.setattr(metrics.Accumulator, "drain", slowly)
    monkeypatch.setattr(data, "device_batches", batches)
    start(tiny(tmp_path, num_steps=3, every=0, stall_factor=1e-6))
    said = capfd.readouterr().err
    assert "process 0: step 1 with its compilation has taken 0 s; where its threads" in said
    assert "process 0: an evaluation has held up the run for 0 s; where its threads" in said


def test_one_workdir_has_one_run(tiny, tmp_path):
    with lock.hold(tmp_path), pytest.raises(ValueError, match=f"{tmp_path} is in use by process"):
        loop.run(tiny(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE_NAME]


def test_the_folder_of_each_part_has_one_run(teacher, tiny, tmp_path):
    config = tiny(tmp_path, compare=True, **let(teacher))
    message = f"{tmp_path}/baseline is in use by process"
    with lock.hold(tmp_path / "baseline"), pytest.raises(ValueError, match=message):
        loop.run(config)
    assert not (tmp_path / "config.json").exists()


def test_a_run_that_came_first_while_another_waited_is_left_alone(tiny, tmp_path, monkeypatch):
    def wait():
        start(tiny(tmp_path, seed=7, num_steps=2))

    monkeypatch.setattr(loop.distributed, "initialize", wait)
    with pytest.raises(ValueError, match="belongs to a run with seed=7, this run has seed=0"):
        loop.run(tiny(tmp_path))
    assert latest(tmp_path) == 2


def test_a_value_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch):
    def make(cfg, context):
        method = next_token.make(cfg, context)

        def loss(params, extra, batch, *, step, key):
            scalar, values = method.loss(params, extra, batch, step=step, key=key)
            bad = jnp.where(step == 4, jnp.nan, 1.0)  # the fifth step
            return scalar * bad, values | {"loss": (values["loss"][0] * bad, values["loss"][1])}

        return dataclasses.replace(method, loss=loss)

    monkeypatch.setitem(
        registry.METHODS, "next_token", registry.Entry(next_token.NextTokenConfig, make)
    )
    message = r"train/(loss|gradient_norm) is nan at step 5; .* the last good checkpoint is kept"
    with pytest.raises(metrics.NonFiniteError, match=message):
        start(tiny(tmp_path, every=1, keep=9, eval_every=8))
    assert latest(tmp_path) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params_of(tmp_path)))


def test_when_it_saves_and_evaluates(tiny, tmp_path, read_metrics):
    config = tiny(tmp_path, num_steps=5, every=0, eval_every=2, log_every=2, keep=9)
    start(config)
    assert os.listdir(tmp_path / "checkpoints") == ["5"]
    lines = read_metrics(tmp_path)
    assert steps_with(lines, "validation/loss") == [2, 4, 5]
    assert steps_with(lines, "train/loss") == [2, 4, 5]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=6))
    start(longer)
    assert steps_with(read_metrics(tmp_path), "validation/loss") == [2, 4, 5, 6]
    assert json.loads((tmp_path / "config.json").read_text())["run"]["train"]["num_steps"] == 6


def test_a_finished_run_is_left_alone(unbroken, tiny, shared, read_metrics, monkeypatch):
    monkeypatch.setattr(loop, "_Loop", None)
    before = (shared / "unbroken" / "metrics.jsonl").read_bytes()
    start(tiny(shared / "unbroken"))
    assert (shared / "unbroken" / "metrics.jsonl").read_bytes() == before


def test_teacher_first_then_student_then_baseline(tiny, tmp_path, monkeypatch, capfd, read_metrics):
    base = tiny(tmp_path / "x", num_steps=2, embed_dim=TEACHER_WIDTH, max_length=8,
                sequence_length=8)  # fmt: skip
    preset = dataclasses.replace(presets.PRESETS["transformer_tiny"], config=base)
    monkeypatch.setitem(presets.PRESETS, "small_teacher", preset)
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path / "run", num_steps=4, compare=True, seed=3, vocab_size=257,
                  **let("preset:small_teacher"))  # fmt: skip
    loop.run(config)
    out = capfd.readouterr()
    rows = [line.split()[0] for line in out.out.splitlines()]
    assert rows[:4] == ["run", "teacher", "late_to_early", "baseline"]
    assert any(line.startswith("late_to_early ") and "baseline's final" in line
               for line in out.out.splitlines())  # fmt: skip
    # The teacher reads the student's tokens, whatever its preset says.
    record = run_record.read_record(tmp_path / "run" / "teacher")
    assert record is not None
    assert record.config.model.vocab_size == 257
    assert record.config.model.max_length == 16
    assert (record.config.data, record.config.seed) == (config.data, 3)
    # Same data and first parameters: the first loss of student and baseline is one number.
    student, plain = (read_metrics(tmp_path / name)[0] for name in ("run", "run/baseline"))
    assert student["train/loss"] == plain["train/loss"]
    assert "train/alignment" not in plain
    # A second start, by another spelling of the same folder, trains nothing again.
    files = {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")}
    again = dataclasses.replace(config, workdir="run")
    loop.run(again)
    assert "first step done" not in capfd.readouterr().err
    assert {path: path.read_bytes() for path in files} == files
    assert len(files) == 3


def test_a_run_begins_with_a_preset_that_is_trained_first(tiny, tmp_path, monkeypatch):
    first = presets.PRESETS["transformer_tiny"]
    for name, steps, start_ in (("first", 3, None), ("second", 2, "preset:first")):
        base = tiny(tmp_path / "x", num_steps=steps, batch_size=8, init_from=start_, num_layers=1)
        monkeypatch.setitem(presets.PRESETS, name, dataclasses.replace(first, config=base))
    config = tiny(
        tmp_path / "run", num_steps=1, init_from="preset:second", compare=True, learning_rate=1e-7,
        method="late_to_early", method_config=LateToEarlyConfig(weight=0.0),
    )  # fmt: skip
    planned = prepare.plan(config)
    assert list(planned) == ["start/start", "start", config.method, "baseline"]
    assert [run.model for run in planned.values()] == [config.model] * 4
    assert planned["start"].data == dataclasses.replace(config.data, batch_size=8)
    loop.run(config)
    found = {
        name: checkpoint.load_pretrained(str(tmp_path / "run" / name), mesh=MESH).params
        for name in ("start/start", "start", ".", "baseline")
    }
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, found["start"], found["."])  # at such a rate nothing moves
    jax.tree.map(close, found["start"], found["baseline"])
    with pytest.raises(AssertionError):
        jax.tree.map(close, found["start/start"], found["start"])
    assert not (tmp_path / "run" / "baseline" / "start").exists()


def test_what_cannot_be_is_known_before_the_teacher_is_trained(tiny, tmp_path):
    teacher = let("preset:transformer_tiny")
    for fields, message in (
        ({"vocab_size": 200}, "has ids up to 255"),
        ({"init_from": str(tmp_path)}, "holds no model"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            loop.run(tiny(tmp_path / "run", **teacher, **fields))
    assert not (tmp_path / "run" / "teacher" / "config.json").exists()
    with pytest.raises(ValueError, match="unknown preset 'nothing'"):
        loop.run(tiny(tmp_path / "run", **let("preset:nothing")))


def test_a_preset_of_another_model_is_refused_before_it_is_trained(tiny, tmp_path):
    given = [{"init_from": "preset:energy_tiny"}, let("preset:energy_image_tiny")]
    for fields in given:
        with pytest.raises(ValueError, match=r"of the method energy(_image)?, not a plain"):
            loop.run(tiny(tmp_path / "run", vocab_size=257, **fields))
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("folder", ["run", "run/baseline"])
def test_a_run_learns_from_none_that_is_not_there_before_it(folder: str, tiny, tmp_path):
    for fields in (
        let(tmp_path / folder),
        let("preset:transformer_tiny") | {"init_from": str(tmp_path / folder)},
        {"restore_from": str(tmp_path / folder), **let("preset:transformer_tiny")},
    ):
        with pytest.raises(FileNotFoundError, match=r"holds no (model|run with a checkpoint)"):
            loop.run(tiny(tmp_path / "run", compare=True, vocab_size=257, **fields))
    assert not list(tmp_path.rglob("config.json"))


def test_a_relative_workdir_is_enough(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(tiny("runs/one", num_steps=2, every=1))
    start(tiny("runs/two", num_steps=2, **let("runs/one")))
    assert len(os.listdir("runs/one/checkpoints")) == 2
    assert checkpoint.load_pretrained("runs/two", mesh=MESH).params


def test_a_baseline_is_not_compared_with_itself(tiny, tmp_path):
    with pytest.raises(ValueError, match="which this run is itself"):
        loop.run(tiny(tmp_path / "run", compare=True))
    assert not (tmp_path / "run").exists()


def test_profile_covers_its_window_and_no_other(tiny, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    taken = []
    step = loop._Loop._profile

    def counted(self, number, state):
        before = len(calls)
        step(self, number, state)
        taken.extend((number, *call) for call in calls[before:])

    monkeypatch.setattr(loop._Loop, "_profile", counted)
    config = tiny(tmp_path, num_steps=5, profile_start=1, profile_steps=2, every=0)
    start(config, stop_after=2)
    folder = str(tmp_path / "profile")
    assert taken == [(1, "start", folder)]
    taken.clear()
    start(config)  # goes on inside the window
    assert taken == [(2, "start", folder), (3, "stop")]
    taken.clear()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=6))
    start(longer)  # begins behind it
    assert taken == []
    past_the_end = TrainConfig(num_steps=7, profile_start=6, profile_steps=5, log_every=1)
    start(dataclasses.replace(config, train=past_the_end))
    assert taken == [(6, "start", folder), (7, "stop")]


def test_profile_writes_a_trace(tiny, tmp_path):
    start(tiny(tmp_path, num_steps=3, profile_start=1, profile_steps=1, every=0))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


# Energy-based training: a state of the method's own, its validation and its warnings.


def energy_run(**fields):
    values = {"num_steps": 2, "loss_steps": "last", "num_landscapes": 0, "noise": 1.0,
              "random_step_size": 2.0, "replay_size": 4, "update_rms": 10.0}  # fmt: skip
    return {"method": "energy", "method_config": EnergyConfig(**(values | fields))}


@pytest.fixture
def unbroken_energy(shared, tiny):
    """A finished energy run of four steps with a replay buffer, trained once."""
    config = tiny(shared / "energy", num_steps=4, batch_size=4, num_microbatches=2, **energy_run())
    start(config)
    return config


def test_a_replay_buffer_resumes_as_if_unbroken(unbroken_energy, tiny, tmp_path, read_metrics):
    config = dataclasses.replace(unbroken_energy, workdir=str(tmp_path))
    start(config, stop_after=3)
    start(config)
    lines = read_metrics(tmp_path)
    assert lines == read_metrics(Path(unbroken_energy.workdir))
    replayed = [line["train/replayed"] for line in lines if "train/replayed" in line]
    assert len(replayed) == 4
    assert replayed[0] > 0  # the second micro-batch goes on from the first
    assert min(replayed[1:]) > 0.3  # one row in three
    assert "validation/loss_step_2" in lines[-1]
    assert "validation/replayed" not in lines[-1]


def test_what_gives_a_replay_buffer_its_shape_cannot_change(unbroken_energy, tiny):
    def changed(**fields):
        values = {"num_steps": 4, "batch_size": 4, "num_microbatches": 2, **energy_run()} | fields
        loop.prepare(tiny(unbroken_energy.workdir, **values))

    changed(num_steps=6)
    with pytest.raises(ValueError, match=r"data\.batch_size=4, this run has data\.batch_size=8"):
        changed(batch_size=8)
    with pytest.raises(ValueError, match=r"energy\.replay_size=4, .*=8"):
        changed(**energy_run(replay_size=8))
    with pytest.raises(ValueError, match=r"train\.num_microbatches=2, .*=1"):
        changed(num_microbatches=1)


def test_an_energy_run_is_no_teacher_and_takes_no_plain_weights(
    unbroken_energy, unbroken, tiny, tmp_path
):
    with pytest.raises(ValueError, match="of the method energy, not a plain transformer"):
        loop.prepare(tiny(tmp_path, **let(unbroken_energy.workdir)))
    for weights in (unbroken.workdir, unbroken_energy.workdir):
        config = tiny(tmp_path, init_from=weights, batch_size=4, **energy_run())
        with pytest.raises(ValueError, match=r"checkpoint\.init_from.* energy"):
            loop.prepare(config)


def test_a_warning_is_said_once(tiny, tmp_path, capfd):
    # Its numbers are others at every step.
    far = energy_run(update_rms=1e6)
    start(tiny(tmp_path, num_steps=4, batch_size=4, num_microbatches=2, **far))
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert said[0].startswith("warning at step 1: the descent explodes: its updates have a root")
