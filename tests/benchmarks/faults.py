"""What two processes of one run do when something goes wrong, many times over.

    python tests/benchmarks/faults.py --kills=20

One run of a tiny model on two processes of two devices, a checkpoint every third step, and a
heartbeat of ten seconds. Again and again one of the two, drawn at random, is killed at a random
time: the other must end by itself within a minute and say that another one died. Then a process
stands still for longer than the watchdog allows (the other must say so, and both go on), one
process takes the place of two, and two that of one. Last, all steps are compared with those of a
run that nothing happened to.
Fails where a start does not go on from the newest checkpoint, or a checkpoint or a step is lost;
prints a row for every start.
Goal: no loss differs by more than 1e-4 of it from that of the unbroken run.
"""

import pathlib
import random
import re
import signal
import subprocess
import tempfile
import time

import harness
import trainers
from absl import app, flags

KILLS = flags.DEFINE_integer("kills", 20, "Times that one of the two is killed.")
SECS = flags.DEFINE_float("most_secs", 3.0, "At most so long after a new checkpoint.")
SEED = flags.DEFINE_integer("seed", 0, "Of who is killed, and when.")

GOAL = 1e-4
HEARTBEAT_SECS = 10
BOUND_SECS = 60.0  # the heartbeat, and what a busy machine takes to notice
EVERY = 3
ARGUMENTS = (
    "--method=next_token",
    "--model.num_layers=1", "--model.embed_dim=32", "--model.num_heads=2", "--model.mlp_dim=64",
    "--model.max_length=32", "--model.compute_dtype=float32", "--data.sequence_length=32",
    "--data.batch_size=8", "--mesh.data=2", "--mesh.fsdp=2", "--train.log_every=1",
    "--train.eval_every=100000000", "--train.eval_batches=1", f"--checkpoint.every={EVERY}",
    "--optimizer.schedule=constant", "--optimizer.warmup_fraction=0",
)  # fmt: skip
COLUMNS = ("start", "what happened", "continued from", "newest saved", "the other's exit", "after")
Process = subprocess.Popen[bytes]


def require(holds: bool, what: str) -> None:
    """Raises RuntimeError where something does not hold."""
    if not holds:
        raise RuntimeError(what)


class Story:
    """One run through all its starts."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.workdir, self._folder = folder / "run", folder
        self.run = trainers.Trainers(folder)
        self._draw = random.Random(SEED.value)
        self.newest = self._starts = 0
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")

    def _start(self, *, count: int = 2, heartbeat_secs: int = HEARTBEAT_SECS) -> list[Process]:
        """Starts the run again and waits for a new checkpoint."""
        self._starts += 1
        running = self.run.start(
            *ARGUMENTS, "--train.num_steps=100000000", f"--workdir={self.workdir}",
            count=count, num_devices=4, heartbeat_secs=heartbeat_secs,
        )  # fmt: skip
        self._wait_for_save()
        return running

    def _wait_for_save(self) -> None:
        before = trainers.newest_step(self.workdir)
        self.run.until(lambda: trainers.newest_step(self.workdir) > before)

    def _row(self, what: str, ended: str, secs: float) -> None:
        """Checks what holds after every start, and prints it."""
        found = re.search(r"continuing from step (\d+)\n", self.run.said())
        continued, newest = int(found[1]) if found else 0, trainers.newest_step(self.workdir)
        require(continued == self.newest, f"not from step {self.newest}:\n{self.run.said()}")
        require(newest > self.newest, f"no step since {self.newest} is kept")
        self.newest = newest
        cells = (self._starts, what, continued, newest, ended, f"{secs:.1f} s")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    def kill(self) -> None:
        """Either of the two, at any time; the other must end by itself, not well, and say why."""
        pair = self._start()
        time.sleep(self._draw.uniform(0.0, SECS.value))
        victim = self._draw.randrange(2)
        other = pair[1 - victim]
        pair[victim].kill()
        started = time.monotonic()
        pair[victim].wait()
        try:
            other.wait(BOUND_SECS)
        except subprocess.TimeoutExpired as error:
            said = self.run.said(1 - victim)
            raise RuntimeError(f"waits for process {victim} for ever:\n{said}") from error
        secs, said = time.monotonic() - started, self.run.said(1 - victim)
        require("another task died" in said, f"does not say why it ends:\n{said}")
        require(other.returncode != 0, "ends as if all were well")
        self._row(f"process {victim} killed", str(other.returncode), secs)

    def stand_still(self) -> None:
        """Process 1 stops for longer than the watchdog allows; both go on and are stopped."""
        pair = self._start(heartbeat_secs=300)
        started = time.monotonic()
        pair[1].send_signal(signal.SIGSTOP)
        self.run.until(lambda: "where its threads stand" in self.run.said())
        secs = time.monotonic() - started
        pair[1].send_signal(signal.SIGCONT)
        self._wait_for_save()
        self._end(pair, "process 1 stood still, process 0 said so", secs)

    def change_count(self, count: int) -> None:
        """Other processes with the same devices, ended by SIGTERM to the last of them."""
        self._end(self._start(count=count), f"went on as {count}, SIGTERM to one", 0.0)

    def _end(self, running: list[Process], what: str, secs: float) -> None:
        running[-1].send_signal(signal.SIGTERM)
        ended = [process.wait(BOUND_SECS) for process in running]
        require(not any(ended), f"exit codes {ended}:\n{self.run.said()}")
        self._row(what, "0", secs)

    def unbroken(self) -> pathlib.Path:
        """The workdir of a pair that nothing happens to."""
        workdir = self._folder / "unbroken"
        self.run.run(
            *ARGUMENTS, f"--train.num_steps={self.newest}", f"--workdir={workdir}",
            count=2, num_devices=4,
        )  # fmt: skip
        return workdir


def main(argv: list[str]) -> None:
    """The story, and its end against that of the unbroken run."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        story = Story(pathlib.Path(folder))
        try:
            for _ in range(KILLS.value):
                story.kill()
            story.stand_still()
            story.change_count(1)
            story.change_count(2)
            expected = trainers.train_metrics(story.unbroken())
        finally:
            story.run.kill()
        found = trainers.train_metrics(story.workdir)
        require(list(found) == list(range(1, story.newest + 1)), "a step is missing, or too many")
        worst = trainers.largest_difference(found, expected, "train/loss")
    print(" | ".join(harness.provenance()))
    harness.check_goal(f"relative difference of {len(found)} losses", worst, limit=GOAL)


if __name__ == "__main__":
    app.run(main)
