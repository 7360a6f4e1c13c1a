"""Every method on one device, on eight, and on two processes of four: are the losses the same?

    python tests/benchmarks/meshes.py

The tiny presets, most in a smaller size, 20 steps each, as `python -m jaxlib_methods.train`: same
seed, same global batches, a rate of 1e-3. Eight devices are a mesh of data=2, fsdp=4, whose data
axis lies between the two processes. What a method starts from is trained first, for 20 steps too.
Goal: no training loss differs from that of one device by more than 1e-4 of it.
"""

import pathlib
import tempfile
from typing import Any

import harness
import trainers
from absl import app, flags

NUM_STEPS = flags.DEFINE_integer("num_steps", 20, "Steps of each run.", lower_bound=1)
PRESETS = flags.DEFINE_list("presets", [], "Of these only; all by default.")

GOAL = 1e-4
SMALL = (
    "--model.num_layers=2", "--model.embed_dim=32", "--model.mlp_dim=64",
    "--data.sequence_length=32", "--data.batch_size=16",
)  # fmt: skip
RECURRENT = (*SMALL, "--model.num_layers=4", "--model.recurrence=4", "--model.backprop_steps=2")
# Adam divides by |g| + epsilon: one above rounding keeps a step from enlarging it.
GENTLE = ("--optimizer.learning_rate=1e-3", "--optimizer.epsilon=1e-4")
# Preset -> its flags; {start} is the workdir of a run of the preset in STARTS.
RUNS = {
    "transformer_tiny": SMALL,
    "late_to_early_tiny": (*SMALL, "--late_to_early.teacher={start}"),
    "late_to_early_recurrent_tiny": (*RECURRENT, "--late_to_early.teacher={start}"),
    "energy_tiny": (*SMALL, "--energy.update_rms=1.0"),  # a longer descent enlarges rounding too
    "energy_image_tiny": SMALL[:1],
    "depth_recurrence_tiny": (*RECURRENT, "--depth_recurrence.eval_steps=1,4"),
    "depth_recurrence_reachability_tiny": (),
    "reinforcement_midtraining_tiny": ("--checkpoint.init_from={start}",),
}
STARTS = {
    "late_to_early_tiny": "late_to_early_tiny_teacher",
    "late_to_early_recurrent_tiny": "late_to_early_tiny_teacher",
    "reinforcement_midtraining_tiny": "reinforcement_midtraining_tiny_base",
}
MESH = ("--mesh.data=2", "--mesh.fsdp=4")
PLACES: dict[str, dict[str, Any]] = {
    "1 device": {"count": 1, "num_devices": 1},
    "8 devices": {"count": 1, "num_devices": 8},
    "2 x 4 devices": {"count": 2, "num_devices": 8},
}


def train(run: trainers.Trainers, root: pathlib.Path, preset: str, place: str) -> trainers.Lines:
    """The lines of a run, one a step; trains what it starts from where that is missing."""
    start = root / STARTS.get(preset, "")
    steps = (f"--train.num_steps={NUM_STEPS.value}", "--train.log_every=1")
    if preset in STARTS and not start.exists():
        run.run(f"--preset={STARTS[preset]}", f"--workdir={start}", *steps)
    workdir = root / f"{preset}, {place}"
    workdir.mkdir()
    run.run(
        f"--preset={preset}", f"--workdir={workdir}", *steps,
        f"--train.eval_every={NUM_STEPS.value}", "--train.eval_batches=1", "--checkpoint.every=0",
        *GENTLE,
        *(flag.format(start=start) for flag in RUNS[preset]),
        *(MESH if PLACES[place]["num_devices"] > 1 else ()),
        **PLACES[place],
    )  # fmt: skip
    return trainers.train_metrics(workdir)


def main(_: list[str]) -> None:
    """Trains each preset in three places and prints a row for it."""
    others = list(PLACES)[1:]
    print(
        f"| preset | loss, first and last | {' | '.join(f'{p}: loss, gradient' for p in others)} |"
    )
    print("|---" * (2 + len(others)) + "|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        run = trainers.Trainers(root)
        for preset in PRESETS.value or RUNS:
            lines = {place: train(run, root, preset, place) for place in PLACES}
            one = lines["1 device"]
            cells = []
            for place in others:
                loss, slope = (
                    trainers.largest_difference(lines[place], one, f"train/{name}")
                    for name in ("loss", "gradient_norm")
                )
                cells.append(f"{loss:.1e}, {slope:.1e}")
                worst = max(worst, loss)
            ends = ", ".join(f"{one[step]['train/loss']:.4f}" for step in (1, NUM_STEPS.value))
            print(f"| {preset} | {ends} | {' | '.join(cells)} |", flush=True)
    print(" | ".join(harness.provenance()))
    harness.check_goal("largest relative difference of a loss", worst, limit=GOAL)


if __name__ == "__main__":
    app.run(main)
