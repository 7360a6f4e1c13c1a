"""What `compile_only` prints and writes of a compiled run, and the advice where it does not fit."""

import math
from typing import Any, NamedTuple

from jaxlib_methods.train import hlo
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.roofline import GIB, Roofline

LANES = 128  # of a TPU's tile, along the last dimension


class Memory(NamedTuple):
    """Bytes of a device during a training step.

    frozen: what the method holds beside its state, such as a teacher. temporaries: activations,
    gradients, gathered weights, and results that do not take the place of an argument.
    evaluation: the peak of a validation step; 0 if it was not compiled. limit: of the chip.
    """

    parameters: int
    optimizer: int
    other_state: int
    frozen: int
    batch: int
    temporaries: int
    evaluation: int
    limit: int | None

    @property
    def held(self) -> int:
        """Between steps."""
        return self.parameters + self.optimizer + self.other_state + self.frozen

    @property
    def peak(self) -> int:
        """During a training step."""
        return self.held + self.batch + self.temporaries

    @property
    def missing(self) -> int:
        """What the chip has too little, for training or evaluation."""
        if self.limit is None:
            return 0
        return max(self.peak - self.limit, self.evaluation - self.limit, 0)


class Report(NamedTuple):
    """What is known of a compiled step. FLOPs are of all devices, memory and bytes of one."""

    topology: str
    mesh: dict[str, int]  # axes and sizes; the data axis without its slices
    memory: Memory
    model_flops: float  # as `train/mfu` counts them
    executed_flops: float | None  # with what is computed again; None in a loop of unknown length
    cost: hlo.Cost | None  # None where the compiler has refused the program
    roofline: Roofline | None  # None where nothing is known of the chip
    peak_flops: float | None  # FLOP/s of all devices
    rematerialized: tuple[str, ...]  # what XLA says of arrays that it makes whole to cut anew
    seconds: float  # that compilation took

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.mesh.values())


def text(config: RunConfig, report: Report) -> str:
    """The report for a terminal."""
    axes = ", ".join(f"{name} {size}" for name, size in report.mesh.items() if size > 1) or "1"
    lines = [
        f"{config.preset or config.method} on {report.topology}: {report.num_devices} devices, "
        f"mesh {axes}; compiled in {report.seconds:.0f} s",
        *_memory_lines(report.memory),
        *_flops_lines(report),
        *_collective_lines(report.cost),
        *_time_lines(report),
        *_narrow_lines(config, report),
        *(f"defect: {line}" for line in report.rematerialized),
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(memory: Memory) -> list[str]:
    names = ("parameters", "optimizer", "other_state", "frozen", "batch", "temporaries")
    lines = ["memory of a device, GiB"]
    lines += [
        f"  {name.replace('_', ' '):<24}{getattr(memory, name) / GIB:>10.3f}" for name in names
    ]
    peaks = {"training step": memory.peak} | (
        {"validation step": memory.evaluation} if memory.evaluation else {}
    )
    for name, peak in peaks.items():
        of = ""
        if memory.limit is not None:
            of = f" of {memory.limit / GIB:.2f} ({peak / memory.limit:.0%})"
        lines.append(f"  {name:<24}{peak / GIB:>10.3f}{of}")
    return lines


def _flops_lines(report: Report) -> list[str]:
    executed = "a loop of unknown length hides what is executed"
    if report.executed_flops is not None:
        executed = f"{report.executed_flops:.3g} executed, recomputation included"
    return [f"FLOPs of a step: {report.model_flops:.3g} of the model, {executed}"]


def _collective_lines(cost: hlo.Cost | None) -> list[str]:
    if cost is None:
        return []
    lines = ["collectives of a step, per device      times       GiB"]
    for (kind, axes), (count, num_bytes) in sorted(cost.collectives.items()):
        lines.append(f"  {kind:<19}{axes:<16}{count:>8.0f}{num_bytes / GIB:>10.3f}")
    if not cost.collectives:
        lines.append("  none")
    if cost.unknown_loops:
        lines.append(
            f"  {cost.unknown_loops} loops of unknown length counted by their mean, or once"
        )
    return lines


def _time_lines(report: Report) -> list[str]:
    found = report.roofline
    if found is None or report.peak_flops is None:
        return []
    terms = ", ".join(f"{name} {secs:.3g}" for name, secs in found._asdict().items() if secs)
    mfu = report.model_flops / report.peak_flops / found.overlapped
    return [
        f"seconds of a step by the chip's rates: {terms}",
        f"  {found.overlapped:.3g} if all overlap, limited by {found.limit} (MFU {mfu:.0%}); "
        f"{found.one_by_one:.3g} one after another",
    ]


def _narrow_lines(config: RunConfig, report: Report) -> list[str]:
    """Says where fsdp cuts weights so thin that compilers for TPUs gather them by adding up."""
    width, parts = config.model.embed_dim, report.mesh["fsdp"]
    if report.topology.startswith("cpu") or width < 2 * LANES or width // parts >= LANES:
        return []
    wider = max(n for n in range(1, parts) if parts % n == 0 and width // n >= LANES)
    return [
        f"hint: mesh.fsdp={parts} leaves {width // parts} of embed_dim {width}, fewer than a TPU's "
        f"{LANES} lanes; gathering that costs up to twice the bytes: --mesh.fsdp={wider} and the "
        "rest in --mesh.data where memory allows"
    ]


def to_dict(config: RunConfig, report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    cost, memory, roofline = report.cost, report.memory, report.roofline
    return {
        **report._asdict(),
        "preset": config.preset,
        "method": config.method,
        "memory": {**memory._asdict(), "peak": memory.peak, "missing": memory.missing},
        "cost": None
        if cost is None
        else {
            "memory_bytes": cost.memory_bytes,
            "unknown_loops": cost.unknown_loops,
            "collectives": [
                {"kind": kind, "axes": axes.split("+"), **moved._asdict()}
                for (kind, axes), moved in sorted(cost.collectives.items())
            ],
        },
        "roofline": roofline and {**roofline._asdict(), "limit": roofline.limit},
    }


def refusal(config: RunConfig, report: Report) -> str:
    """One sentence: how much memory is missing, and which flags help."""
    memory = report.memory
    assert memory.limit is not None
    worse = "validation" if memory.evaluation > memory.peak else "training"
    return (
        f"the {worse} step needs {max(memory.peak, memory.evaluation) / GIB:.2f} GiB on a device "
        f"of {report.topology}, {memory.missing / GIB:.2f} more than its {memory.limit / GIB:.2f}; "
        f"what helps: {', '.join(advice(config, report)) or 'more devices'}"
    )


def advice(config: RunConfig, report: Report) -> list[str]:
    """Flags that need less memory, those first that change the run the least."""
    memory, mesh = report.memory, report.mesh
    found = []
    if memory.held > (memory.limit or 0) // 2 and mesh["data"] > 1:
        further = mesh | {"data": 1, "fsdp": mesh["data"] * mesh["fsdp"]}
        if config.model.embed_dim % further["fsdp"] == 0:
            found.append(f"{mesh_flags(further)} (cuts parameters and optimiser further)")
    if memory.missing:
        rows, parts = config.data.batch_size, config.train.num_microbatches
        cut = mesh["slices"] * mesh["data"] * mesh["fsdp"]
        free = (memory.limit or 0) - memory.held - memory.batch
        of_rows = max(memory.temporaries, memory.evaluation - memory.held - memory.batch)
        least = parts * max(of_rows / free, 1) if free > 0 else rows
        more = [n for n in range(parts + 1, rows // cut + 1) if rows % (n * cut) == 0]
        enough = [n for n in more if n >= least] or more[-1:]
        if enough:
            found.append(f"--train.num_microbatches={enough[0]} (fewer rows at once)")
    if memory.peak > (memory.limit or 0):
        again = {"none": "dots", "dots": "full"}.get(config.model.remat)
        if again:
            found.append(f"--model.remat={again} (computes again instead of keeping)")
    of_method = getattr(config.method_config, "less_memory", ())
    found += [f"--{config.method}.{flag}" for flag in of_method]
    model = config.model
    even = math.gcd(model.kv_heads, model.mlp_size, model.vocab_size) % 2 == 0
    # Of `data` first: that cuts the parameters too.
    halved = next((axis for axis in ("data", "fsdp") if mesh[axis] % 2 == 0), None)
    if halved and mesh["tensor"] == 1 and even:
        heads = mesh | {halved: mesh[halved] // 2, "tensor": 2}
        found.append(f"{mesh_flags(heads)} (cuts heads and vocabulary)")
    return [*found, "more devices"]


def mesh_flags(mesh: dict[str, int]) -> str:
    """A mesh as flags, its slices in `data`; of a `Report`'s axes, `sequence` as the run has it."""
    return (
        f"--mesh.data={mesh['slices'] * mesh['data']} --mesh.fsdp={mesh['fsdp']} "
        f"--mesh.tensor={mesh['tensor']}"
    )
