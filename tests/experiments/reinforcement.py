"""Experiments M1 to M5 (RMT) and R1 to R5 (RLP), at 0.16 million parameters.

    python tests/experiments/reinforcement.py --workdir=runs/reinforcement_experiments

Every run is the library's own trainer, paired by seed: the arms of a seed begin with the same
weights and see the same data. A run that is finished is not trained again, so that the command may
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

_WORKDIR = flags.DEFINE_string("workdir", "runs/reinforcement_experiments", "Where runs are kept.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes, one core each.")
_SEEDS = flags.DEFINE_multi_integer("seed", [0, 1, 2], "Seeds; repeatable.")
_ONLY = flags.DEFINE_list("only", [], "parity, text; empty: both.")

RMT, RLP = "reinforcement_midtraining_parity", "reinforcement_midtraining_parity_rlp"
TINY = "reinforcement_midtraining_tiny"

# Arm -> (preset, fields of its method, its trainer's and its optimiser's).
PARITY: dict[str, tuple[str, dict[str, Any]]] = {
    "RMT": (RMT, {}),
    "no length reward": (RMT, {"length_weight": 0.0}),
    "budget to 4": (RMT, {"budget_decay": 0.25}),
    "budget to 4, weight 0.7": (RMT, {"budget_decay": 0.25, "length_weight": 0.7}),
    "RPT": (RMT, {"length_weight": 0.0, "ntp_weight": 0.0, "reward": "prefix_match"}),
    "next tokens": (RMT, {"rl_weight": 0.0}),
    "RLP": (RLP, {}),
    "RLP, slow average": (RLP, {"ema_decay": 0.999, "rollouts": 16, "batch_size": 8}),
    "RLP, rate 5e-4": (RLP, {"learning_rate": 5e-4}),
}
RLP_ON_TEXT: dict[str, Any] = {
    "positions": "uniform",
    "reward": "information_gain",
    "advantage": "leave_one_out",
    "length_weight": 0.0,
    "ntp_weight": 0.0,
    "ema_decay": 0.98,
    "learning_rate": 1e-4,
}
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "RMT": (TINY, {}),
    "without next tokens": (TINY, {"ntp_weight": 0.0}),
    "next tokens weigh 1": (TINY, {"ntp_weight": 1.0}),
    "anywhere": (TINY, {"positions": "uniform"}),
    "hard only": (TINY, {"positions": "hard"}),
    "next tokens, same steps": (TINY, {"rl_weight": 0.0}),
    "next tokens, same FLOPs": (TINY, {"rl_weight": 0.0, "num_steps": None}),
    "RLP": (TINY, RLP_ON_TEXT),
    "RLP, next tokens weigh 0.1": (TINY, RLP_ON_TEXT | {"ntp_weight": 0.1}),
}
TABLES = {"parity": PARITY, "text": TEXT}


def starts(table: str, root: pathlib.Path) -> list[list[Any]]:
    """What the runs of a table begin with, one stage after the other."""
    from jaxlib_methods.train import presets

    names = [f"{RMT}_warm_up"] if table == "parity" else [f"{TINY}_base", f"{TINY}_warm_up"]
    stages = []
    for i, name in enumerate(names):
        stage = []
        for seed in _SEEDS.value:
            config = presets.get(name)
            begin = str(root / names[i - 1] / f"seed{seed}") if i else None
            stage.append(
                dataclasses.replace(
                    config,
                    seed=seed,
                    workdir=str(root / name / f"seed{seed}"),
                    checkpoint=dataclasses.replace(config.checkpoint, every=0, init_from=begin),
                )
            )
        stages.append(stage)
    return stages


def same_flops_steps(table: str) -> int:
    """Steps of next tokens alone that take as many FLOPs as the table's first arm."""
    from jaxlib_methods import flops
    from jaxlib_methods import reinforcement_midtraining as rmt
    from jaxlib_methods.train import presets

    config = presets.get(TABLES[table]["RMT"][0])
    length = config.data.sequence_length
    setting = rmt.make_setting(config.method_config, context_of(config))
    whole = rmt.train_flops(
        config.model, length, config.method_config, prompt_length=setting.prompt_length
    )
    return round(config.train.num_steps * whole / flops.train_flops(config.model, length))


def context_of(config: Any) -> Any:
    """What a method asks of a run, where no run is prepared."""
    from jaxlib_methods.method import Context
    from jaxlib_methods.train import checkpoint
    from jaxlib_methods.train.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer)
    return Context(
        model=config.model,
        num_steps=config.train.num_steps,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        tokenizer=tokenizer.fingerprint,
        load_pretrained=checkpoint.load_pretrained,
        tokens=tokenizer,
        init_from=config.checkpoint.init_from,
    )


def config_of(table: str, arm: str, seed: int, root: pathlib.Path) -> Any:
    """An arm as a RunConfig, which begins with the last of `starts`."""
    from jaxlib_methods.train import presets

    preset, fields = TABLES[table][arm]
    config, fields = presets.get(preset), dict(fields)
    if fields.get("num_steps", 0) is None:
        fields["num_steps"] = same_flops_steps(table)
    parts = {}
    for part in ("method_config", "train", "optimizer", "data"):
        value = getattr(config, part)
        known = {field.name for field in dataclasses.fields(value)}
        chosen = {name: fields.pop(name) for name in known & fields.keys()}
        parts[part] = dataclasses.replace(value, **chosen)
    assert not fields, fields
    start = starts(table, root)[-1][_SEEDS.value.index(seed)].workdir
    return dataclasses.replace(
        config,
        **parts,
        seed=seed,
        workdir=str(root / table / arm.replace(" ", "_").replace(",", "") / f"seed{seed}"),
        checkpoint=dataclasses.replace(config.checkpoint, every=0, init_from=start),
    )


def lines_of(folder: pathlib.Path) -> list[dict[str, float]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tail_mean(lines: list[dict[str, float]], name: str, share: float = 0.2) -> float | None:
    """The mean of a metric over the last part of a run; None where it has none."""
    last = lines[-1]["step"]
    found = [line[name] for line in lines if name in line and line["step"] > (1 - share) * last]
    return mean(found) if found else None


def spread(values: list[Any], digits: int = 3) -> str:
    """Mean and deviation over seeds."""
    if any(value is None for value in values):
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def row(*cells: str) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def distance_to_budget(lines: list[dict[str, float]]) -> float | None:
    """The largest relative distance of the mean thought to the budget from step 20 on."""
    found = [
        abs(line["train/thought_length"] / line["train/budget"] - 1)
        for line in lines
        if line["step"] >= 20 and "train/budget" in line
    ]
    return max(found) if found else None


def shuffled_gain(folder: pathlib.Path, config: Any) -> tuple[float, float]:
    """Nats that own thoughts give, and those of other prompts (R4)."""
    kept = folder / "shuffled.json"
    if not kept.exists():
        kept.write_text(json.dumps(_measure_gain(folder, config)))
    own, other = json.loads(kept.read_text())
    return own, other


def _measure_gain(folder: pathlib.Path, config: Any) -> tuple[float, float]:
    import jax
    import jax.numpy as jnp

    from jaxlib_methods import reinforcement_collect as collect
    from jaxlib_methods import reinforcement_midtraining as rmt
    from jaxlib_methods import rollouts
    from jaxlib_methods.tasks.parity import ParityDataset
    from jaxlib_methods.train import checkpoint, prepare

    mesh = prepare.mesh_of(config.mesh)
    params = checkpoint.load_pretrained(str(folder), mesh=mesh).params
    setting = rmt.make_setting(config.method_config, context_of(config))
    batch = jax.tree.map(jnp.asarray, ParityDataset("validation").rows(range(256)))

    def measure(params: Any) -> tuple[jax.Array, jax.Array]:
        thoughts = collect.think(
            setting, params, batch, collect.tiers_of(setting, (), batch), jnp.ones(3),
            jnp.int32(config.method_config.budget), num_rollouts=1, key=jax.random.key(0),
        )  # fmt: skip
        asked, target = thoughts.asked, thoughts.asked.truths[:, 0]
        plain = rollouts.prefix_log_probs(
            setting.apply, params, asked.prefixes, asked.lengths, target
        )

        def gain(responses: Any) -> jax.Array:
            with_thought = rollouts.target_log_probs(
                setting.apply, params, thoughts.prompts, thoughts.lengths, responses, target,
                tokens=setting.tokens,
            )  # fmt: skip
            return (with_thought[:, 0] - plain).mean()

        other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), thoughts.responses)
        return gain(thoughts.responses), gain(other)

    own, other = jax.jit(measure)(params)
    return float(own), float(other)


def show_parity(root: pathlib.Path) -> None:
    """M1 to M3, R1 to R4."""
    names = ("accuracy", "last accuracy", "thought", "budget", "distance", "reward", "fall",
             "own gain", "shuffled")  # fmt: skip
    row("arm", *names)
    row(*["---"] * (len(names) + 1))
    for arm in PARITY:
        configs = [config_of("parity", arm, seed, root) for seed in _SEEDS.value]
        folders = [pathlib.Path(config.workdir) for config in configs]
        runs = [lines_of(folder) for folder in folders]
        first = [next((x["train/accuracy"] for x in run if "train/accuracy" in x), None)
                 for run in runs]  # fmt: skip
        found = [
            [tail_mean(run, f"train/{name}") for run in runs]
            for name in ("accuracy", "thought_length", "budget", "reward", "reward_fall")
        ]
        gains = [shuffled_gain(*both) for both in zip(folders, configs, strict=True)]
        row(
            arm, spread(first), spread(found[0]), spread(found[1], 1), spread(found[2], 1),
            spread([distance_to_budget(run) for run in runs]), spread(found[3]),
            spread(found[4]), *(spread([gain[i] for gain in gains]) for i in (0, 1)),
        )  # fmt: skip


def show_text(root: pathlib.Path) -> None:
    """M4, M5 and R5: validation at the end, against where the runs began."""
    names = ("loss", "accuracy", "accuracy_easy", "accuracy_medium", "accuracy_hard",
             "plain_accuracy", "thought_length", "information_gain")  # fmt: skip
    row("arm", *names, "first reward")
    row(*["---"] * (len(names) + 2))
    begins = [pathlib.Path(config.workdir) for config in starts("text", root)[-1]]
    arms = {"start": begins} | {
        arm: [pathlib.Path(config_of("text", arm, seed, root).workdir) for seed in _SEEDS.value]
        for arm in TEXT
    }
    for arm, folders in arms.items():
        runs = [lines_of(folder) for folder in folders]
        last = [[x for x in run if "validation/loss" in x][-1] for run in runs]
        early = [
            [x["train/reward"] for x in run if "train/reward" in x][: len(run) // 4] for run in runs
        ]
        row(
            arm,
            *(spread([line.get(f"validation/{name}") for line in last]) for name in names),
            spread([mean(values) if values else None for values in early]),
        )


def main(argv: list[str]) -> None:
    """Trains what is missing and prints the tables."""
    del argv
    root = pathlib.Path(_WORKDIR.value).absolute()
    root.mkdir(parents=True, exist_ok=True)
    shows = {"parity": show_parity, "text": show_text}
    for table in _ONLY.value or TABLES:
        for stage in starts(table, root):
            pool.train_all(stage, root, workers=_WORKERS.value)
        arms = [config_of(table, arm, s, root) for s in _SEEDS.value for arm in TABLES[table]]
        pool.train_all(arms, root, workers=_WORKERS.value)
    for table in _ONLY.value or TABLES:
        print(f"\n### {table}\n")
        shows[table](root)


if __name__ == "__main__":
    app.run(main)
