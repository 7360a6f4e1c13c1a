"""What the documents say holds: the folder tree, the examples, the named files."""

import ast
import dataclasses
import doctest
import importlib
import math
import re
import shlex
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from absl import flags

from jaxlib_methods.infer import config as infer_config
from jaxlib_methods.models import partitioning
from jaxlib_methods.train import flags as train_flags
from jaxlib_methods.train.config import require_complete

Python = Callable[..., subprocess.CompletedProcess[str]]

FOLDERS = ("pallas_kernels", "models", "jaxlib_methods", "train", "infer")
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of every fenced block of a Markdown text."""
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def tree_files(block: str) -> set[str]:
    """Python files named in a folder tree; the first words of a line are its files.

    A line ending in / opens a folder, and what is indented deeper lies in it.
    """
    found = set()
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        text = line.lstrip(" │├└─|`+-\t")
        indent = len(line) - len(text)
        while folders and folders[-1][0] >= indent:
            folders.pop()
        inside = "".join(name for _, name in folders)
        for number, word in enumerate(text.replace(",", " ").split()):
            if word.endswith("/") and number == 0:
                folders.append((indent, word))
                inside += word
            elif word.endswith(".py"):
                found.add(inside + word)
            else:
                break
    return found


def test_tree_is_read_in_the_usual_spellings() -> None:
    plain = "models/  architectures\n  config.py, layers.py   sizes of x.py\njaxlib_methods/\n"
    plain += "    losses.py\n    tasks/\n        sorting.py   what\ntrain/\n  loop.py"
    expected = {"models/config.py", "models/layers.py", "jaxlib_methods/losses.py"}
    expected |= {"jaxlib_methods/tasks/sorting.py", "train/loop.py"}
    assert tree_files(plain) == expected
    boxes = "models/\n├── config.py\n└── layers.py\ntrain/\n└── loop.py  # the loop"
    assert tree_files(boxes) == {"models/config.py", "models/layers.py", "train/loop.py"}


def test_readme_lists_every_module(root: Path, modules: dict[str, Path]) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    trees = [block for _, block in blocks(text) if re.search(r"^\W*models/", block, re.MULTILINE)]
    assert len(trees) == 1, "README.md has one fenced block with the folder tree"
    listed = {
        name
        for name in tree_files(trees[0])
        if name.split("/")[0] in FOLDERS and not name.endswith("/__init__.py")
    }
    held = {str(path.relative_to(root)) for path in modules.values() if path.stem != "__init__"}
    assert not held - listed, "add these to the tree in README.md"
    assert not listed - held, "the tree in README.md names files that do not exist"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(root: Path, document: str) -> None:
    text = (root / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    assert not [target for target in targets if not (root / target).exists()]


def commands(block: str) -> Iterator[tuple[str, Any]]:
    """(train or infer, configuration) of every command of this library in a block."""
    for line in block.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"-m jaxlib_methods\.(\w+)([^&|;]*)", line):
            program, values = found[1], flags.FlagValues()
            package = {"train": train_flags, "infer": infer_config}[program]
            package.define(values)
            words = shlex.split(found[2].rstrip('" '), comments=True)
            train_flags.parse(["program", *words], values)
            read = train_flags.run_config if program == "train" else infer_config.from_flags
            yield program, read(values)


def test_documented_commands_have_the_flags_they_need(root: Path) -> None:
    seen = set()
    for document in DOCUMENTS:
        for language, block in blocks((root / document).read_text(encoding="utf-8")):
            for program, config in commands(block) if language in ("bash", "yaml") else ():
                seen.add(program)
                assert config.workdir
                if program == "train":
                    require_complete(config)
    assert seen == {"train", "infer"}


def test_slurm_s_mesh_takes_all_its_devices(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    [script] = [block for _, block in blocks(text) if "#SBATCH" in block]
    [(_, config)] = commands(script)
    gpus = math.prod(map(int, re.findall(r"--(?:nodes|gpus-per-node)=(\d+)", script)))
    devices = [mock.Mock(platform="cpu") for _ in range(gpus)]
    mesh = partitioning.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    rows = config.data.batch_size // config.train.num_microbatches
    assert rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


@pytest.fixture
def interrupted(tmp_path: Path) -> Callable[[str], tuple[int, list[str]]]:
    """Runs a shell script, in which only stand-ins can be called, and sends it SIGTERM.

    Gives its exit status and what the stand-ins said: a run saves and ends with 0 when it is told.
    """
    said, folder = tmp_path / "said", tmp_path / "bin"
    folder.mkdir()
    saying = f'say() {{ echo "$*" >> {said}; }}'
    running = f"""trap 'say saved; exit 0' TERM; echo $$ > {tmp_path}/run; say running
        while :; do sleep 0.05; done"""
    stand_ins = {
        "python": running,
        "srun": running,
        "scancel": f"kill $(cat {tmp_path}/run)",
        "scontrol": 'say "$*"',
    }
    for name, script in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\n{saying}\n{script}\n")
        (folder / name).chmod(0o755)

    def run(script: str) -> tuple[int, list[str]]:
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        process = subprocess.Popen(["bash", "-c", script], env=environment)
        while not said.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        return process.wait(timeout=30), said.read_text().splitlines()

    return run


def test_slurm_queues_a_run_again_that_has_saved(root: Path, interrupted: Any) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    [script] = [block for _, block in blocks(text) if "#SBATCH" in block]
    _, said = interrupted(script)
    assert said == ["running", "saved", "requeue 7"]


def test_a_pod_that_has_saved_does_not_count_as_done(root: Path, interrupted: Any) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    [manifest] = [block for language, block in blocks(text) if language == "yaml"]
    status, said = interrupted(textwrap.dedent(manifest.partition("- |\n")[2]))
    assert (status, said) == (143, ["running", "saved"])


def test_readme_examples_run(root: Path, python: Python) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    for language, block in blocks(text):
        if language == "python":
            result = python("-W", "error", "-c", block)
            assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_docstring_examples_run(trees: dict[str, ast.Module], modules: dict[str, Path]) -> None:
    with_examples = [name for name in trees if ">>>" in modules[name].read_text(encoding="utf-8")]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in with_examples}
    assert not [name for name, result in results.items() if result.failed]
    assert all(result.attempted for result in results.values())
