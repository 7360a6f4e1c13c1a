"""What compiled steps hold and send, kept as golden text: every method, and presets on pods.

After a wanted change, write the golden texts again and read the difference:

    UPDATE_GOLDEN=1 pytest tests/train/test_pods.py

State, batch and FLOPs are equal anywhere. Collectives are equal where the compiler is the recorded
one, and temporaries nearly so; of another compiler both have bounds.
"""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags
from jax.sharding import AbstractMesh, AxisType

from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.late_to_early import LateToEarlyConfig
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import PUBLISHED
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train import compile_only, flags, presets
from jaxlib_methods.train.abstract import program_of
from jaxlib_methods.train.compile_report import Report
from jaxlib_methods.train.config import RunConfig

GOLDEN = Path(__file__).parent / "golden" / "pods"
STATE = ("parameters", "optimizer", "other_state", "frozen", "batch")

Lines = dict[str, list[str]]  # what a line is about -> its numbers


def lines_of(report: Report) -> Lines:
    """A report's numbers, without those of the chip and the day."""
    assert report.cost is not None
    packages = ["jax"] if report.topology.startswith("cpu") else ["jax", "libtpu"]
    found = {
        "compiler": [f"{name} {importlib.metadata.version(name)}" for name in packages],
        "mesh": [f"{axis} {size}" for axis, size in report.mesh.items()],
        "flops": [f"{count:.6g}" for count in (report.model_flops, report.executed_flops or 0)],
    }
    for name in (*STATE, "temporaries"):
        found[name] = [str(getattr(report.memory, name))]
    for (kind, axes), moved in sorted(report.cost.collectives.items()):
        found[f"{kind} over {axes}"] = [f"{moved.count:g}", f"{moved.num_bytes:.0f}"]
    return found


def collectives(lines: Lines) -> dict[str, tuple[float, ...]]:
    """Times and payload by kind and axes."""
    return {about: tuple(map(float, n)) for about, n in lines.items() if " over " in about}


def payloads(lines: Lines) -> dict[str, float]:
    """By axes alone: another compiler may gather by adding up."""
    found: dict[str, float] = {}
    for about, (_, payload) in collectives(lines).items():
        axes = about.split(" over ")[1]
        found[axes] = found.get(axes, 0.0) + payload
    return found


def compare(name: str, report: Report) -> None:
    """A report with its golden text; see this file's docstring."""
    path, found = GOLDEN / f"{name}.txt", lines_of(report)
    text = "".join(f"{about}: {', '.join(numbers)}\n" for about, numbers in found.items())
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    split = (line.split(": ") for line in path.read_text().splitlines())
    golden = {about: numbers.split(", ") for about, numbers in split}
    exact = ("mesh", "flops", *STATE)
    assert [found[about] for about in exact] == [golden[about] for about in exact], text
    temporaries = (float(lines["temporaries"][0]) for lines in (found, golden))
    assert next(temporaries) == pytest.approx(next(temporaries), rel=0.1), text
    if found["compiler"] == golden["compiler"]:
        assert collectives(found) == collectives(golden), text
    else:
        assert payloads(found) == pytest.approx(payloads(golden), rel=0.25), text


METHODS: dict[str, dict[str, Any]] = {
    "next_token": {"remat": "dots"},
    "late_to_early": {
        "method_config": LateToEarlyConfig(teacher="preset:late_to_early_tiny_teacher")
    },
    "depth_recurrence": {
        "method_config": DepthRecurrenceConfig(eval_steps=(1, 2)),
        "num_layers": 3,
        "recurrence": 4,
    },
    "energy": {"method_config": EnergyConfig(replay_size=16, loss_steps="last")},
    "reinforcement_midtraining": {
        "method_config": ReinforcementMidtrainingConfig(
            max_thought=3, budget=3, force_close=True, prompt_length=4, entropy="none.npz"
        ),
        "max_length": 96,
        "init_from": "preset:reinforcement_midtraining_tiny_base",
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_compiles_without_its_files(
    tiny: Callable[..., RunConfig], compile_once: None, tmp_path: Path, method: str
):
    fields = {"data": 2, "fsdp": 4, "batch_size": 16} | METHODS[method]
    config = tiny(tmp_path / "run", method=method, **fields)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source="", tokenizer="")
    )
    report = compile_only.analyse(config, compile_only.target_of("cpu:8"), evaluation=False)
    assert not (tmp_path / "run").exists()
    memory, cost = report.memory, report.cost
    assert cost is not None
    gathered = [axes for kind, axes in cost.collectives if kind == "all-gather"]
    assert "fsdp" in gathered
    assert memory.peak > memory.held > memory.parameters > 0
    assert memory.frozen > 0 if method == "late_to_early" else memory.frozen == 0
    assert report.model_flops > 0
    assert report.rematerialized == ()
    compare(f"cpu_{method}", report)


# Published widths, cut in depth, length and batch: name -> preset, topology and flags.
_CUT = "--model.num_layers=2 --data.sequence_length=256 --train.num_microbatches=1"
PODS = {
    "transformer_1b": ("transformer_1b", f"v5p:4x4x4 --mesh.data=4 --mesh.fsdp=16 {_CUT}"),
    # 32 columns a device: fewer than a tile has, gathered by adding up, at twice the bytes.
    "transformer_1b_narrow": ("transformer_1b", f"v5p:4x4x4 --mesh.fsdp=64 {_CUT}"),
    "late_to_early_7b": (
        "late_to_early_7b",
        f"v6e:8x8 --mesh.data=2 --mesh.fsdp=32 {_CUT} --late_to_early.teacher=llama_3p2_1b",
    ),
    "energy_large": (
        "energy_large",
        f"v6e:8x8 --mesh.data=8 --mesh.fsdp=8 {_CUT} --data.sequence_length=64",
    ),
    "depth_recurrence_3p5b": (
        "depth_recurrence_3p5b",
        f"v6e:8x8 --mesh.data=2 --mesh.fsdp=32 {_CUT} --model.num_layers=8",
    ),
    "reinforcement_midtraining_14b": (
        "reinforcement_midtraining_14b",
        f"v6e:8x8 --mesh.fsdp=8 --mesh.tensor=8 {_CUT} --reinforcement_midtraining.max_thought=254 "
        "--reinforcement_midtraining.budget=100 --reinforcement_midtraining.entropy=none.npz "
        "--checkpoint.init_from=none",
    ),
}


def configured(preset: str, arguments: str) -> tuple[RunConfig, str]:
    """A preset with flags, and the topology in front of them."""
    topology, *changes = arguments.split()
    values = absl_flags.FlagValues()
    flags.define(values)
    given = ["--compile_only", f"--topology={topology}", f"--preset={preset}", *changes]
    flags.parse(["train", *given], values)
    return flags.run_config(values), topology


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
@pytest.mark.parametrize("name", PODS)
def test_a_preset_on_a_pod(name: str):
    config, topology = configured(*PODS[name])
    target = compile_only.target_of(topology)
    report = compile_only.analyse(config, target, evaluation=False)
    assert report.rematerialized == ()
    compare(name, report)


@pytest.mark.parametrize("preset", [name for name, found in presets.PRESETS.items() if found.pods])
def test_what_a_preset_says_of_pods_cuts_its_rows_and_parameters(preset: str):
    found = presets.PRESETS[preset]
    for topology, changes in found.pods.items():
        config, _ = configured(preset, " ".join([topology, changes, *found.shapes]))
        chips = math.prod(map(int, topology.split(":")[1].split("x")))
        sizes = dataclasses.asdict(config.mesh)
        sizes = [sizes[name] for name in partitioning.MESH_AXES]
        sizes = [size if size > 0 else -chips // math.prod(sizes) for size in sizes]
        kinds = (AxisType.Auto,) * len(sizes)
        mesh: Any = AbstractMesh(tuple(sizes), partitioning.MESH_AXES, axis_types=kinds)
        assert mesh.size == chips
        program_of(config, mesh)


@pytest.mark.parametrize(
    "preset", [name for name, found in presets.PRESETS.items() if found.shapes]
)
def test_shapes_take_the_place_of_a_presets_files(preset: str):
    assert presets.PRESETS[preset].needs
    shapes = presets.PRESETS[preset].shapes
    assert {flag.split("=")[1] for flag in shapes} <= PUBLISHED.keys()
    config, _ = configured(preset, " ".join(["cpu:8", "--mesh.fsdp=8", *shapes]))
    program_of(config, partitioning.make_mesh(data=1, fsdp=8))


def test_golden_folder_holds_nothing_else():
    assert {path.stem for path in GOLDEN.iterdir()} == {*PODS, *(f"cpu_{name}" for name in METHODS)}
