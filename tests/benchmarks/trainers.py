"""Runs of `python -m jaxlib_methods.train` in processes of their own, for the scripts beside it."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE_SECS = 900.0
Lines = dict[int, dict[str, Any]]  # step -> what metrics.jsonl says of it


class Trainers:
    """Starts one run after another, each of one process or of several.

    folder: of the standard errors and of the compiled programs, which all of them share.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(
        self, *arguments: str, count: int = 1, num_devices: int = 1, heartbeat_secs: int = 100
    ) -> list[subprocess.Popen[bytes]]:
        """`count` processes of one run with `num_devices` CPU devices in all."""
        common = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(num_devices // count),
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles sooner
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAXLIB_METHODS_HEARTBEAT_SECS": str(heartbeat_secs),
        }
        address = f"localhost:{_free_port()}"
        self._running = []
        for index in range(count):
            own = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            with (self._folder / f"stderr{index}").open("wb") as stderr:
                self._running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "jaxlib_methods.train", *arguments],
                        env=common | own if count > 1 else common,
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                    )
                )
        return self._running

    def run(self, *arguments: str, count: int = 1, num_devices: int = 1) -> None:
        """A run to its end. Raises RuntimeError where it fails."""
        for process in self.start(*arguments, count=count, num_devices=num_devices):
            if process.wait():
                self.kill()
                raise RuntimeError(f"{arguments} failed:\n{self.said()}")

    def said(self, index: int = 0) -> str:
        """The standard error of one process of the newest run."""
        return (self._folder / f"stderr{index}").read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that the newest run does. Raises RuntimeError where it ends first."""
        deadline = time.monotonic() + PATIENCE_SECS
        while not condition():
            if time.monotonic() > deadline or any(p.poll() is not None for p in self._running):
                raise RuntimeError(f"what was waited for did not come:\n{self.said()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def newest_step(workdir: pathlib.Path) -> int:
    """Step of the newest whole checkpoint, 0 without one."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def train_metrics(workdir: pathlib.Path) -> Lines:
    """Step -> its line of metrics.jsonl, of those that hold a training loss."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines) if "train/loss" in line}


def largest_difference(found: Lines, expected: Lines, name: str) -> float:
    """Of one metric, over all steps, relative to what is expected. Raises where steps differ."""
    if list(found) != list(expected):
        raise ValueError(f"steps {list(found)} and {list(expected)}")
    return max(abs(found[i][name] - expected[i][name]) / abs(expected[i][name]) for i in found)
