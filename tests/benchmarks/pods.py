"""What the presets of pods take on each: memory, seconds by the chip's rates, bytes over the floor.

    python tests/benchmarks/pods.py --presets=energy_large --topologies=v6e:8x8

Nothing is run: libtpu compiles the training and the validation step of each preset with the flags
that `--list_presets` names for a topology; `--run` adds others, of another mesh for instance.
Published shapes stand for the finished models that a user has. Mid-training of 14B takes a quarter
of an hour to compile, the others a few minutes.
`floor.py` has the floor, which counts a recurrent core and rollouts once.
Goal: at most 1.2 times the floor.
"""

import floor
import harness
from absl import app, flags

from jaxlib_methods.train import compile_only, presets, roofline
from jaxlib_methods.train import flags as train_flags
from jaxlib_methods.train.config import RunConfig

PRESETS = flags.DEFINE_list("presets", [], "Of these only; all that name pods by default.")
TOPOLOGIES = flags.DEFINE_list("topologies", [], "Of these only; all that a preset names.")
RUN = flags.DEFINE_string("run", "", "Further flags of every run.")
GIB = roofline.GIB


def configured(preset: str, topology: str) -> RunConfig:
    """The run of a preset on a topology."""
    found = presets.PRESETS[preset]
    changes = f"{found.pods.get(topology, '')} {RUN.value}"
    values = flags.FlagValues()
    train_flags.define(values)
    given = [f"--preset={preset}", *found.shapes, *changes.split()]
    train_flags.parse(["train", "--compile_only", *given], values)
    return train_flags.run_config(values)


def main(_: list[str]) -> None:
    """Compiles, prints the table and the goal."""
    print(", ".join(harness.provenance()) + "\n")
    print("| preset | topology | mesh | GiB (validation) of | compute, memory, links s | floor |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for preset in PRESETS.value or [name for name, found in presets.PRESETS.items() if found.pods]:
        for topology in TOPOLOGIES.value or presets.PRESETS[preset].pods:
            config, target = configured(preset, topology), compile_only.target_of(topology)
            row = floor.measure(config, target, evaluation=True)
            memory, rates = row.report.memory, row.report.roofline
            assert memory.limit is not None
            assert rates is not None
            mesh = ", ".join(f"{name} {n}" for name, n in row.report.mesh.items() if n > 1)
            held = f"{memory.peak / GIB:.1f} ({memory.evaluation / GIB:.1f})"
            cells = (
                preset, topology, f"{mesh}, {config.train.num_microbatches} parts",
                f"{held} of {memory.limit / GIB:.2f}",
                f"{rates.compute:.3g}, {rates.memory:.3g}, {rates.links:.3g}", f"{row.ratio:.2f}",
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)
            worst = max(worst, row.ratio)
    harness.check_goal("bytes sent, of the floor", worst, limit=floor.GOAL)


if __name__ == "__main__":
    app.run(main)
