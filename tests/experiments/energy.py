"""Experiments E1 to E6 on energy-based transformers, and a scaling trend, on two CPU cores.

    python tests/experiments/energy.py --workdir=runs/energy_experiments

Every run is the library's own trainer on the standard library's source; arms of one seed see the
same batches. One process per core; a run that is finished is not trained again, so that the
command may be interrupted. Prints Markdown tables.
"""

import json
import math
import os
import pathlib
from statistics import mean, stdev
from typing import Any

import numpy as np
import pool
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "runs/energy_experiments", "Where the runs are kept.")
_ONLY = flags.DEFINE_list("only", [], "Names of tables; empty: all.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes, one core each.")

SEEDS = (0, 1, 2)
STEPS = 900
LONG_STEPS = 1500
RATE, PLAIN_RATE = 8e-3, 8e-3  # the best of those tried, see the table `rates`
RATES = (1e-3, 4e-3, 8e-3, 1.6e-2)
SIZES = {"d32": (2, 32), "d64": (2, 64), "d96": (3, 96)}
BUDGETS = (400, 1600)
CHOICES = ("mean of 8", "min_energy of 8", "max_energy of 8", "oracle of 8")
ALPHAS = (1.0, 5.0, 10.0, 50.0, 200.0)
SYSTEM_1: dict[str, Any] = {"num_steps": 2, "num_landscapes": 2, "step_size": 5.0}
SYSTEM_2: dict[str, Any] = {
    "num_steps": 2,
    "max_steps": 3,
    "step_size": 5.0,
    "learn_step_size": False,
    "random_step_size": 2.0,
    "noise": 3.0,
    "loss_steps": "last",
    "num_landscapes": 0,
}


def but(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The fields of `base` with some changed."""
    return {**base, **changes}


def run(
    name: str,
    seed: int,
    *,
    method: str = "energy",
    steps: int = STEPS,
    rate: float | None = None,
    size: str = "d64",
    **fields: Any,
) -> tuple[str, dict]:
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


def tables() -> dict[str, dict[str, dict[str, Any]]]:
    """Table -> its runs, by folder."""
    without: dict[str, dict[str, Any]] = {
        "full": {},
        "no_random_step_size": {"random_step_size": 1.0},
        "no_random_steps": {"max_steps": None},
        "no_noise": {"noise": 0.0},
        "no_replay": {"replay_size": 0},
    }
    plain: dict[str, Any] = {"method": "next_token"}
    three = but(SYSTEM_1, num_steps=3)
    equal_flops = round(flop_ratio() * STEPS)
    found = {
        "alphas": [
            run(f"alpha/{a:g}", 0, steps=300, **but(SYSTEM_1, step_size=a)) for a in ALPHAS
        ],
        "rates": [
            *(run(f"rate/s1_n3/{r}", 0, rate=r, **three) for r in RATES),
            *(run(f"rate/s2/{r}", 0, rate=r, **SYSTEM_2) for r in RATES),
            *(run(f"rate/plain/{r}", 0, rate=r, **plain) for r in (4e-3, 1.6e-2)),
        ],
        "systems": [
            arm
            for seed in SEEDS
            for arm in (
                run("plain", seed, **plain),
                run("s1_n3", seed, **but(three, num_landscapes=3)),
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
            run(f"long/{name}", 0, steps=LONG_STEPS, **{**SYSTEM_2, "replay_size": 192, **changed})
            for name, changed in without.items()
        ],
    }  # fmt: skip
    return {name: dict(jobs) for name, jobs in found.items()}


def final(folder: str, root: pathlib.Path) -> float:
    """Validation loss at a run's end, nats per byte."""
    from jaxlib_methods.train.plots import read_curves

    return read_curves(root / folder / "metrics.jsonl")["validation/loss"][1][-1]


def thought(folder: str, root: pathlib.Path, *, text: str = "", **fields: Any) -> Any:
    """`infer.think_energy` on a run, kept beside it. text: other than the run's validation set."""
    from jaxlib_methods.infer import restore
    from jaxlib_methods.infer import think_energy as think
    from jaxlib_methods.models import partitioning
    from jaxlib_methods.thinking import ThinkConfig

    name = "_".join([f"{k}{v:g}" for k, v in fields.items()] + ["other" if text else "same"])
    kept = root / folder / f"think_{name}.json"
    if kept.exists():
        values = json.loads(kept.read_text())
        return think.Result(**values | {"rows": [think.Row(*row) for row in values["rows"]]})
    found = restore.restore(str(root / folder), mesh=partitioning.make_mesh())
    assert found.config is not None
    data = found.config.data
    if text:
        data = type(data)(**{**vars(data), "validation_source": text})
    result = think.think(found, data, ThinkConfig(**fields), max_batches=16)
    kept.write_text(json.dumps(result._asdict()))
    return result


def by_kind(result: Any, kind: str) -> list[float]:
    """Nats per token of the rows of a kind, in their order."""
    return [row.nats_per_token for row in result.rows if row.kind == kind]


def named(result: Any, name: str) -> float:
    """Nats per token of one row."""
    return next(row.nats_per_token for row in result.rows if row.name.startswith(name))


def line(*cells: Any) -> None:
    """Prints a row of a Markdown table."""
    print("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |")


def header(*cells: str) -> None:
    """Prints the head of a Markdown table."""
    print()
    line(*cells)
    line(*["---"] * len(cells))


def image_configs(root: pathlib.Path) -> list[Any]:
    """The preset of images and its baseline, over all seeds; the seed draws other images too."""
    import dataclasses

    from jaxlib_methods.train import prepare, presets

    configs = []
    for seed in SEEDS:
        base = presets.get("energy_image_tiny")
        method = dataclasses.replace(base.method_config, data_seed=seed)
        workdir = str(root / "images" / f"seed{seed}")
        energy = dataclasses.replace(base, seed=seed, workdir=workdir, method_config=method)
        configs += [energy, prepare.baseline_of(energy)]
    return configs


def show_images(root: pathlib.Path) -> None:
    """PSNR against passes, mean and deviation over the seeds."""
    from jaxlib_methods.infer import denoise, restore
    from jaxlib_methods.models import partitioning

    found: dict[tuple[str, int, int], list[float]] = {}
    for seed in SEEDS:
        workdir, mesh = str(root / "images" / f"seed{seed}"), partitioning.make_mesh()
        run = restore.restore(workdir, mesh=mesh)
        assert run.config is not None
        images = run.config.method_config.dataset()("validation").rows(range(denoise.NUM_IMAGES))
        for row in denoise.measure(denoise.with_baseline(workdir, run, mesh=mesh), images):
            found.setdefault((row.model, row.noise_level, row.passes), []).append(row.psnr)
    header("model", "noise level", "passes", "PSNR, dB")
    for key, values in found.items():
        line(*key, f"{mean(values):.2f} ± {stdev(values):.2f}")


def show_alphas(root: pathlib.Path) -> None:
    """E4: the step size, and the loss that it begins with."""
    header("step size", "loss of the first 50 steps", "final validation loss")
    for folder, job in tables()["alphas"].items():
        from jaxlib_methods.train.plots import read_curves

        curves = read_curves(root / folder / "metrics.jsonl")
        line(job["fields"]["step_size"], curves["train/loss_first_step"][1][0], final(folder, root))


def show_slopes(root: pathlib.Path) -> None:
    """The first slope of the paper's smallest shape at its vocabulary, before any training."""
    import flax.linen as nn
    import jax

    from jaxlib_methods import energy
    from jaxlib_methods.energy_config import EnergyConfig
    from jaxlib_methods.models import energy_transformer
    from jaxlib_methods.models.config import PUBLISHED

    del root
    header("system", "root mean square of dE/dp, seeds 0 to 2")
    of_2 = {"max_steps": 3, "noise": 3.0, "loss_steps": "last", "learn_step_size": False}
    for name, cfg in (("1", EnergyConfig()), ("2", EnergyConfig(**of_2))):
        model = energy.model_config(PUBLISHED["ebt_xxs"], cfg)

        @jax.jit
        def slope(key: Any, model: Any = model, cfg: Any = cfg) -> Any:
            params = nn.meta.unbox(energy_transformer.init_params(model, key))
            return energy.first_slope(cfg, model, params, jax.random.fold_in(key, 1))

        line(name, ", ".join(f"{float(slope(jax.random.key(seed))):.2f}" for seed in range(3)))


def show_rates(root: pathlib.Path) -> None:
    """The learning rate of each arm, seed 0."""
    header("arm", "learning rate", "final validation loss")
    arms = {"s1_n3": "s1_n3", "s2": "s2", "plain": "plain"}
    for folder, job in tables()["rates"].items():
        line(folder.split("/")[1], str(job["rate"]), final(folder, root))
    for name in arms:
        if (root / name / "seed0").exists():
            line(name, str(PLAIN_RATE if name == "plain" else RATE), final(f"{name}/seed0", root))


def show_systems(root: pathlib.Path, text: str) -> None:
    """E1, E2, E3, E5 and the comparison with the plain transformer."""
    header("arm", "validation loss, mean ± deviation", "each seed")
    names = ("plain", "plain_flops", "s1_n2", "s1_n3", "s2")
    for name in names:
        each = [final(f"{name}/seed{seed}", root) for seed in SEEDS]
        spread = f"{mean(each):.4f} ± {stdev(each):.4f}"
        line(name, spread, ", ".join(f"{x:.3f}" for x in each))
    print("\nNats per byte after each step, and mean energies; correlation of energy and loss:")
    header("arm, seed, text", *(f"step {k}" for k in range(1, 9)), "energies", "correlation")
    several: list[tuple[Any, ...]] = []
    for name in names[2:]:
        for seed, where in [*((seed, "") for seed in SEEDS), (SEEDS[0], text)]:
            label = f"{name}, {seed}, {'other' if where else 'same'}"
            folder = f"{name}/seed{seed}"
            found = thought(
                folder, root, text=where, num_steps=8, num_candidates=8,
                noise=3.0 if name == "s2" else 0.0,
            )  # fmt: skip
            several.append((label, *(named(found, key) for key in CHOICES)))
            if name == "s2":  # one candidate without noise
                found = thought(folder, root, text=where, num_steps=8, noise=0.0)
            energies = ", ".join(f"{e:.2f}" for e in found.energies)
            line(label, *by_kind(found, "steps"), energies, found.correlation)
    print("\nEight candidates after eight steps, with the noise of training:")
    header("arm, seed, text", *CHOICES)
    for row in several:
        line(*row)


def show_long(root: pathlib.Path, text: str) -> None:
    """E6: what thinking gives after longer training, on the text and on another one."""
    header(
        "variant", "text", "3 steps", "gain of 10 steps, %", "best of 8 against mean, %", "oracle"
    )
    for folder, job in tables()["long"].items():
        noise = job["fields"]["noise"]
        for where in ("", text):
            found = thought(folder, root, text=where, num_steps=10, num_candidates=8, noise=noise)
            steps = by_kind(found, "steps")
            gains = (steps[9] - steps[2], named(found, CHOICES[1]) - named(found, CHOICES[0]))
            line(
                folder.split("/")[1],
                "other" if where else "same",
                steps[2],
                *(100 * (1 - math.exp(x)) for x in gains),
                named(found, "oracle"),
            )


def show_scaling(root: pathlib.Path) -> None:
    """log loss = c - a log(parameters) - b log(tokens), by least squares."""
    import jax

    from jaxlib_methods import registry

    header("arm", "parameters", "tokens", "validation loss")
    points: dict[str, list[tuple[float, float, float]]] = {"energy": [], "next_token": []}
    for folder, job in tables()["scaling"].items():
        config = config_of(folder, job, root)
        shapes = jax.eval_shape(
            lambda config=config: registry.init_model(
                config.method, config.model, config.method_config, jax.random.key(0)
            )
        )
        blocks = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["blocks"]))
        tokens, loss = job["steps"] * 1024, final(folder, root)
        points[job["method"]].append((blocks, tokens, loss))
        line(job["method"], blocks, tokens, loss)
    header("arm", "exponent of parameters", "exponent of tokens")
    for name, found in points.items():
        values = np.log(np.array(found))
        matrix = np.column_stack([np.ones(len(values)), -values[:, :2]])
        solution, residual, *_ = np.linalg.lstsq(matrix, values[:, 2], rcond=None)
        variance = residual[0] / (len(values) - 3)
        errors = np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)) * variance)
        fitted = zip(solution[1:], errors[1:], strict=True)
        line(name, *(f"{x:.3f} ± {e:.3f}" for x, e in fitted))


def main(argv: list[str]) -> None:
    """Trains what is missing and prints the tables."""
    del argv
    root = pathlib.Path(_WORKDIR.value).absolute()
    root.mkdir(parents=True, exist_ok=True)
    all_tables: dict[str, dict[str, dict[str, Any]]] = {**tables(), "images": {}, "slopes": {}}
    chosen = {k: v for k, v in all_tables.items() if not _ONLY.value or k in _ONLY.value}
    jobs = {folder: job for table in chosen.values() for folder, job in table.items()}
    configs = [config_of(*item, root) for item in jobs.items()]
    configs += image_configs(root) if "images" in chosen else []
    pool.train_all(configs, root, workers=_WORKERS.value)
    text = str(pathlib.Path(__file__).resolve().parents[2] / "LICENSE")
    shows: dict[str, Any] = {
        "alphas": show_alphas, "rates": show_rates, "scaling": show_scaling, "images": show_images,
        "slopes": show_slopes,
        "systems": lambda root: show_systems(root, text),
        "long": lambda root: show_long(root, text),
    }  # fmt: skip
    for name in chosen:
        print(f"\n### {name}")
        shows[name](root)


if __name__ == "__main__":
    app.run(main)
