"""Which processes join a run, and two of them that train, are killed, go on as one and as two."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxlib_methods.models import partitioning
from jaxlib_methods.train import distributed, flags
from jaxlib_methods.train.distributed import StopVote, process_arguments, stop_signal

ADDRESS = {
    "JAX_COORDINATOR_ADDRESS": "host0:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}

CASES = [
    ({}, None),
    (ADDRESS, {"coordinator_address": "host0:1234", "num_processes": 4, "process_id": 3}),
    (
        {"JAXLIB_METHODS_HOSTS": "host0, host1.local"},
        {"coordinator_address": "host0:8476", "num_processes": 2, "process_id": 1},
    ),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ({"SLURM_NTASKS": "2"}, None),  # inside an allocation, but not started by srun
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, {}),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, {}),
    (ADDRESS | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, {
        "coordinator_address": "host0:1234", "num_processes": 4, "process_id": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "expected"), CASES)
def test_arguments_from_the_environment(environment, expected):
    assert process_arguments(environment, hostname="host1.cluster") == expected


REFUSED = [
    ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "x"},
     "h:1 also needs JAX_NUM_PROCESSES and JAX_PROCESS_ID as a number"),
    (ADDRESS | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 must be below JAX_NUM_PROCESSES=4"),
    ({"JAXLIB_METHODS_HOSTS": "a,b"}, "a,b must name this host, host1.cluster, exactly once"),
    ({"JAXLIB_METHODS_HOSTS": "host1.a,host1.b"}, "exactly once"),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "message"), REFUSED)
def test_contradictions_are_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        process_arguments(environment, hostname="host1.cluster")


@pytest.mark.parametrize("name", ["HEARTBEAT", "JOIN"])
@pytest.mark.parametrize("secs", ["0", "soon", "-3"])
def test_a_heartbeat_and_a_wait_are_seconds(name, secs):
    with pytest.raises(ValueError, match=f"_{name}_SECS={secs} must be a number of seconds"):
        distributed.initialize({f"JAXLIB_METHODS_{name}_SECS": secs})


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("index", [0, 1])
def test_who_waits_for_others_says_so_and_ends(index, root):
    code = (
        "from jaxlib_methods.train import distributed, flags\n"
        "distributed._SAY_SECS = 1\n"
        "with flags.one_line_errors():\n"
        "    distributed.initialize()"
    )
    address = f"localhost:{free_port()}"
    own = {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
        "JAXLIB_METHODS_JOIN_SECS": "3",
    }
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert found.returncode == 1, found.stderr
    who = f"2 processes at {address}"
    waits = [line for line in found.stderr.splitlines() if line.startswith("waiting")]
    assert waits[0] == f"waiting for {who}, 0 s so far"
    assert len(waits) > 1
    assert f"error: waited 3 s for {who}, and not all have come; look why" in found.stderr
    assert "Traceback" not in found.stderr


def test_what_joining_raises_is_raised(monkeypatch, capfd):
    def refused(**settings):
        raise RuntimeError(f"after {settings['heartbeat_timeout_seconds']}")

    monkeypatch.setattr("jax.distributed.initialize", refused)
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "JAXLIB_METHODS_HEARTBEAT_SECS": "7"}
    with pytest.raises(RuntimeError, match="after 7"):
        distributed.initialize(slurm)


def test_the_signal_sets_an_event_and_is_given_back():
    def mine(*_):
        raise AssertionError("called while a run is under way")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with stop_signal() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wait(10)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_stops_with_130_and_once_more_ends_at_once():
    def body():
        with stop_signal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.wait(10)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            sys.exit(0)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        body()
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_left_alone_where_it_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signal():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_the_signal_is_left_alone():
    found = []

    def body():
        with stop_signal() as stop:
            found.append((stop.is_set(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_one_process_answers_for_itself_at_once():
    stop = threading.Event()
    vote = StopVote(partitioning.make_mesh(data=8), stop)
    assert not vote()
    stop.set()
    assert vote()


def test_several_processes_answer_one_call_later(monkeypatch):
    # With all devices here: what the answer is made of, without a second process.
    monkeypatch.setattr("jax.process_count", lambda: 2)
    stop = threading.Event()
    vote = StopVote(partitioning.make_mesh(data=2, fsdp=4), stop)
    assert not vote()
    stop.set()
    assert not vote()  # the flags of the call before
    assert vote()
    stop.clear()
    assert vote()
    assert not vote()


class Processes:
    """Trainers of one run, each with its devices."""

    def __init__(self, flagfile: Path, folder: Path, root: Path, cache: Path) -> None:
        self.flagfile, self.folder, self.root, self.cache = flagfile, folder, root, cache
        self.started: list[subprocess.Popen] = []

    def start(self, count: int, *arguments: str) -> list[subprocess.Popen]:
        port = free_port()
        running = []
        for index in range(count):
            own = {
                "PYTHONPATH": str(self.root),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(8 // count),
                "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            }
            if count > 1:
                own |= {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(index),
                    "JAXLIB_METHODS_HEARTBEAT_SECS": "10",
                }
            command = [sys.executable, "-m", "jaxlib_methods.train"]
            with (self.folder / f"stderr{index}").open("w") as stderr:
                running.append(
                    subprocess.Popen(
                        [*command, f"--flagfile={self.flagfile}", *arguments],
                        env=os.environ | own,
                        cwd=self.folder,
                        stderr=stderr,
                        stdout=subprocess.DEVNULL,
                    )
                )
        self.started += running
        return running

    def said(self, index: int) -> str:
        return (self.folder / f"stderr{index}").read_text()

    def until(self, condition, running) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline, self.said(0)
            assert all(process.poll() is None for process in running), self.said(0)
            time.sleep(0.02)


@pytest.fixture
def launcher(tmp_path, root, cache_folder):
    """A configuration to the `Processes` that train it; whatever still runs is killed."""
    made = []

    def launch(config):
        flagfile = tmp_path / "flags"
        flagfile.write_text(flags.to_flagfile(config))
        made.append(Processes(flagfile, tmp_path, root, cache_folder))
        return made[-1]

    yield launch
    for process in [process for found in made for process in found.started]:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def processes(tiny, tmp_path, launcher):
    return launcher(tiny(tmp_path / "run", num_steps=2000, batch_size=8, every=3, eval_every=2000,
                         schedule="constant", warmup_fraction=0.0, fsdp=4))  # fmt: skip


def test_two_processes_draw_the_depths_of_one(tiny, tmp_path, launcher, read_metrics):
    config = tiny(tmp_path / "pair", method="depth_recurrence", num_steps=5, batch_size=8, every=0,
                  eval_every=5, num_layers=3, recurrence=4, fsdp=4)  # fmt: skip
    processes = launcher(config)
    pair = processes.start(2)
    assert [process.wait(200) for process in pair] == [0, 0], processes.said(0)
    (tmp_path / "alone").mkdir()
    (alone,) = processes.start(1, f"--workdir={tmp_path / 'alone'}")
    assert alone.wait(200) == 0, processes.said(0)
    both, one = (
        [line for line in read_metrics(tmp_path / name) if "train/loss" in line]
        for name in ("pair", "alone")
    )
    depths = [line["train/iterations"] for line in both]
    assert depths == [line["train/iterations"] for line in one]
    assert len(set(depths)) > 1
    for joined, expected in zip(both, one, strict=True):
        assert joined["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)


def test_two_processes_are_stopped_killed_made_one_and_two_again(processes, tmp_path, read_metrics):
    folder = tmp_path / "run" / "checkpoints"

    def newest():
        return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)

    # One of them stands still for a while, then goes on. SIGTERM to it: both save the same step
    # and exit 0.
    pair = processes.start(2)
    processes.until(lambda: newest() >= 3, pair)
    pair[1].send_signal(signal.SIGSTOP)
    time.sleep(1)
    before_it = newest()
    pair[1].send_signal(signal.SIGCONT)
    processes.until(lambda: newest() > before_it + 3, pair)
    pair[1].send_signal(signal.SIGTERM)
    assert [process.wait(120) for process in pair] == [0, 0], processes.said(0)
    stopped = newest()
    assert f"stopped by a signal at step {stopped}, saved" in processes.said(0)
    assert processes.said(1).count("step ") == 0  # process 0 alone speaks
    # kill -9 to one of them, in the middle: the other does not wait for it for ever.
    pair = processes.start(2)
    processes.until(lambda: newest() > stopped + 3, pair)
    pair[1].kill()
    assert [process.wait(60) for process in pair] == [-signal.SIGABRT, -signal.SIGKILL]
    assert "another task died" in processes.said(0)
    assert "(stopped sending heartbeats):\n1\n" in processes.said(0)
    killed = newest()
    assert f"continuing from step {stopped}" in processes.said(0)
    before = {line["step"]: line for line in read_metrics(tmp_path / "run")}
    # One process with all eight devices goes on, then two again; the same text from the first step
    # comes to the same losses.
    (one,) = processes.start(1, f"--train.num_steps={killed + 1}")
    assert one.wait(200) == 0, processes.said(0)
    assert f"continuing from step {killed}" in processes.said(0)
    end = killed + 3
    pair = processes.start(2, f"--train.num_steps={end}")
    assert [process.wait(200) for process in pair] == [0, 0], processes.said(0)
    assert f"continuing from step {killed + 1}" in processes.said(0)
    joined = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert [line["step"] for line in joined] == list(range(1, end + 1))
    again = killed + 1
    if again in before:  # the killed pair had come that far
        assert joined[killed]["train/loss"] == pytest.approx(before[again]["train/loss"], rel=1e-5)
    (tmp_path / "alone").mkdir()
    workdir = f"--workdir={tmp_path / 'alone'}"
    (alone,) = processes.start(1, f"--train.num_steps={end}", "--checkpoint.every=0", workdir)
    assert alone.wait(200) == 0, processes.said(0)
    expected = [line for line in read_metrics(tmp_path / "alone") if "train/loss" in line]
    for one_line, other in zip(joined, expected, strict=True):
        for name in ("train/loss", "train/gradient_norm"):
            assert one_line[name] == pytest.approx(other[name], rel=1e-4), (other["step"], name)
