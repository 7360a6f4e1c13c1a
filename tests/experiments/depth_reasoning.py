"""Experiments D1 to D6 on depth-recurrent reasoning, at a size that two CPU cores manage.

    python tests/experiments/depth_reasoning.py --workdir=runs/depth_experiments

Every run is the library's own trainer on its own questions; arms differ in the fields named here
and are paired by seed: the same questions. One process per core; a run that is finished is not
trained again, so that the command may be interrupted. Prints Markdown tables; the heat map of a
run is drawn by `python -m jaxlib_methods.infer --mode=think --workdir=RUN --output=a.json`.
"""

import dataclasses
import json
import os
import pathlib
from statistics import mean, stdev
from typing import Any

import pool
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "runs/depth_experiments", "Where the runs are kept.")
_ONLY = flags.DEFINE_list("only", [], "Names of tables; empty: all.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes, one core each.")

SEEDS = (0, 1, 2)

# Arms on the small graphs: preset depth_recurrence_reachability_tiny with other fields.
SMALL: dict[str, dict[str, Any]] = {
    "gated": {},
    "tied": {"recurrence": "tied"},
    "untied": {"recurrence": "untied"},
    "untied_narrow": {"recurrence": "untied", "embed_dim": 28, "num_heads": 2, "mlp_dim": 56},
    "fixed": {"min_steps": 5},
    "bias_0": {"gate_bias": 0.0},
    "layer_scale": {"layer_scale": 1e-4},
    "intermediate": {"objective": "intermediate"},
    "iterative": {"objective": "iterative"},
    "matched": {"matched": True},
    "matched_tied": {"matched": True, "recurrence": "tied"},
    "matched_intermediate": {"matched": True, "objective": "intermediate"},
    "matched_iterative": {"matched": True, "objective": "iterative"},
    "long": {"min_steps": 20, "max_steps": 23},
    "long_tied": {"min_steps": 20, "max_steps": 23, "recurrence": "tied"},
}
# The paper's graphs and widths, with a fifth of its 7480 steps, so early that its rate is constant.
PAPER: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper_intermediate": {"objective": "intermediate"},
    "paper_tied": {"recurrence": "tied"},
}
# The paper's other two tasks, with a narrower block, shorter sentences and fewer steps.
LOGIC, KINSHIP = (
    {
        f"{task}_{recurrence}": {"task": task, "recurrence": recurrence}
        for recurrence in ("gated", "tied", "untied")
    }
    for task in ("logic", "kinship")
)
# D6: what a rate ten times the paper's does to 24 steps without clipping.
STRESS: dict[str, dict[str, Any]] = {
    "stress_gated": {},
    "stress_tied": {"recurrence": "tied"},
    "stress_post_norm": {"recurrence": "tied", "norm_placement": "post"},
}
DIVERGED = 1.0  # nats, of a question that a coin answers with 0.69


def _small(fields: dict[str, Any]) -> Any:
    return _with("depth_recurrence_reachability_tiny", fields)


def _paper(fields: dict[str, Any]) -> Any:
    config = _with("depth_recurrence_reachability", fields)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, num_steps=1500),
        optimizer=dataclasses.replace(config.optimizer, schedule="constant"),
    )


def _words(fields: dict[str, Any]) -> Any:
    sizes: dict[str, dict[str, Any]] = {
        "logic": {"min_steps": 2, "max_steps": 8, "most_steps": 16, "hardest": 4,
                  "eval_difficulties": (1, 2, 3, 4, 5, 6), "num_train": 0, "max_length": 64},
        "kinship": {"min_steps": 1, "max_steps": 8, "most_steps": 16, "hardest": 4,
                    "eval_difficulties": (2, 3, 4, 5, 6), "num_train": 0, "max_length": 96},
    }  # fmt: skip
    common = {"dropout": 0.0, "per_bucket": 500}
    config = _with(f"depth_recurrence_{fields['task']}", sizes[fields["task"]] | common | fields)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, embed_dim=64, num_heads=4, mlp_dim=128),
        data=dataclasses.replace(config.data, batch_size=32),
        train=dataclasses.replace(config.train, num_steps=1500),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3),
    )


def _stress(fields: dict[str, Any]) -> Any:
    steps = {"min_steps": 24, "max_steps": 24}
    config = _with("depth_recurrence_reachability_tiny", steps | fields)
    optimizer = {"learning_rate": 3e-3, "clip_norm": 0.0}
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, num_steps=600),
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
    )


def _with(preset: str, fields: dict[str, Any]) -> Any:
    from jaxlib_methods.train import presets

    config = presets.get(preset)
    own = {field.name for field in dataclasses.fields(config.method_config)}
    method = {name: value for name, value in fields.items() if name in own}
    model = {name: value for name, value in fields.items() if name not in own}
    method_config = dataclasses.replace(config.method_config, **method)
    if method_config.recurrence == "untied":  # which reads less than the preset gives
        method_config = method_config.untied()
    return dataclasses.replace(
        config,
        method_config=method_config,
        model=dataclasses.replace(config.model, **model),
    )


TABLES = {
    "small": (SMALL, _small),
    "paper": (PAPER, _paper),
    "logic": (LOGIC, _words),
    "kinship": (KINSHIP, _words),
    "stress": (STRESS, _stress),
}


def configs(table: str, root: pathlib.Path) -> list[Any]:
    """The runs of a table, arm by arm."""
    arms, make = TABLES[table]
    found = []
    for seed in SEEDS:  # a first look at every arm before the second seed of any
        for name, fields in arms.items():
            config = make(fields)
            found.append(
                dataclasses.replace(
                    config,
                    workdir=str(root / name / f"seed{seed}"),
                    seed=seed,
                    train=dataclasses.replace(
                        config.train,
                        eval_every=config.train.num_steps // 4,
                        log_every=1 if table == "stress" else 50,
                    ),
                    checkpoint=dataclasses.replace(config.checkpoint, every=0),
                )
            )
    return found


def grid(folder: pathlib.Path) -> dict[int, list[float]]:
    """Difficulty -> accuracy after 1, 2, ... steps, of a finished run; kept beside it."""
    kept = folder / "grid.json"
    if not kept.exists():
        kept.write_text(json.dumps(_measure(folder)))
    return {int(k): v for k, v in json.loads(kept.read_text()).items()}


def _measure(folder: pathlib.Path) -> dict[int, list[float]]:
    from jaxlib_methods.infer import restore, think_depth
    from jaxlib_methods.models import partitioning

    restored = restore.restore(str(folder), mesh=partitioning.make_mesh())
    found = think_depth.frontier(restored)
    return dict(zip(found.difficulties, found.accuracy, strict=True))


def spread(values: list[float]) -> str:
    """Mean and deviation over seeds."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def stress_outcome(folder: pathlib.Path, num_steps: int) -> str:
    """The step of a run's first training loss above `DIVERGED`, if any; its last accuracy."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    above = [step for step, value in losses.items() if value > DIVERGED]
    last = max(losses, default=0)
    if last < num_steps:
        return f"not finite at {last + 1}"
    key = "validation/accuracy"
    accuracy = [line[key] for line in lines if key in line][-1]
    return f"{above[0] if above else 'never'}, {accuracy:.3f}"


def show_stress(root: pathlib.Path) -> None:
    """Steps of each arm to the first loss that says that it has diverged, and where it ended."""
    print(f"\n### stress: first step with a training loss above {DIVERGED}, last accuracy\n")
    print(f"| arm | {' | '.join(f'seed {seed}' for seed in SEEDS)} |")
    print("|" + "---|" * (len(SEEDS) + 1))
    for name, fields in STRESS.items():
        folders = [root / name / f"seed{seed}" for seed in SEEDS]
        steps = _stress(fields).train.num_steps
        cells = [
            stress_outcome(folder, steps) if (folder / "metrics.jsonl").exists() else "-"
            for folder in folders
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def show(table: str, root: pathlib.Path) -> None:
    """Accuracy of each arm by difficulty at chosen numbers of steps."""
    if table == "stress":
        show_stress(root)
        return
    for name in TABLES[table][0]:
        done = [root / name / f"seed{seed}" for seed in SEEDS]
        grids = [grid(folder) for folder in done if (folder / "metrics.jsonl").exists()]
        if not grids:
            continue
        depth = len(next(iter(grids[0].values())))
        shown = [t for t in (1, 2, 3, 4, 5, 8, 12, 15, 20, 24) if t <= depth]
        print(f"\n### {name}, {len(grids)} seeds\n")
        print(f"| difficulty | {' | '.join(f'{t} steps' for t in shown)} |")
        print("|" + "---|" * (len(shown) + 1))
        for k in grids[0]:
            cells = [spread([found[k][t - 1] for found in grids]) for t in shown]
            print(f"| {k} | {' | '.join(cells)} |")


def main(argv: list[str]) -> None:
    """Trains what is missing and prints the tables."""
    del argv
    root = pathlib.Path(_WORKDIR.value).absolute()
    root.mkdir(parents=True, exist_ok=True)
    for table in _ONLY.value or TABLES:
        stress = table == "stress"
        pool.train_all(configs(table, root), root, workers=_WORKERS.value, may_diverge=stress)
    for table in _ONLY.value or TABLES:
        show(table, root)


if __name__ == "__main__":
    app.run(main)
