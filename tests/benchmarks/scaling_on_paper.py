"""What compiled steps send on 8 to 256 chips, against the least that fsdp and tensor must.

    python tests/benchmarks/scaling_on_paper.py --topologies=v5e:2x4,v5e:4x4 \\
        --run="--preset=transformer_1b --model.num_layers=2 --data.sequence_length=256"

Nothing is run: every step is compiled by libtpu. Weak scaling keeps the batch of a chip, strong
scaling the global one, that of the largest topology. `--run` gives the flags of a run; chips beyond
mesh.fsdp x mesh.tensor become data parallelism.

`floor.py` has the floor. Goal: at most 1.2 times that.
"""

import floor
import harness
from absl import app, flags

from jaxlib_methods.train import compile_only, presets, roofline
from jaxlib_methods.train.config import RunConfig

RUN = flags.DEFINE_string(
    "run",
    "--preset=transformer_1b --model.num_layers=2 --data.sequence_length=256 "
    "--train.num_microbatches=1 --mesh.fsdp=8",
    "Flags of the run that is compiled.",
)
TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16"], "Of growing size."
)
ROWS = flags.DEFINE_integer("rows", 1, "Sequences of a chip and micro-batch where most chips are.")
GIB = roofline.GIB


def configured(batch_size: int) -> RunConfig:
    """The run with another batch, on any number of chips."""
    mesh, batch = "--mesh.data=-1", f"--data.batch_size={batch_size}"
    return floor.configured(*RUN.value.split(), mesh, batch)


def main(_: list[str]) -> None:
    """Compiles, prints the table and the goal."""
    # The largest first: a CPU has the devices that are asked for first.
    targets = {name: compile_only.target_of(name) for name in reversed(TOPOLOGIES.value)}
    print(", ".join(harness.provenance()) + "\n")
    base = configured(presets.get("transformer_1b").data.batch_size)
    sizes = [len(targets[name].devices) for name in TOPOLOGIES.value]
    rows = ROWS.value * base.train.num_microbatches
    batches = [size // base.mesh.tensor * rows for size in sizes]
    runs = [("weak", *run) for run in zip(TOPOLOGIES.value, batches, strict=True)]
    runs += [("strong", name, batches[-1]) for name in TOPOLOGIES.value[:-1]]
    print("| scaling | topology | batch | fsdp GiB | data | tensor | several | floor | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for kind, topology, batch in runs:
        row = floor.measure(configured(batch), targets[topology])
        alone = [row.sent.get(axis, 0.0) / GIB for axis in ("fsdp", "data", "tensor")]
        several = sum(row.sent.values()) / GIB - sum(alone)
        cells = " | ".join(f"{x:.3f}" for x in (*alone, several, sum(row.floor.values()) / GIB))
        print(f"| {kind} | {topology} | {batch} | {cells} | {row.ratio:.2f} |", flush=True)
        worst = max(worst, row.ratio)
    harness.check_goal("bytes sent, of the floor", worst, limit=floor.GOAL)


if __name__ == "__main__":
    app.run(main)
