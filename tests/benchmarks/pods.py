"""What the presets of pods take on each: memory, seconds by the chip's rates, bytes over the floor.

    python tests/benchmarks/pods.py --presets=energy_large --topologies=v6e:8x8

Nothing is run: libtpu compiles the training and the validation step of each preset with the flags
that `--list_presets` names for a topology; `--run` adds others, of another mesh for instance.
Published shapes stand for the finished models that a user has. Mid-training of 14B takes a quarter
of an hour to compile, the others a few minutes.
Goal: at most 1.2 times the floor of `floor.py`; recurrent depth and mid-training have none.
"""

import floor
import harness
from absl import app, flags

from jaxlib_methods.train import compile_only, presets, roofline
from jaxlib_methods.train.config import RunConfig

PRESETS = flags.DEFINE_list("presets", [], "Of these only; all that name pods by default.")
TOPOLOGIES = flags.DEFINE_list("topologies", [], "Of these only; all that a preset names.")
RUN = flags.DEFINE_string("run", "", "Further flags of every run.")
GIB = roofline.GIB


def configured(preset: str, topology: str) -> RunConfig:
    """The run of a preset on a topology."""
    found = presets.PRESETS[preset]
    of_pod = found.pods.get(topology, "").split()
    return floor.configured(f"--preset={preset}", *found.shapes, *of_pod, *RUN.value.split())


def cells(config: RunConfig, row: floor.Row) -> tuple[str, ...]:
    """What a program holds, its seconds, and the ratio where a floor is stated."""
    report = row.report
    mesh = ", ".join(f"{name} {size}" for name, size in report.mesh.items() if size > 1)
    memory = [report.memory.peak, report.memory.evaluation, report.memory.limit or 0]
    peak, evaluation, limit = (f"{size / GIB:.1f}" for size in memory)
    secs = "does not fit"
    if report.roofline is not None:
        rates = (report.roofline.compute, report.roofline.memory, report.roofline.links)
        secs = ", ".join(f"{rate:.3g}" for rate in rates)
    return (
        f"{mesh}, micro-batches {config.train.num_microbatches}",
        f"{peak} of {limit} ({evaluation})",
        secs,
        f"{row.ratio:.2f}" if has_floor(config, row) else "-",
    )


def has_floor(config: RunConfig, row: floor.Row) -> bool:
    """Whether the floor is that of all that the step does; see `floor.py`."""
    whole = config.method not in ("depth_recurrence", "reinforcement_midtraining")
    return whole and row.report.cost is not None


def main(_: list[str]) -> None:
    """Compiles, prints the table and the goal."""
    print(", ".join(harness.provenance()) + "\n")
    print("| preset | topology | mesh | GiB (validation) | compute, memory, links s | floor |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for preset in PRESETS.value or [name for name, found in presets.PRESETS.items() if found.pods]:
        for topology in TOPOLOGIES.value or presets.PRESETS[preset].pods:
            config, target = configured(preset, topology), compile_only.target_of(topology)
            row = floor.measure(config, target, evaluation=True)
            print(f"| {' | '.join((preset, topology, *cells(config, row)))} |", flush=True)
            if has_floor(config, row):
                ratios.append(row.ratio)
    if ratios:
        harness.check_goal("bytes sent, of the floor", max(ratios), limit=floor.GOAL)


if __name__ == "__main__":
    app.run(main)
