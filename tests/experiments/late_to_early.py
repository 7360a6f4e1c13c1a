"""Experiments L1 to L6 on late-to-early training, at a size that two CPU cores manage.

    python tests/experiments/late_to_early.py --workdir=runs/let_experiments

Every run is the library's own trainer on the standard library's source, paired by seed: the same
initial parameters and the same batches. One process per core; a run that is finished is not
trained again, so that the command may be interrupted. Prints Markdown tables.
"""

import dataclasses
import os
import pathlib
from statistics import mean, stdev
from typing import Any

import pool
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "runs/let_experiments", "Where the runs are kept.")
_ONLY = flags.DEFINE_list("only", [], "Names of tables; empty: all.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes, one core each.")

SEEDS = (0, 1, 2)
STEPS = 400
TEACHER_STEPS = 4000
RATE = 4e-3
OTHER_RATES = (2e-3, 8e-3)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: its name is its folder."""

    name: str
    seed: int = 0
    steps: int = STEPS
    rate: float = RATE
    teacher: str = ""  # empty: plain next-token prediction
    role: str = "student"
    let: tuple[tuple[str, Any], ...] = ()  # fields of LateToEarlyConfig


def teacher(name: str, steps: int, rate: float = RATE) -> Job:
    """A teacher run; its seed is none of the students'."""
    return Job(name, seed=100, steps=steps, rate=rate, role="teacher")


def student(name: str, seed: int, *, teacher: str = "teacher", rate: float = RATE,
            steps: int = STEPS, **fields: Any) -> Job:  # fmt: skip
    """A student run with LET or one of its baselines."""
    return Job(f"{name}/seed{seed}", seed, steps, rate, teacher, let=tuple(sorted(fields.items())))


def plain(name: str, seed: int, *, rate: float = RATE, steps: int = STEPS) -> Job:
    """A student run without a teacher."""
    return Job(f"{name}/seed{seed}", seed, steps, rate)


TEACHERS = [
    teacher("teacher", TEACHER_STEPS),
    teacher("teacher_300_steps", 300),
    teacher("teacher_random", 1, rate=1e-12),
]


def config_of(job: Job, root: pathlib.Path) -> Any:
    """The job as a RunConfig."""
    from jaxlib_methods.late_to_early import LateToEarlyConfig
    from jaxlib_methods.models.config import TransformerConfig
    from jaxlib_methods.train import config as c

    model = TransformerConfig(
        num_layers=4, embed_dim=96, num_heads=4, mlp_dim=256, max_length=64, compute_dtype="float32"
    )
    if job.role == "teacher":
        model = dataclasses.replace(model, num_layers=2, embed_dim=40, mlp_dim=80)
    method_config = None
    if job.teacher:
        method_config = LateToEarlyConfig(teacher=str(root / job.teacher), **dict(job.let))
    return c.RunConfig(
        method="late_to_early" if job.teacher else "next_token",
        method_config=method_config,
        workdir=str(root / job.name),
        seed=job.seed,
        model=model,
        data=c.DataConfig(sequence_length=64, batch_size=16, shuffle_seed=job.seed),
        train=c.TrainConfig(
            num_steps=job.steps, eval_every=max(25, job.steps // 16), eval_batches=16
        ),
        optimizer=c.OptimizerConfig(learning_rate=job.rate),
        checkpoint=c.CheckpointConfig(every=0, keep=1),
    )


def run_all(jobs: list[Job], root: pathlib.Path) -> None:
    """Runs the jobs, each once, one process per core."""
    pool.train_all([config_of(job, root) for job in jobs], root, workers=_WORKERS.value)


def losses(name: str, root: pathlib.Path, seeds: tuple[int, ...] = SEEDS) -> list[float]:
    """Final validation losses of a setting, one per seed."""
    from jaxlib_methods.train.plots import read_curves

    return [
        read_curves(root / name / f"seed{seed}" / "metrics.jsonl")["validation/loss"][1][-1]
        for seed in seeds
    ]


def row(name: str, label: str, root: pathlib.Path, baseline: str = "plain",
        seeds: tuple[int, ...] = SEEDS) -> str:  # fmt: skip
    """One line of a table: mean and spread, paired difference, steps to the baseline's loss."""
    from jaxlib_methods.train.report import steps_to_reach

    mine, base = losses(name, root, seeds), losses(baseline, root, seeds)
    paired = [a - b for a, b in zip(mine, base, strict=True)]
    reached = [
        steps_to_reach(root / name / f"seed{seed}", goal)
        for seed, goal in zip(seeds, base, strict=True)
    ]
    spread = f" ± {stdev(mine):.4f}" if len(seeds) > 1 else ""
    steps = ", ".join("never" if r is None else f"{r:.0f}" for r in reached)
    difference = "-" if name == baseline else f"{mean(paired):+.4f}"
    ranges = "-" if name == baseline else ", ".join(f"{d:+.3f}" for d in paired)
    return f"| {label} | {mean(mine):.4f}{spread} | {difference} | {ranges} | {steps} |"


def passed_teacher(name: str, root: pathlib.Path) -> str:
    """When a student's validation loss passed its teacher's, on the same batches."""
    from jaxlib_methods.train.plots import read_curves
    from jaxlib_methods.train.report import steps_to_reach

    curves = read_curves(root / name / "seed0" / "metrics.jsonl")
    goal = curves["validation/teacher_loss"][1][-1]
    reached = steps_to_reach(root / name / "seed0", goal)
    when = "never passed it" if reached is None else f"passed it after {reached:.0f} steps"
    return f"\nTeacher: {goal:.4f}; {name} {when}."


HEADER = (
    "| setting | final validation loss | minus baseline | per seed | steps to baseline's loss |\n"
    "|---|---|---|---|---|"
)


def rate_jobs() -> dict[str, list[Job]]:
    """Learning rates beside the usual one, each arm tuned alike, seed 0."""
    arms: dict[str, list[Job]] = {}
    for rate in OTHER_RATES:
        arms[f"rate{rate}/plain"] = [plain(f"rate{rate}/plain", 0, rate=rate)]
        for weight in (0.1, 1.0, 10.0):
            name = f"rate{rate}/let{weight}"
            arms[name] = [student(name, 0, rate=rate, weight=weight)]
        for objective in ("salt", "reverse_kd"):
            name = f"rate{rate}/{objective}"
            arms[name] = [student(name, 0, rate=rate, objective=objective)]
    return arms


def arm(name: str, **fields: Any) -> tuple[str, list[Job]]:
    """A setting over all seeds."""
    return name, [student(name, seed, **fields) for seed in SEEDS]


def tables() -> dict[str, dict[str, list[Job]]]:
    """Table -> setting -> its runs."""
    base = ("plain", [plain("plain", seed) for seed in SEEDS])
    long_steps = 1600
    long = {
        "long/plain": [plain("long/plain", 0, steps=long_steps)],
        "long/let3": [student("long/let3", 0, steps=long_steps, weight=3.0)],
        "long/let3_whole": [
            student("long/let3_whole", 0, steps=long_steps, weight=3.0, stop_fraction=1.0)
        ],
    }
    return {
        "rates": rate_jobs(),
        "weights": dict([base, *(arm(f"let{w}", weight=w) for w in (0.1, 0.3, 1.0, 3.0, 10.0))]),
        "pairings": dict(
            arm(f"pair_{t}_{s}", weight=0.1, teacher_layer=t, student_layer=s)
            for t in ("last", "middle")
            for s in ("early", "middle", "late")
            if (t, s) != ("last", "early")  # that is let0.1
        ),
        "pairings_1": dict(
            arm(f"pair_heavy_last_{s}", weight=1.0, student_layer=s) for s in ("middle", "late")
        ),
        "pairings_3": dict(
            arm(f"pair3_last_{s}", weight=3.0, student_layer=s) for s in ("middle", "late")
        ),
        "teachers": dict(
            arm(f"{name}_weight{weight}", weight=weight, teacher=name)
            for name, weight in (
                ("teacher_random", 0.1),
                ("teacher_random", 1.0),
                ("teacher_random", 3.0),
                ("teacher_300_steps", 3.0),
            )
        ),
        "distillation": dict(
            [
                arm("salt", objective="salt"),
                arm("salt_sixth", objective="salt", stop_fraction=1 / 6),
                arm("reverse_kd", objective="reverse_kd"),
            ]
        ),
        "stop": dict(
            arm(f"stop3_{name}", weight=3.0, stop_fraction=fraction)
            for name, fraction in (("sixth", 1 / 6), ("whole", 1.0))
        ),
        "resizing": dict(
            arm(f"resize3_{resize}", weight=3.0, resize=resize)
            for resize in ("student_to_teacher", "learned_linear")
        ),
        "long": long,
    }


def main(argv: list[str]) -> None:
    """Trains what is missing and prints the tables."""
    del argv
    root = pathlib.Path(_WORKDIR.value).absolute()
    root.mkdir(parents=True, exist_ok=True)
    chosen = {k: v for k, v in tables().items() if not _ONLY.value or k in _ONLY.value}
    run_all(TEACHERS, root)
    base = [plain("plain", seed) for seed in SEEDS]
    run_all(base + [j for table in chosen.values() for jobs in table.values() for j in jobs], root)
    for name, table in chosen.items():
        print(f"\n### {name}\n\n{HEADER}")
        seeds = (0,) if name in ("rates", "long") else SEEDS
        for setting in table:
            baseline = {"rates": setting.rsplit("/", 1)[0] + "/plain", "long": "long/plain"}
            print(row(setting, setting, root, baseline.get(name, "plain"), seeds))
        if name == "long":
            print(passed_teacher("long/let3", root))


if __name__ == "__main__":
    app.run(main)
