"""Compiling for machines that are not here: memory, refusals, advice and the search."""

import dataclasses
import importlib.util
import json
import os
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl import flags as absl_flags
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_methods.models import partitioning
from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train import (
    compile_only,
    compile_report,
    compile_search,
    flags,
    roofline,
    topology,
)
from jaxlib_methods.train.compile_report import Memory
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.roofline import GIB, Chip

AXES = {"slices": 1, "data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
MiB = 2**20


def test_a_device_has_its_share_of_a_chip():
    assert roofline.CHIPS["tpu7x"].share(2).flops == 1153.5e12
    assert roofline.CHIPS["tpu7x"].share(2).memory == 94.75 * GIB


def test_memory_by_hand(tiny: Callable[..., RunConfig], compile_once: None, tmp_path: Path):
    # 16 wide, 2 heads of 8, 32 hidden, 256 tokens: all matrices have a dimension of `embed`.
    config = tiny(tmp_path, data=2, fsdp=4, batch_size=16)
    memory = compile_only.analyse(config, compile_only.target_of("cpu:8"), evaluation=False).memory
    matrices = 2 * 256 * 16 + 4 * 16 * 16 + 3 * 16 * 32
    norms = 3 * 16
    assert memory.parameters == 4 * (matrices // 4 + norms)
    assert 0 <= memory.optimizer - 2 * memory.parameters <= 3 * 4  # and its counters
    assert (memory.other_state, memory.frozen, memory.limit) == (0, 0, None)
    assert memory.batch == 16 // 8 * 16 * (4 * 4 + 1)  # four fields of int32 and one of bool
    assert memory.missing == 0


def test_evaluation_holds_what_it_does_not_use(
    tiny: Callable[..., RunConfig], compile_once: None, tmp_path: Path
):
    config = tiny(tmp_path, data=8, batch_size=8)
    memory = compile_only.analyse(config, compile_only.target_of("cpu:8")).memory
    assert memory.evaluation > memory.held + memory.batch


def test_shapes_are_found_for_the_platform_that_is_compiled_for(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Models are traced for that: kernels asked for by name are known there, if not here."""

    class Seen(Exception):
        pass

    def program_of(*_: Any) -> None:
        raise Seen(dispatch.platform())

    monkeypatch.setattr(compile_only, "program_of", program_of)
    monkeypatch.setattr(partitioning, "make_mesh", lambda **_: None)
    device = types.SimpleNamespace(platform="tpu")
    with pytest.raises(Seen, match="tpu"):
        compile_only.analyse(tiny(tmp_path), compile_only.Target("v5e:1x1", [device], None))


def test_held_bytes_are_those_of_the_shards():
    mesh = partitioning.make_mesh(data=2, fsdp=4)
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    tree = {
        "w": jax.ShapeDtypeStruct((3, 8), jnp.bfloat16, sharding=cut),
        "count": jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(mesh)),
    }
    assert compile_only.held_bytes(tree) == 3 * 2 * 2 + 4


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (193.5G) exceeds available HBM (15.75G).",
            195.5,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. "
         "Exceeded hbm capacity by 4.50G.", 20.25),
        ("INTERNAL: something else", None),
    ],
)  # fmt: skip
def test_what_libtpu_says_of_a_program_too_large(message: str, gib: float | None):
    needed = compile_only.refused_bytes(message, held=2 * 2**30)
    assert needed == (None if gib is None else gib * GIB)


def test_what_does_not_fit_is_refused_with_what_helps(
    tiny: Callable[..., RunConfig],
    compile_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    small = Chip(flops=1e9, memory=40_000, bandwidth=1e9, links=1e9, network=1e9)
    devices = topology.devices_of("cpu:8")
    monkeypatch.setattr(
        compile_only,
        "target_of",
        lambda name, num_slices: compile_only.Target(name, devices, small),
    )
    config = tiny(tmp_path, data=8, batch_size=16)
    with pytest.raises(ValueError, match=r"more than its 0\.00; what helps: .*num_micro") as error:
        compile_only.run(config, "cpu:8", workdir=str(tmp_path / "out"))
    assert "--model.remat=dots" in str(error.value)
    assert "--mesh.data=1 --mesh.fsdp=8 --mesh.tensor=1 (" in str(error.value)
    printed = capsys.readouterr().out
    assert "mesh data 8" in printed
    assert "limited by" in printed
    written = json.loads((tmp_path / "out" / compile_only.FILE_NAME).read_text())
    assert written["memory"]["missing"] > 0
    assert written["cost"]["collectives"][0]["axes"] == ["data"]
    assert written["roofline"]["limit"] in roofline.Roofline._fields


def test_what_the_compiler_complains_of_is_a_defect(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    complaint = "Involuntary full rematerialization. It goes from {devices=[8]} to {devices=[4,2]}"

    def refused(*arguments: Any) -> tuple[None, int]:
        os.write(2, f"W0101 partitioner.cc:1] [SPMD] {complaint}\nanother line\n".encode())
        return None, 0

    monkeypatch.setattr(compile_only, "_compile", refused)
    config = tiny(tmp_path, data=2, fsdp=4, batch_size=16)
    report = compile_only.analyse(config, compile_only.target_of("cpu:8"), evaluation=False)
    assert report.rematerialized == (complaint,)
    assert f"defect: {complaint}\n" in compile_report.text(config, report)


def report_of(**changes: Any) -> compile_report.Report:
    fields = dict.fromkeys(Memory._fields, GIB) | {"limit": 16 * GIB, "evaluation": 0}
    memory = Memory(**{name: int(value) for name, value in (fields | changes).items()})
    return compile_report.Report(
        topology="v5e:4x4",
        mesh=AXES,
        memory=memory,
        model_flops=1.0,
        executed_flops=None,
        cost=None,
        roofline=None,
        peak_flops=None,
        rematerialized=(),
        seconds=1.0,
    )


def test_advice_goes_by_what_is_missing(tiny: Callable[..., RunConfig], tmp_path: Path):
    config = tiny(tmp_path, batch_size=64, num_microbatches=2, remat="dots")
    activations = report_of(temporaries=20 * GIB)
    assert activations.memory.missing == 9 * GIB
    assert compile_report.refusal(config, activations).startswith(
        "the training step needs 25.00 GiB on a device of v5e:4x4, 9.00 more than its 16.00; "
        "what helps: --train.num_microbatches=4 (fewer rows at once), --model.remat=full "
    )
    many = compile_report.refusal(config, report_of(temporaries=55 * GIB))
    assert "--train.num_microbatches=8 " in many  # it takes 10, 8 devices allow 8
    evaluation = compile_report.refusal(config, report_of(evaluation=17 * GIB))
    assert "the validation step needs 17.00 GiB" in evaluation
    assert "what helps: --train.num_microbatches=4 (fewer rows at once), --mesh" in evaluation
    thoughts = dataclasses.replace(
        config,
        method="reinforcement_midtraining",
        method_config=ReinforcementMidtrainingConfig(collect_parts=2),
    )
    thinking = compile_report.refusal(thoughts, activations)
    assert " --reinforcement_midtraining.collect_parts=4 (draws fewer thoughts" in thinking
    assert " --reinforcement_midtraining.gather_weights=false (" in thinking


@pytest.mark.parametrize(
    ("sizes", "advised"),
    [  # slices, data, fsdp, tensor, sequence -> data, fsdp, tensor, sequence
        ((2, 2, 2, 1, 1), [(2, 4, 1, 1), (2, 2, 2, 1)]),
        ((2, 1, 4, 1, 1), [(2, 2, 2, 1)]),
        ((1, 1, 8, 1, 1), [(1, 4, 2, 1)]),
        ((1, 4, 1, 1, 2), [(1, 4, 1, 2), (2, 1, 2, 2)]),
        ((1, 2, 2, 2, 1), [(1, 4, 2, 1)]),
        ((8, 1, 1, 1, 1), []),
    ],
)
def test_advised_meshes_are_of_the_same_devices(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    sizes: tuple[int, ...],
    advised: list[tuple[int, ...]],
):
    mesh = dict(zip(AXES, sizes, strict=True))
    given = [f"--mesh.dcn_data={sizes[0]}", f"--mesh.data={sizes[0] * sizes[1]}"]
    given += [f"--mesh.{axis}={mesh[axis]}" for axis in ("fsdp", "tensor", "sequence")]
    report = report_of(optimizer=14 * GIB)._replace(mesh=mesh)
    found = []
    for advice in compile_report.advice(tiny(tmp_path, batch_size=64), report):
        if "--mesh" in advice:
            values = absl_flags.FlagValues()
            flags.define(values)
            changes = advice.partition(" (")[0].split()
            flags.parse(["train", "--method=next_token", *given, *changes], values)
            wanted = dataclasses.asdict(flags.run_config(values).mesh)
            found.append(partitioning.make_mesh(**wanted).devices.shape)
    assert found == advised


def test_no_mesh_is_advised_that_does_not_divide_the_model(
    tiny: Callable[..., RunConfig], tmp_path: Path
):
    report = report_of(optimizer=14 * GIB)
    odd = tiny(tmp_path, embed_dim=12, vocab_size=257, batch_size=64)
    assert not [advice for advice in compile_report.advice(odd, report) if "--mesh" in advice]


@pytest.mark.parametrize(
    ("width", "fsdp", "wider"),
    [
        (1536, 64, "leaves 24 of embed_dim 1536.* --mesh.fsdp=8 and"),
        (1536, 12, None),  # 128
        (1536, 13, "leaves 118 .* --mesh.fsdp=1 and"),
        (128, 4, None),  # no cut leaves more
    ],
)
def test_a_hint_where_fsdp_leaves_less_than_a_tile(
    tiny: Callable[..., RunConfig], tmp_path: Path, width: int, fsdp: int, wider: str | None
):
    config = tiny(tmp_path, embed_dim=width)
    report = report_of()._replace(mesh=AXES | {"fsdp": fsdp})
    hints = re.findall("^hint: .*", compile_report.text(config, report), re.MULTILINE)
    assert len(hints) == (wider is not None)
    assert wider is None or re.search(wider, hints[0])
    on_cpus = compile_report.text(config, report._replace(topology="cpu:64"))
    assert "hint" not in on_cpus


@pytest.mark.parametrize("name", ["v5p", "v5p:4xx4", ":8", "cpu:0", "cpu:eight"])
def test_a_topology_has_a_kind_and_a_shape(name: str):
    with pytest.raises(ValueError, match=r"is not KIND:SHAPE; give a TPU's such as v5p:4x4x4"):
        topology.devices_of(name)


def test_a_gpu_is_refused_with_what_is_possible():
    with pytest.raises(ValueError, match=r"h200:8 names GPUs, and only TPUs and CPUs .* cpu:8 for"):
        topology.devices_of("h200:8")


def test_more_cpu_devices_than_jax_was_started_with():
    with pytest.raises(ValueError, match="cpu:16 needs 16 CPU devices and JAX has started with 8"):
        topology.devices_of("cpu:16")


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs libtpu, the compiler: pip install .*\[tpu\]"):
        topology.devices_of("v5p:4x4x4")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("--compile_only", "--topology=v5p is not KIND:SHAPE"),
        ("--seed=1", "--topology and --search are for --compile_only; add it\n"),
        ("--compile_only --search=-1", "--search=-1 compiles no variant; give 1 or more\n"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    python: Callable[..., Any], given: str, error: str
):
    run = ("-m", "jaxlib_methods.train", "--preset=transformer_tiny", "--topology=v5p")
    found = python(*run, *given.split())
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: {error}")
    assert found.stderr.count("\n") == 1


def pretended(config: RunConfig, target: Any, *, evaluation: bool) -> compile_report.Report:
    """2 GiB a row with everything kept, recomputation in seconds; a part of tensor costs most."""
    mesh = AXES | {"fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    if config.mesh.tensor > 2:
        raise ValueError("heads")
    keeps, again = {"none": (4, 1.0), "dots": (2, 1.1), "full": (1, 1.3)}[config.model.remat]
    parts = config.train.num_microbatches
    report = report_of(temporaries=keeps * 16 * GIB / parts)
    seconds = again + 0.01 * parts + config.mesh.tensor
    terms = roofline.Roofline(seconds, 0.0, 0.0, 0.0)
    return report._replace(mesh=mesh, roofline=None if report.memory.missing else terms)


def test_search_prints_what_nothing_beats(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    target = compile_only.Target("v5e:4x2", [None] * 8, roofline.CHIPS["v5e"])
    monkeypatch.setattr(compile_search, "target_of", lambda name, num_slices: target)
    monkeypatch.setattr(compile_search, "analyse", pretended)
    config = tiny(tmp_path, data=2, fsdp=4, batch_size=64, num_microbatches=2)
    compile_search.run(config, "v5e:4x2", most=20)
    printed = capsys.readouterr()
    # Of 16 GiB 5 are taken. With 4 parts all but `none` fit, with 2 `full` does; with 1, where
    # `full` does not, `dots` and `none` are not tried, nor is `none` with 2 where `dots` fails.
    first = [line.split(":")[0] for line in printed.err.splitlines()]
    assert [line.split()[1:3] for line in first[:5]] == [
        ["--model.remat=full", "--train.num_microbatches=4"],
        ["--model.remat=dots", "--train.num_microbatches=4"],
        ["--model.remat=none", "--train.num_microbatches=4"],
        ["--model.remat=full", "--train.num_microbatches=2"],
        ["--model.remat=dots", "--train.num_microbatches=2"],
    ]
    assert [line.split()[1:3] for line in first[5:]] == [
        ["--model.remat=full", "--train.num_microbatches=1"],
        ["--model.remat=dots", "--train.num_microbatches=4"],  # the fastest, on two meshes
        ["--model.remat=dots", "--train.num_microbatches=4"],
    ]
    assert "--mesh.data=2 --mesh.fsdp=2 --mesh.tensor=2" in first[-2]
    assert [line.split()[0] for line in printed.out.splitlines()[1:]] == ["13.00", "9.00"]


def test_search_is_bounded_and_needs_the_rates_of_a_chip(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    config = tiny(tmp_path, data=2, fsdp=4, batch_size=64, num_microbatches=2)
    with pytest.raises(ValueError, match="none are known of cpu:8; give a TPU's topology"):
        compile_search.run(config, "cpu:8", most=3)
    target = compile_only.Target("v5e:4x2", [None] * 8, roofline.CHIPS["v5e"])
    monkeypatch.setattr(compile_search, "target_of", lambda name, num_slices: target)
    monkeypatch.setattr(compile_search, "analyse", pretended)
    compile_search.run(config, "v5e:4x2", most=2)
    assert capsys.readouterr().err.count("\n") == 2
    with pytest.raises(ValueError, match="no variant is possible on v5e:4x2, as said above"):
        compile_search.run(tiny(tmp_path, tensor=4, batch_size=64), "v5e:4x2", most=2)
    assert "not possible: heads" in capsys.readouterr().err


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
def test_a_pod_is_compiled_for_without_one(tiny: Callable[..., RunConfig], tmp_path: Path):
    config = tiny(tmp_path, data=2, dcn_data=2, fsdp=4, batch_size=16)
    report = compile_only.analyse(config, compile_only.target_of("v5e:2x2", num_slices=2))
    assert report.num_devices == 8
    assert report.cost is not None
    assert ("all-reduce", "slices") in report.cost.collectives
    assert report.cost.unknown_loops == 0
    assert report.roofline is not None
    assert 0 < report.memory.peak < report.memory.evaluation + report.memory.peak < 2 * GIB


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
@pytest.mark.parametrize("method", ["next_token", "energy"])
def test_kernels_asked_for_by_name_are_compiled_for_a_pod(
    method: str, tiny: Callable[..., RunConfig], tmp_path: Path
):
    forms = {"attention_implementation": "pallas", "max_length": 128, "sequence_length": 128}
    config = tiny(tmp_path, method=method, data=1, fsdp=4, batch_size=4, embed_dim=128, **forms)
    report = compile_only.analyse(config, compile_only.target_of("v5e:2x2"), evaluation=False)
    assert report.cost is not None


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
def test_a_program_too_large_for_a_pod(tiny: Callable[..., RunConfig], tmp_path: Path):
    lengths = {"max_length": 128, "sequence_length": 128}
    config = tiny(tmp_path, data=2, fsdp=2, batch_size=2**19, **lengths)
    report = compile_only.analyse(config, compile_only.target_of("v5e:2x2"), evaluation=False)
    assert report.cost is None
    assert report.memory.missing > 0
    assert "--train.num_microbatches=" in compile_report.refusal(config, report)


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
def test_a_v4_is_compiled_for_without_its_rates(tiny: Callable[..., RunConfig], tmp_path: Path):
    target = compile_only.target_of("v4:2x2x1")
    assert (len(target.devices), target.chip) == (4, None)
    config = tiny(tmp_path, data=1, fsdp=4, batch_size=16)
    report = compile_only.analyse(config, target)
    assert report.memory.evaluation > report.memory.held
    assert (report.cost is not None, report.roofline) == (True, None)


def test_a_program_too_large_for_an_unknown_chip_is_refused():
    def lower(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("Used 33.5G of 30.75G hbm")

    target = compile_only.Target("v4:2x2x1", [], None)
    with pytest.raises(ValueError, match=r"needs 33\.50 GiB on .* v4:2x2x1, which has less"):
        compile_only._compile(types.SimpleNamespace(lower=lower), (), target)


@pytest.mark.libtpu
def test_an_unknown_pod_is_refused():
    with pytest.raises(ValueError, match="v5e:3x5 is unknown to libtpu"):
        topology.devices_of("v5e:3x5")


@pytest.mark.libtpu
def test_a_mesh_may_split_an_axis_of_the_torus():
    devices = topology.devices_of("v5e:4x4")
    mesh = partitioning.make_mesh(data=2, fsdp=4, tensor=2, devices=devices)
    assert sorted(device.id for device in mesh.devices.flat) == list(range(16))
