"""Does a run that lasts leak? Memory, descriptors, threads and files of one that is ended often.

    python tests/benchmarks/soak.py --minutes=30 --lives=3

A tiny preset trains with an evaluation every 200 steps and a checkpoint every 100. Each of its
lives is ended by SIGTERM or, in turn, by SIGKILL, and the next goes on from the newest checkpoint.
Sampled every two seconds from outside, into WORKDIR/samples.jsonl; slopes are least squares over a
life without its first two minutes. Fails where a life does not go on from what the one before had
saved, or where a line of metrics.jsonl is missing.
Goal: resident memory grows by less than 20 MiB an hour in the last life.
"""

import json
import os
import pathlib
import signal
import tempfile
import time
from typing import NamedTuple

import harness
import numpy as np
import trainers
from absl import app, flags

MINUTES = flags.DEFINE_float("minutes", 30.0, "Of all lives together.")
LIVES = flags.DEFINE_integer("lives", 3, "Processes, one after the other.", lower_bound=1)
PRESET = flags.DEFINE_string("preset", "transformer_tiny", "What is trained, of text.")
WORKDIR = flags.DEFINE_string("workdir", None, "A new folder; by default one that is removed.")

GOAL_MIB_PER_HOUR = 20.0
WARM_UP_SECS = 120.0
SAMPLE_SECS = 2.0
LOG_EVERY = 10
ARGUMENTS = (
    "--train.num_steps=100000000", f"--train.log_every={LOG_EVERY}", "--train.eval_every=200",
    "--train.eval_batches=4", "--checkpoint.every=100", "--checkpoint.keep=3",
    "--data.batch_size=2", "--data.sequence_length=32",  # many steps, evaluations and saves
    "--optimizer.schedule=constant", "--optimizer.warmup_fraction=0",
    "--optimizer.learning_rate=1e-4",
)  # fmt: skip


class Sample(NamedTuple):
    """What one process holds at one time."""

    secs: float  # since its first step
    resident: float  # MiB
    descriptors: float
    threads: float
    maps: float
    files: float  # below the workdir


def sample(pid: int, workdir: pathlib.Path, secs: float) -> Sample:
    """Reads /proc and counts the files of the workdir."""
    proc = pathlib.Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return Sample(
        secs,
        int(status["VmRSS"].split()[0]) / 1024,
        len(os.listdir(proc / "fd")),
        int(status["Threads"]),
        len((proc / "maps").read_text().splitlines()),
        sum(len(files) for _, _, files in os.walk(workdir)),
    )


def live(run: trainers.Trainers, workdir: pathlib.Path, secs: float, end: int) -> list[Sample]:
    """One process of the run, ended by the signal `end` after `secs`. Raises RuntimeError."""
    before = trainers.newest_step(workdir)
    (process,) = run.start(f"--preset={PRESET.value}", f"--workdir={workdir}", *ARGUMENTS)
    run.until(lambda: "first step done" in run.said())
    if before and f"continuing from step {before}\n" not in run.said():
        raise RuntimeError(f"it should go on from step {before}:\n{run.said()}")
    started, samples = time.monotonic(), []
    while (passed := time.monotonic() - started) < secs:
        if process.poll() is not None:
            raise RuntimeError(f"the run has ended:\n{run.said()}")
        samples.append(sample(process.pid, workdir, passed))
        with (workdir / "samples.jsonl").open("a") as file:
            file.write(json.dumps(samples[-1]._asdict()) + "\n")
        time.sleep(SAMPLE_SECS)
    process.send_signal(end)
    if process.wait() != (0 if end == signal.SIGTERM else -end):
        raise RuntimeError(f"exit code {process.returncode}:\n{run.said()}")
    if trainers.newest_step(workdir) <= before:
        raise RuntimeError(f"no checkpoint since step {before}:\n{run.said()}")
    return samples


def slopes(samples: list[Sample]) -> Sample:
    """What each number grows by in an hour, without the warm-up."""
    secs, *held = np.array(
        [s for s in samples if s.secs >= min(WARM_UP_SECS, samples[-1].secs / 2)]
    ).T
    return Sample(*[3600.0, *(float(np.polyfit(secs, values, 1)[0] * 3600) for values in held)])


def check_nothing_is_lost(workdir: pathlib.Path) -> None:
    """Raises RuntimeError where a line of metrics.jsonl is missing or stands there twice."""
    steps = list(trainers.train_metrics(workdir))
    expected = list(range(LOG_EVERY, steps[-1] // LOG_EVERY * LOG_EVERY + 1, LOG_EVERY))
    if [step for step in steps if step % LOG_EVERY == 0] != expected:
        raise RuntimeError(f"{workdir} lacks steps: {set(expected) - set(steps)}")


def main(_: list[str]) -> None:
    """Trains, samples, ends, goes on; prints a row for each life."""
    titles = ["life", "ended by", "to step", "minutes"]
    titles += [f"{name}: at the end, an hour" for name in ("MiB", *Sample._fields[2:])]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(WORKDIR.value or f"{folder}/run")
        run = trainers.Trainers(pathlib.Path(folder))
        try:
            for life in range(LIVES.value):
                end = signal.SIGKILL if (LIVES.value - life) % 2 == 0 else signal.SIGTERM
                samples = live(run, workdir, MINUTES.value * 60 / LIVES.value, end)
                growth, last = slopes(samples), samples[-1]
                row = [life + 1, end.name, trainers.newest_step(workdir), f"{last.secs / 60:.1f}"]
                pairs = zip(last[1:], growth[1:], strict=True)
                row += [f"{now:.0f}, {more:+.1f}" for now, more in pairs]
                print(f"| {' | '.join(map(str, row))} |", flush=True)
        finally:
            run.kill()
        check_nothing_is_lost(workdir)
    print(" | ".join(harness.provenance()))
    harness.check_goal("MiB an hour in the last life", growth.resident, limit=GOAL_MIB_PER_HOUR)


if __name__ == "__main__":
    app.run(main)
