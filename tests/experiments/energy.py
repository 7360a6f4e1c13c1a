"""Experiments E1 to E6 on energy-based transformers, and a scaling trend, on two CPU cores.

    python tests/experiments/energy.py --workdir=runs/energy_experiments

Every run is the library's own trainer on the standard library's source; arms of one seed see the
same batches. One process per core; a run that is finished is not trained again, so that the
command may be interrupted. Prints Markdown tables.
"""

import dataclasses
import json
import math
import os
import pathlib
from statistics import mean, stdev
from typing import Any

import pool
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "runs/energy_experiments", "Where the runs are kept.")
_ONLY = flags.DEFINE_list("only", [], "Names of tables; empty: all.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes, one core each.")

SEEDS = (0, 1, 2)
STEPS = 900
LONG_STEPS = 3000
RATE, PLAIN_RATE = 2e-3, 8e-3  # the best of three each, see the table `rates`
SIZES = {"d32": (2, 32), "d64": (2, 64), "d96": (3, 96)}
BUDGETS = (400, 1600)
ALPHAS = (1.0, 5.0, 10.0, 50.0, 200.0)
SYSTEM_1 = {"num_steps": 2, "num_landscapes": 2, "step_size": 5.0}
SYSTEM_2 = {
    "num_steps": 2,
    "max_steps": 3,
    "step_size": 5.0,
    "learn_step_size": False,
    "random_step_size": 2.0,
    "noise": 3.0,
    "loss_steps": "last",
    "num_landscapes": 0,
}


def run(name: str, seed: int, *, method: str = "energy", steps: int = STEPS,
        rate: float | None = None, size: str = "d64", **fields: Any) -> tuple[str, dict]:  # fmt: skip
    """One run: its folder, and what `config_of` makes a RunConfig of."""
    if rate is None:
        rate = RATE if method == "energy" else PLAIN_RATE
    return f"{name}/seed{seed}", {
        "seed": seed, "method": method, "steps": steps, "rate": rate, "size": size,
        "fields": fields,
    }  # fmt: skip


def config_of(folder: str, job: dict[str, Any], root: pathlib.Path) -> Any:
    """The job as a RunConfig: 32 sequences of 32 bytes a step."""
    from jaxlib_methods import registry
    from jaxlib_methods.models.config import TransformerConfig
    from jaxlib_methods.train import config as c

    layers, width = SIZES[job["size"]]
    model = TransformerConfig(
        num_layers=layers, embed_dim=width, num_heads=4, mlp_dim=width, max_length=64,
        compute_dtype="float32",
    )  # fmt: skip
    return c.RunConfig(
        method=job["method"],
        method_config=registry.config_class(job["method"])(**job["fields"]),
        workdir=str(root / folder),
        seed=job["seed"],
        model=model,
        data=c.DataConfig(
            sequence_length=32, batch_size=32, shuffle_seed=job["seed"], num_threads=1
        ),
        train=c.TrainConfig(
            num_steps=job["steps"], eval_every=max(100, job["steps"] // 4), eval_batches=32,
            log_every=50,
        ),
        optimizer=c.OptimizerConfig(
            learning_rate=job["rate"], warmup_fraction=0.1, weight_decay=0.01
        ),
        checkpoint=c.CheckpointConfig(every=0, keep=1),
    )  # fmt: skip


def flop_ratio() -> float:
    """FLOPs of a System 1 training token over those of the plain transformer's."""
    from jaxlib_methods import energy_flops, flops
    from jaxlib_methods.energy import model_config
    from jaxlib_methods.energy_config import EnergyConfig

    model = config_of(*run("any", 0, **SYSTEM_1), pathlib.Path()).model
    energy = energy_flops.train_flops(
        model_config(model, EnergyConfig(**SYSTEM_1)), 32, free_steps=0, trained_steps=2
    )
    return energy / flops.transformer_train_flops(model, 32)


def tables() -> dict[str, dict[str, tuple[str, dict]]]:
    """Table -> its runs, by folder."""
    without = {
        "full": {},
        "no_random_step_size": {"random_step_size": 1.0},
        "no_random_steps": {"max_steps": None},
        "no_noise": {"noise": 0.0},
        "no_replay": {"replay_size": 0},
    }
    plain = {"method": "next_token"}
    equal_flops = round(flop_ratio() * STEPS)
    found = {
        "alphas": [
            run(f"alpha/{a:g}", 0, steps=300, **SYSTEM_1 | {"step_size": a}) for a in ALPHAS
        ],
        "rates": [
            *(run(f"rate/s1_n3/{r}", 0, rate=r, **SYSTEM_1 | {"num_steps": 3}) for r in (1e-3, 4e-3)),
            *(run(f"rate/s2/{r}", 0, rate=r, **SYSTEM_2) for r in (1e-3, 4e-3)),
            *(run(f"rate/plain/{r}", 0, rate=r, **plain) for r in (4e-3, 1.6e-2)),
        ],
        "systems": [
            arm
            for seed in SEEDS
            for arm in (
                run("plain", seed, **plain),
                run("s1_n3", seed, **SYSTEM_1 | {"num_steps": 3, "num_landscapes": 3}),
                run("s1_n2", seed, **SYSTEM_1),
                run("s2", seed, **SYSTEM_2),
                run("plain_flops", seed, steps=equal_flops, **plain),
            )
        ],
        "scaling": [
            run(f"scaling/{size}_{budget}/{method}", 0, method=method, steps=budget, size=size,
                **(SYSTEM_1 if method == "energy" else {}))
            for size in SIZES for budget in BUDGETS for method in ("energy", "next_token")
        ],
        "long": [
            run(f"long/{name}", 0, steps=LONG_STEPS, **SYSTEM_2 | {"replay_size": 192} | changed)
            for name, changed in without.items()
        ],
    }  # fmt: skip
    return {name: dict(jobs) for name, jobs in found.items()}


def main(argv: list[str]) -> None:
    """Trains what is missing and prints the tables."""
    del argv
    root = pathlib.Path(_WORKDIR.value).absolute()
    root.mkdir(parents=True, exist_ok=True)
    chosen = {k: v for k, v in tables().items() if not _ONLY.value or k in _ONLY.value}
    jobs = {folder: job for table in chosen.values() for folder, job in table.items()}
    pool.train_all([config_of(*item, root) for item in jobs.items()], root, workers=_WORKERS.value)


if __name__ == "__main__":
    app.run(main)
