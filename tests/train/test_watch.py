"""Seconds of a run's parts, and steps that take too long; on a clock that the tests set."""

import contextlib
import json
import threading
import time

import pytest

from jaxlib_methods.train.watch import Starts, Stopwatch, Watchdog


class Clock:
    """A clock that goes forward when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_parts_and_steps_make_up_the_whole():
    clock = Clock()
    watch = Stopwatch(90.0, clock=clock)
    watch.add("start", 10.0)
    for secs in (1.0, 3.0):
        with watch("evaluation"):
            clock.now += secs
        clock.now += 8.0
    for hidden, secs in ((False, 0.5), (True, 1.0)):
        with watch("input", hidden=lambda hidden=hidden: hidden):
            clock.now += secs
    with contextlib.suppress(OSError), watch("checkpoint"):
        clock.now += 2.0
        raise OSError
    assert watch.read() == {
        "time/start_secs": 10.0,
        "time/evaluation_secs": 4.0,
        "time/input_secs": 0.5,
        "time/checkpoint_secs": 2.0,
        "time/steps_secs": 17.0,
        "time/total_secs": 33.5,
        "time/goodput": pytest.approx(17.0 / 33.5),
    }


def test_what_starts_have_cost_is_kept_over_all_of_them(tmp_path):
    def start(step, again_secs):
        starts = Starts(tmp_path, step, start_secs=2.0, again_secs=again_secs)
        starts.first_step_done(compile_secs=5.0)
        return starts.lost_secs

    assert start(0, 0.0) == 0.0
    assert start(0, 11.0) == 2.0 + 11.0  # which holds the compilation: it saved nothing
    assert start(0, 0.0) == 13.0 + 2.0 + 5.0  # killed before anything was recorded
    assert start(40, 7.0) == 20.0 + 2.0 + 5.0 + 7.0
    lines = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 0, 40]
    assert json.loads(lines[-1]) == {
        "step": 40, "lost_secs": 34.0, "start_secs": 2.0, "compile_secs": 5.0
    }  # fmt: skip
    Starts(tmp_path, 40, start_secs=2.0, again_secs=0.0)  # killed before its first step
    assert start(40, 0.0) == 34.0 + 2.0 + 5.0 + 2.0


@pytest.mark.parametrize("damage", [b"", b"\xff", b'{"step": 3', b"[]\n", b'{"step": 0}\n7\n'])
def test_damaged_accounts_count_from_now_on(tmp_path, damage):
    (tmp_path / "starts.jsonl").write_bytes(damage)
    assert Starts(tmp_path, 4, start_secs=2.0, again_secs=3.0).lost_secs == 3.0
    assert Starts(tmp_path, 4, start_secs=2.0, again_secs=1.0).lost_secs == 3.0 + 2.0 + 1.0


def steps(dog, clock, *secs):
    for step, each in enumerate(secs, start=1):
        dog.step_begins(step)
        clock.now += each
        dog.step_done()
    dog.step_begins(len(secs) + 1)


def test_a_step_is_compared_with_the_median_once(capfd):
    clock = Clock()
    dog = Watchdog(10.0, clock=clock)
    assert not dog.check()  # nothing is known yet
    steps(dog, clock, 20.0, 8.0, 9.0)  # median 9
    clock.now += 90.0
    assert not dog.check()
    clock.now += 0.1
    assert dog.check()
    said = capfd.readouterr().err
    assert "process 0: step 4 has taken 90 s, the last ones took 9.00 s" in said
    main = said.split("where its threads stand:\n")[1].split("\n\n")[0]
    assert main.startswith("MainThread:\n")
    assert "test_a_step_is_compared_with_the_median_once" in main
    clock.now += 100.0
    assert not dog.check()
    dog.step_done()  # the next step is watched again, and the long one has not moved the median
    clock.now += 91.0
    assert dog.check()


def test_short_steps_have_a_minute():
    clock = Clock()
    dog = Watchdog(10.0, clock=clock)
    steps(dog, clock, 0.1, 0.1)
    clock.now += 60.0
    assert not dog.check()
    clock.now += 0.1
    assert dog.check()


def test_a_pause_is_no_step_and_the_first_one_after_it_is():
    clock = Clock()
    dog = Watchdog(10.0, clock=clock)
    steps(dog, clock, 1.0)
    dog.pause()
    clock.now += 1000.0
    assert not dog.check()
    dog.step_begins(3)
    clock.now += 60.0
    assert not dog.check()
    clock.now += 0.1
    assert dog.check()


def test_a_save_has_five_minutes_and_ends(capfd):
    clock = Clock()
    dog = Watchdog(10.0, clock=clock)
    steps(dog, clock, 1.0)
    with dog.saving():
        clock.now += 300.0
        assert not dog.check()
        clock.now += 1.0
        assert dog.check()
        assert not dog.check()
    said = capfd.readouterr().err
    assert said.startswith("process 0: a save has held up the run for 301 s; where its threads")
    assert "test_a_save_has_five_minutes_and_ends" in said
    with dog.saving():
        clock.now += 10.0
    clock.now += 1000.0  # neither a step nor a save
    assert not dog.check()


def test_a_first_step_and_the_one_behind_it_have_half_an_hour(capfd):
    clock = Clock()
    dog = Watchdog(10.0, clock=clock)
    for step, said in ((1, "step 1 with its compilation"), (2, "step 2")):
        dog.step_begins(step, compiles=step == 1)
        clock.now += 1860.0
        assert not dog.check()
        clock.now += 1.0
        assert dog.check()
        assert f"process 0: {said} has taken 1861 s; where" in capfd.readouterr().err
        dog.pause()


def test_another_program_is_compiled_beside_the_median():
    clock = Clock()
    dog = Watchdog(10.0, clock=clock)
    steps(dog, clock, 9.0, 9.0)
    dog.pause()
    dog.step_begins(3, compiles=True)
    clock.now += 1800.0
    assert not dog.check()
    dog.step_done()
    dog.step_begins(4)
    clock.now += 90.1  # compiling has not moved the median
    assert dog.check()


@pytest.mark.parametrize(("compiles", "most"), [(False, 270.0), (True, 2070.0)])
def test_an_evaluation_has_as_long_as_its_batches(compiles, most, capfd):
    clock = Clock()
    dog = Watchdog(10.0, clock=clock)
    steps(dog, clock, 9.0)
    with dog.evaluating(3, compiles=compiles):
        clock.now += most
        assert not dog.check()
        clock.now += 1.0
        assert dog.check()
        assert not dog.check()
    said = capfd.readouterr().err
    assert said.startswith(f"process 0: an evaluation has held up the run for {most + 1:.0f} s; ")


def test_a_thread_looks_and_ends_with_the_run(monkeypatch, capfd):
    monkeypatch.setattr("jaxlib_methods.train.watch._CHECK_SECS", 0.01)
    clock = Clock()
    with Watchdog(2.0, clock=clock) as dog:
        steps(dog, clock, 1.0)
        clock.now += 61.0
        deadline = time.monotonic() + 60
        said = ""
        while "step 2 has taken 61 s" not in said:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            said += capfd.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_zero_does_not_watch():
    with Watchdog(0.0):
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
