"""Real processes: wrong input in one line, a full disk, SIGTERM at any time, and twenty kills."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.huggingface import config_to_huggingface
from jaxlib_methods.train import checkpoint, entropies, flags, loop

NO_DEVICE = {"jax_platforms": "none_such"}  # whoever touches a device fails otherwise
KILLS = 20


class Trainer:
    """`python -m jaxlib_methods.train` in processes of their own; see forkserver.py."""

    def __init__(self, root: Path, cache: Path, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {
            "PYTHONPATH": str(root),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.server = subprocess.Popen(
            [sys.executable, str(root / "tests" / "train" / "forkserver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.count = 0

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments: str, config: dict[str, Any] | None = None) -> int:
        self.count += 1
        self.stderr = self.folder / f"stderr{self.count}"
        self.stderr.touch()
        return self._ask(
            {
                "arguments": arguments,
                "stdout": str(self.folder / "stdout"),
                "stderr": str(self.stderr),
                "config": config or {},
            }
        )

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def run(self, *arguments: str, config: dict[str, Any] | None = None) -> tuple[int, str]:
        code = self.wait(self.start(*arguments, config=config))
        return code, self.said()

    def said(self) -> str:
        """The standard error of the newest run."""
        return self.stderr.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that the newest run does."""
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)


@pytest.fixture(scope="module")
def trainer(
    root: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trainer]:
    found = Trainer(root, cache_folder, tmp_path_factory.mktemp("trainer"))
    yield found
    assert found.server.stdin is not None
    assert found.server.stdout is not None
    found.server.stdin.close()
    found.server.wait()
    found.server.stdout.close()


def write_flags(path: Path, config: Any) -> str:
    path.write_text(flags.to_flagfile(config))
    return f"--flagfile={path}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path, trainer: Trainer) -> Path:
    """The workdir of a finished run of two steps, and beside it `tiny.flags`, that run."""
    folder = tmp_path_factory.mktemp("finished")
    lines = f"""
        --method=next_token
        --model.num_layers=1 --model.embed_dim=16 --model.num_heads=2 --model.mlp_dim=32
        --model.max_length=16 --model.compute_dtype=float32
        --data.source={text} --data.sequence_length=16 --data.batch_size=2
        --train.num_steps=2 --train.eval_every=2 --train.log_every=1
    """
    (folder / "tiny.flags").write_text("\n".join(lines.split()))
    run = folder / "run"
    code, error = trainer.run(f"--flagfile={folder / 'tiny.flags'}", f"--workdir={run}")
    assert code == 0, error
    return run


def make_inputs(folder: Path) -> None:
    """Files and folders that no run should accept, each under the name of its case."""
    (folder / "empty.txt").touch()
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "file").write_text("not a folder")
    (folder / "one.txt").write_text("x")
    bare = folder / "bare"
    bare.mkdir()
    model = config_to_huggingface(
        dataclasses.replace(TransformerConfig(), mlp_dim=384, embed_dim=128)
    )
    (bare / "config.json").write_text(json.dumps(model))
    newer = folder / "newer"
    newer.mkdir()
    record = {"format": 99, "run": {}, "tokenizer": "", "corpus": ""}
    (newer / "config.json").write_text(json.dumps(record))
    (folder / "unanswered.jsonl").write_text('{"question": "1+1="}')
    foreign = entropies.Provenance(
        model="m", tokenizer="bytes", train="others", validation="others", sequence_length=16,
        num_train=1, num_validation=1, top_k=None,
    )  # fmt: skip
    entropies.write(str(folder / "foreign.array_record"), foreign, [np.zeros((2, 16))])


LET = "--method=late_to_early"
MIDTRAINING = "--method=reinforcement_midtraining"
# What is given beside the finished run's flags ({run}: its workdir, {bad}: the inputs above), and
# what the one line says. `device`: the devices must be counted to know it.
WRONG: list[tuple[str, list[str], str, bool]] = [
    ("unknown flag", ["--model.depth=3"], "unknown flag --model.depth", False),
    ("missing file", ["--data.source={bad}/none.txt"], "none.txt does not exist", False),
    ("empty file", ["--data.source={bad}/empty.txt"], "empty.txt is empty", False),
    ("binary file", ["--data.source={bad}/binary.jsonl"], "binary.jsonl:1 is not JSON", False),
    ("too little text", ["--data.source={bad}/one.txt"], "has 1 characters, too few", False),
    ("vocabulary", ["--model.vocab_size=100"], "give at least --model.vocab_size=256", False),
    ("workdir is a file", ["--workdir={bad}/file"], "file cannot be made", False),
    ("workdir below /proc", ["--workdir=/proc/none/run"], "/proc/none/run cannot be made", False),
    ("another run", ["--workdir={run}", "--seed=7"], "a run with seed=0, this run has", False),
    ("newer format", ["--workdir={bad}/newer"], "has format 99, this version reads up to", False),
    ("no run to restore", ["--checkpoint.restore_from={bad}"], "holds no run with a", False),
    (
        "weights of another architecture",
        ["--checkpoint.init_from={run}", "--model.num_heads=4"],
        "has model.num_heads=2, this run has 4",
        False,
    ),
    (
        "a thought without another to compare it with",
        [MIDTRAINING, "--reinforcement_midtraining.rollouts=1"],
        "rollouts=1: advantage=group compares",
        False,
    ),
    (
        "tiers in no order",
        [MIDTRAINING, "--reinforcement_midtraining.thresholds=1,0.5,2"],
        "must be three rising numbers",
        False,
    ),
    (
        "entropies of another text",
        [MIDTRAINING, "--reinforcement_midtraining.entropy={bad}/foreign.array_record"],
        "foreign.array_record belong to another corpus: the training text is others there",
        False,
    ),
    (
        "a question without its answer",
        [
            MIDTRAINING,
            "--reinforcement_midtraining.task=questions",
            "--reinforcement_midtraining.questions={bad}/unanswered.jsonl",
        ],
        "unanswered.jsonl:1 has no text in field 'answer'",
        False,
    ),
    ("no teacher", [LET], "late_to_early.teacher", False),
    ("teacher missing", [LET, "--late_to_early.teacher={bad}/none"], "holds no model", False),
    (
        "teacher without weights",
        [LET, "--late_to_early.teacher={bad}/bare"],
        "has neither model.safetensors nor model.safetensors.index.json",
        False,
    ),
    (
        "teacher's vocabulary",
        [LET, "--late_to_early.teacher={run}", "--model.vocab_size=300"],
        "the teacher's vocabulary has 256 tokens and the student's 300",
        False,
    ),
    ("mesh that cuts the batch", ["--mesh.fsdp=3"], "is not a multiple of mesh.fsdp=3", False),
    (
        "impossible mesh",
        ["--workdir={run}", "--mesh.fsdp=2", "--mesh.data=1", "--train.num_steps=9"],
        "does not fit 1 devices",
        True,
    ),
]


@pytest.mark.parametrize(("case", "given", "message", "device"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_input_is_one_line(
    case: str, given: list[str], message: str, device: bool,
    trainer: Trainer, finished: Path, tmp_path: Path,
) -> None:  # fmt: skip
    make_inputs(tmp_path)
    given = [g.format(run=finished, bad=tmp_path) for g in given]
    before = contents(tmp_path), contents(finished)
    base = f"--flagfile={finished.parent / 'tiny.flags'}"
    code, error = trainer.run(
        base, f"--workdir={tmp_path / 'new'}", *given, config={} if device else NO_DEVICE
    )
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert code == 1
    assert (contents(tmp_path), contents(finished)) == before, case


def test_another_tokenizer_than_the_teachers_is_one_line(
    trainer: Trainer, finished: Path, tmp_path: Path
) -> None:
    # A folder whose record says that it was trained on other tokens of the same number.
    teacher = tmp_path / "teacher"
    (teacher / "checkpoints" / "2").mkdir(parents=True)
    record = json.loads((finished / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(record | {"tokenizer": "others"}))
    code, error = trainer.run(
        f"--flagfile={finished.parent / 'tiny.flags'}", f"--workdir={tmp_path / 'new'}",
        LET, f"--late_to_early.teacher={teacher}", config=NO_DEVICE,
    )  # fmt: skip
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith("error: the teacher was trained with tokenizer others and the data")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_full_disk_is_one_line_and_keeps_what_was_there(
    trainer: Trainer, finished: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    try:
        arguments = (
            f"--flagfile={finished.parent / 'tiny.flags'}", f"--workdir={disk / 'run'}",
            "--train.num_steps=40", "--checkpoint.every=1", "--checkpoint.keep=50",
            "--train.log_every=40", "--train.eval_every=40",
        )  # fmt: skip
        code, error = trainer.run(*arguments)
        assert code == 1, error
        errors = [line for line in error.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, error
        assert "a checkpoint could not be written to" in errors[0]
        assert "No space left on device" in errors[0]
        assert "Traceback" not in error
        steps = [p.name for p in (disk / "run" / "checkpoints").iterdir() if p.name.isdigit()]
        last = max(map(int, steps))
        assert last >= 1
        # With room again the same command goes on from the newest that is whole.
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        code, error = trainer.run(*arguments)
        assert code == 0, error
        assert f"continuing from step {last}" in error
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_sigterm_saves_and_exits_0(trainer: Trainer, finished: Path, tmp_path: Path) -> None:
    arguments = (
        f"--flagfile={finished.parent / 'tiny.flags'}", f"--workdir={tmp_path}",
        "--train.num_steps=1000000", "--train.log_every=1000", "--checkpoint.every=0",
    )  # fmt: skip
    pid = trainer.start(*arguments)
    trainer.until(lambda: "first step done" in trainer.said())
    os.kill(pid, signal.SIGTERM)
    assert trainer.wait(pid) == 0, trainer.said()
    (saved,) = (tmp_path / "checkpoints").iterdir()
    said = trainer.said().splitlines()[-1]
    assert said == f"stopped by a signal at step {saved.name}, saved; the same command goes on"


def test_sigterm_during_a_save_leaves_two_whole_checkpoints(
    trainer: Trainer, finished: Path, tmp_path: Path
) -> None:
    arguments = (
        f"--flagfile={finished.parent / 'tiny.flags'}", f"--workdir={tmp_path}",
        "--train.log_every=1000", "--checkpoint.every=1", "--checkpoint.keep=2",
    )  # fmt: skip
    pid = trainer.start(*arguments, "--train.num_steps=1000000")

    def caught() -> bool:
        """Stops the process; whether it was in the middle of a save, else it goes on."""
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        names = [path.name for path in (tmp_path / "checkpoints").glob("*")]
        if any(not name.isdigit() for name in names) and any(name.isdigit() for name in names):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    trainer.until(lambda: "first step done" in trainer.said())
    trainer.until(caught)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    assert trainer.wait(pid) == 0, trainer.said()
    before, last = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert before == last - 1
    assert f"stopped by a signal at step {last}, saved" in trainer.said()
    code, error = trainer.run(*arguments, f"--train.num_steps={last + 1}")
    assert code == 0, error
    assert f"continuing from step {last}\n" in error


def test_a_second_run_in_a_workdir_is_refused(
    trainer: Trainer, finished: Path, tmp_path: Path
) -> None:
    base = (f"--flagfile={finished.parent / 'tiny.flags'}", f"--workdir={tmp_path}")
    first = trainer.start(*base, "--train.num_steps=1000000", "--train.log_every=1000")
    trainer.until(lambda: "first step done" in trainer.said())
    code, error = trainer.run(*base)
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: {tmp_path} is in use by process {first} on ")
    os.kill(first, signal.SIGTERM)
    assert trainer.wait(first) == 0


def test_a_damaged_checkpoint_is_one_line_and_can_be_moved_away(
    trainer: Trainer, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = run / "checkpoints" / "2" / "params" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:50])
    before = contents(run)
    arguments = (
        f"--flagfile={finished.parent / 'tiny.flags'}", f"--workdir={run}", "--train.num_steps=4",
    )  # fmt: skip
    code, error = trainer.run(*arguments)
    assert code == 1
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: the checkpoint {run}/checkpoints/2 cannot be read: ")
    assert line.endswith("move that folder elsewhere to go on from the start")
    assert contents(run) == before | {".lock": (run / ".lock").read_bytes()}
    (run / "checkpoints" / "2").rename(tmp_path / "2")
    code, error = trainer.run(*arguments)
    assert code == 0, error
    assert (run / "checkpoints" / "4").exists()


def test_killed_twenty_times_it_goes_on_to_the_same_end(
    trainer: Trainer, tiny: Callable[..., Any], tmp_path: Path,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    # A constant rate, so that a shorter run is the beginning of a longer one.
    config = tiny(
        tmp_path / "killed", num_steps=100_000, every=1, keep=2, eval_every=100_000,
        schedule="constant", warmup_fraction=0.0,
    )  # fmt: skip
    arguments = write_flags(tmp_path / "flags", config)
    folder = tmp_path / "killed" / "checkpoints"

    def names() -> list[str]:
        return [path.name for path in folder.glob("*")]

    def newest() -> int:
        return max((int(name) for name in names() if name.isdigit()), default=0)

    draw = random.Random(7)
    seen, during_a_save, went_on = 0, 0, set()
    for kill in range(KILLS):
        pid = trainer.start(arguments)
        if kill % 4:  # after a step or more, else anywhere from the first line on
            trainer.until(lambda before=seen: newest() > before)
        else:
            trainer.until(lambda: "training" in trainer.said())
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert trainer.wait(pid) == -signal.SIGKILL, trainer.said()
        assert "error" not in trainer.said().lower()
        assert "Traceback" not in trainer.said()
        found = [line for line in trainer.said().splitlines() if line.startswith("continuing")]
        assert found in ([], [f"continuing from step {seen}"])
        assert found or not seen or not kill % 4
        went_on.update(found)
        during_a_save += any(not name.isdigit() for name in names())
        assert newest() >= seen
        seen = newest()
    assert len(went_on) > KILLS / 2
    assert during_a_save, "no kill fell into a save"
    end = seen + 3
    final = f"--train.num_steps={end}"
    code, error = trainer.run(arguments, final)
    assert (code, f"continuing from step {seen}" in error) == (0, True), error
    code, error = trainer.run(
        arguments, final, f"--workdir={tmp_path / 'unbroken'}", "--checkpoint.every=0"
    )
    assert code == 0, error
    lines = read_metrics(tmp_path / "killed")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, end + 1))
    assert lines == read_metrics(tmp_path / "unbroken")
    mesh = loop.mesh_of(config.mesh)
    params = [
        checkpoint.load_pretrained(str(tmp_path / name), mesh=mesh).params
        for name in ("killed", "unbroken")
    ]
    for a, b in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_command_itself(finished: Path, root: Path, tmp_path: Path) -> None:
    """Once without the fork server: `python -m`, from an empty folder."""
    found = subprocess.run(
        [sys.executable, "-m", "jaxlib_methods.train", "--preset=nothing"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("error: unknown preset 'nothing'; choose one of [")
    assert found.stderr.count("\n") == 1
