"""Experiments R1 to R8 on recurrent-depth language models, at half a million parameters.

    python tests/experiments/recurrent_depth.py --workdir=runs/recurrent_experiments

Every run is the library's own trainer on the standard library's source, paired by seed: the same
batches. One process per core; a run that is finished is not trained again, so that the command may
be interrupted. Prints Markdown tables and what each experiment asks for.
"""

import dataclasses
import json
import os
import pathlib
from statistics import mean, stdev
from typing import Any

import pool
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "runs/recurrent_experiments", "Where the runs are kept.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes, one core each.")
_STEPS = flags.DEFINE_integer("steps", 800, "Optimiser steps of a run.")
_SEEDS = flags.DEFINE_multi_integer("seed", [0, 1, 2], "Seeds; repeatable.")

# Arm -> fields of the model that differ from the first arm's. A step of `base` takes as many FLOPs
# as one of 13 plain blocks; `plain` has its blocks, `twin` its parameters, each used once.
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "fixed": {"recurrence_sampling": "fixed"},
    "no_injection": {"injection": "none"},
    "k1": {"backprop_steps": 1},
    "k8": {"backprop_steps": 8},
    "twin": {"recurrence": 1, "recurrence_sampling": "fixed", "backprop_steps": None},
    "plain": {"recurrence": 0, "backprop_steps": None, "kernel_init": "scaled"},
    "plain_flops": {
        "recurrence": 0, "backprop_steps": None, "kernel_init": "scaled", "num_layers": 13,
    },
}  # fmt: skip
RECURRENT = [name for name, fields in ARMS.items() if "recurrence" not in fields]
PROMPTS, NEW_TOKENS = 8, 40
SAMPLERS: dict[str, dict[str, Any]] = {
    "r' = 4": {},
    "r' = 2": {"inner_steps": 2},
    "r' = 1": {"inner_steps": 1},
    "noise 0.5": {"noise": 0.5},
    "wave of 2": {"max_wave": 2},
    "speculative, 2 of 8": {"sampler": "speculative", "draft_steps": 2},
    "continuous, KL": {"sampler": "continuous", "exit": "kl"},
}


def config_of(arm: str, seed: int, root: pathlib.Path) -> Any:
    """The arm as a RunConfig: 32 x 64 bytes a step."""
    from jaxlib_methods import registry
    from jaxlib_methods.train import presets

    base = presets.get("depth_recurrence_tiny")
    model = dataclasses.replace(base.model, **ARMS[arm])
    method = base.method if model.recurrence else "next_token"
    method_config = base.method_config if model.recurrence else registry.config_class(method)()
    return dataclasses.replace(
        base,
        method=method,
        method_config=method_config,
        model=model,
        seed=seed,
        workdir=str(root / arm / f"seed{seed}"),
        data=dataclasses.replace(base.data, sequence_length=64, batch_size=32),
        train=dataclasses.replace(
            base.train, num_steps=_STEPS.value, eval_every=_STEPS.value, log_every=50
        ),
        optimizer=dataclasses.replace(base.optimizer, weight_decay=0.01),
        checkpoint=dataclasses.replace(base.checkpoint, every=0),
    )


def restored(folder: pathlib.Path, **depth: Any) -> Any:
    """A finished run."""
    from jaxlib_methods.infer import restore
    from jaxlib_methods.models import partitioning

    return restore.restore(str(folder), mesh=partitioning.make_mesh(), depth=depth)


def kept(path: pathlib.Path, measure: Any) -> Any:
    """What `measure()` gives, measured once and kept as JSON."""
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def depths(folder: pathlib.Path) -> Any:
    """`infer.think_language` to six times the usual number of iterations."""

    def measure() -> Any:
        from jaxlib_methods.infer import think_language

        found = restored(folder, num_steps=48)
        thinking = think_language.think(found, found.config.data)
        parts = {"steps": thinking.steps, "exits": thinking.exits}
        rows = {name: [row._asdict() for row in part] for name, part in parts.items()}
        return {**rows, "gradients": thinking.gradients}

    return kept(folder / "depths.json", measure)


def sampled(folder: pathlib.Path, temperature: float) -> Any:
    """Sampler -> (share of tokens that are those of one after the other, passes a token)."""

    def measure() -> Any:
        import jax
        import numpy as np

        from jaxlib_methods import continuous, depth_sampling, speculative, wavefront
        from jaxlib_methods.models import decoding
        from jaxlib_methods.train import data

        run = restored(folder)
        sampling = decoding.SamplingConfig(temperature=temperature)
        text = data.open_dataset(run.config.data, run.tokenizer, split="validation")
        tokens = text.rows(range(PROMPTS)).inputs[:, :40]
        lengths = np.full(PROMPTS, 40, np.int32)
        draws = depth_sampling.make_draws(sampling, jax.random.key(0))
        samplers = {
            "speculative": speculative.SPECULATIVE,
            "continuous": continuous.CONTINUOUS,
            "parallel": wavefront.PARALLEL,
        }
        found = {}
        expected = None
        every = {"one after the other": {"sampler": "continuous"}, **SAMPLERS}
        for name, fields in every.items():
            depth = {"sampler": "parallel", **fields}
            model = restored(folder, num_steps=32 if "sampler" not in fields else 8, **depth)
            state = jax.jit(
                lambda params, model=model, depth=depth: samplers[depth["sampler"]].generate(
                    model.language_model, params, tokens, lengths, draws,
                    max_new_tokens=NEW_TOKENS,
                )
            )(model.params)  # fmt: skip
            new = np.asarray(state.tokens)
            expected = new if expected is None else expected
            passes = getattr(state, "serial_steps", getattr(state, "ticks", 0))
            found[name] = (float((new == expected).mean()), int(passes) / NEW_TOKENS)
        return found

    return kept(folder / f"sampled_{temperature}.json", measure)


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and deviation over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def row(*cells: str) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def show_depths(root: pathlib.Path) -> None:
    """R1, R2, R3, R7, R8: loss by iterations, change and gap, for every arm."""
    shown = (1, 2, 4, 8, 16, 32, 48)
    row("arm", *(f"r = {n}" for n in shown), "change at 4", "at 8", "gap at 8", "at 16")
    row(*["---"] * (len(shown) + 5))
    for arm in RECURRENT:
        steps = [
            {s["iterations"]: s for s in depths(root / arm / f"seed{seed}")["steps"]}
            for seed in _SEEDS.value
        ]
        cells = [
            spread([s[n]["nats_per_token"] for s in steps])
            if steps[0].get(n, {}).get("nats_per_token") is not None else "-"
            for n in shown
        ]  # fmt: skip
        extra = [
            spread([s[n][key] for s in steps], 4)
            for key, n in (("change", 4), ("change", 8), ("gap", 8), ("gap", 16))
        ]
        row(arm, *cells, *extra)
    for arm in set(ARMS) - set(RECURRENT):
        losses = [final(root / arm / f"seed{seed}") for seed in _SEEDS.value]
        row(arm, spread(losses), *["-"] * (len(shown) + 3))


def final(folder: pathlib.Path) -> float:
    """The last validation loss of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["validation/loss"] for line in lines if "validation/loss" in line][-1]


def show_exits(root: pathlib.Path) -> None:
    """R4: what early exits save."""
    row("exit", "iterations", "difference to 48", "correlation with entropy")
    row(*["---"] * 4)
    found = [depths(root / "base" / f"seed{seed}")["exits"] for seed in _SEEDS.value]
    for rows in zip(*found, strict=True):
        numbers = [[r[key] for r in rows] for key in ("mean", "difference", "correlation")]
        row(rows[0]["exit"], spread(numbers[0], 2), spread(numbers[1], 5), spread(numbers[2], 2))


def show_samplers(root: pathlib.Path) -> None:
    """R5 and R6: the same text as one token after the other, in fewer passes?"""
    row("sampler", "T = 0: agreement", "passes a token", "T = 0.8: agreement", "passes a token")
    row(*["---"] * 5)
    found = [
        [sampled(root / "base" / f"seed{seed}", t) for seed in _SEEDS.value] for t in (0.0, 0.8)
    ]
    for name in found[0][0]:
        cells = [[seeds[name][i] for seeds in part] for part in found for i in (0, 1)]
        row(name, *(spread(values) for values in cells))


def main(argv: list[str]) -> None:
    """Trains what is missing and prints the tables."""
    del argv
    root = pathlib.Path(_WORKDIR.value).absolute()
    root.mkdir(parents=True, exist_ok=True)
    runs = [config_of(arm, seed, root) for arm in ARMS for seed in _SEEDS.value]
    pool.train_all(runs, root, workers=_WORKERS.value)
    for title, show in (
        ("Loss by iterations", show_depths),
        ("Exits", show_exits),
        ("Samplers", show_samplers),
    ):
        print(f"\n### {title}\n")
        show(root)


if __name__ == "__main__":
    app.run(main)
