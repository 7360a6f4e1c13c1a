"""Experiments M1 to M5 (RMT) and R1 to R5 (RLP), and RL on a task behind them, at 0.16 million
parameters.

    python tests/experiments/reinforcement.py --workdir=runs/reinforcement_experiments

Every run is the library's own trainer, paired by seed: the arms of a seed begin with the same
weights and see the same data. A run that is finished is not trained again, so that the command may
be interrupted. Prints Markdown tables and what each experiment asks for.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import pool
from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string("workdir", "runs/reinforcement_experiments", "Where runs are kept.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes, one core each.")
_SEEDS = flags.DEFINE_multi_integer("seed", [0, 1, 2], "Seeds; repeatable.")
_ONLY = flags.DEFINE_list("only", [], "parity, text, questions; empty: all.")

RMT, RLP = "reinforcement_midtraining_parity", "reinforcement_midtraining_parity_rlp"
TINY = "reinforcement_midtraining_tiny"
QUESTIONS = "reinforcement_midtraining_questions"

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
    "RPT": (
        TINY,
        {"positions": "hard", "length_weight": 0.0, "ntp_weight": 0.0, "reward": "prefix_match"},
    ),
    "next tokens, same steps": (TINY, {"rl_weight": 0.0}),
    "next tokens, same FLOPs": (TINY, {"rl_weight": 0.0, "num_steps": None}),
    "RLP": (TINY, RLP_ON_TEXT),
    "RLP, next tokens weigh 0.1": (TINY, RLP_ON_TEXT | {"ntp_weight": 0.1}),
}
# Each is reinforcement learning on questions, behind the arm of parity of its name.
AFTER: dict[str, tuple[str, dict[str, Any]]] = {
    arm: (QUESTIONS, {}) for arm in ("cold start", "RMT", "RPT", "next tokens")
}
TABLES = {"parity": PARITY, "text": TEXT, "questions": AFTER}


def starts(table: str, root: pathlib.Path) -> list[list[Any]]:
    """What the runs of a table begin with, one stage after the other."""
    from jaxlib_methods.train import presets

    if table == "questions":
        arms = [arm for arm in AFTER if arm in PARITY]
        before = [config_of("parity", arm, seed, root) for arm in arms for seed in _SEEDS.value]
        return [*starts("parity", root), before]
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


def start_of(table: str, arm: str, seed: int, root: pathlib.Path) -> str:
    """The folder of the run that an arm begins with."""
    if table == "questions" and arm in PARITY:
        return config_of("parity", arm, seed, root).workdir
    stages = starts("parity" if table == "questions" else table, root)
    return stages[-1][_SEEDS.value.index(seed)].workdir


def config_of(table: str, arm: str, seed: int, root: pathlib.Path) -> Any:
    """An arm as a RunConfig."""
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
    start = start_of(table, arm, seed, root)
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


def fifth(lines: list[dict[str, float]], name: str, number: int) -> float | None:
    """The mean of a metric over a fifth of a run, 0 to 4; None where it has none."""
    size = lines[-1]["step"] / 5
    found = [line[name] for line in lines
             if name in line and number * size < line["step"] <= (number + 1) * size]  # fmt: skip
    return mean(found) if found else None


def tiers_drawn(runs: list[list[dict[str, float]]], number: int) -> str:
    """The shares of easy, medium and hard places in a fifth of runs, means over them."""
    names = [f"train/share_{tier}" for tier in ("easy", "medium", "hard")]
    shares = [[fifth(run, name, number) for run in runs] for name in names]
    known = [[value for value in values if value is not None] for values in shares]
    return " / ".join(f"{mean(values):.2f}" for values in known) if all(known) else "-"


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


def kept(folder: str, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was measured of a finished run, once."""
    path = pathlib.Path(folder) / name
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def worth_of_thoughts(folder: str, config: Any) -> dict[str, float]:
    """What thoughts at the first budget bring on other bits, at the end of a run (R1, R2, R4).

    Nats over none, of own thoughts and of those of other questions; how often the likeliest answer
    is right, after own thoughts and without.
    """
    import jax
    import jax.numpy as jnp

    from jaxlib_methods import reinforcement_collect as collect
    from jaxlib_methods import reinforcement_midtraining as rmt
    from jaxlib_methods import rollouts
    from jaxlib_methods.losses import token_nll
    from jaxlib_methods.tasks.parity import ParityDataset
    from jaxlib_methods.train import checkpoint, prepare

    mesh = prepare.mesh_of(config.mesh)
    params = checkpoint.load_pretrained(folder, mesh=mesh).params
    setting = rmt.make_setting(config.method_config, context_of(config))
    batch = jax.tree.map(jnp.asarray, ParityDataset("validation").rows(range(256)))

    def measure(params: Any) -> dict[str, jax.Array]:
        thoughts = collect.think(
            setting, params, batch, collect.tiers_of(setting, (), batch), jnp.ones(3),
            jnp.int32(config.method_config.budget), num_rollouts=1, key=jax.random.key(0),
        )  # fmt: skip
        asked, target = thoughts.asked, thoughts.asked.truths[:, 0]

        def judge(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            return -token_nll(logits, target).mean(), (jnp.argmax(logits, -1) == target).mean()

        def after(responses: Any) -> tuple[jax.Array, jax.Array]:
            logits = rollouts.thought_logits(
                setting.apply, params, thoughts.prompts, thoughts.lengths, responses,
                tokens=setting.tokens,
            )  # fmt: skip
            return judge(logits[:, 0])

        others = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), thoughts.responses)
        none = judge(rollouts.prefix_logits(setting.apply, params, asked.prefixes, asked.lengths))
        own, shuffled = after(thoughts.responses), after(others)
        return {
            "own gain": own[0] - none[0],
            "shuffled": shuffled[0] - none[0],
            "right after": own[1],
            "right without": none[1],
        }

    return {name: float(value) for name, value in jax.jit(measure)(params).items()}


def right_by_bits(folder: str, config: Any) -> dict[str, float]:
    """How often the drawn answer to a held-out question is right: to all, and by its bits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlib_methods import reinforcement_collect as collect
    from jaxlib_methods import reinforcement_midtraining as rmt
    from jaxlib_methods.train import checkpoint, prepare

    mesh = prepare.mesh_of(config.mesh)
    params = checkpoint.load_pretrained(folder, mesh=mesh).params
    context = context_of(config)
    setting = rmt.make_setting(config.method_config, context)
    dataset: Any = rmt.make(config.method_config, context).dataset
    questions = dataset("validation")
    batch = jax.tree.map(jnp.asarray, questions.rows(range(questions.num_examples)))

    @jax.jit
    def answer(params: Any) -> tuple[jax.Array, jax.Array]:
        thoughts = collect.think(
            setting, params, batch, collect.tiers_of(setting, (), batch), jnp.ones(3),
            jnp.int32(config.method_config.budget), num_rollouts=16, key=jax.random.key(0),
        )  # fmt: skip
        return thoughts.asked.lengths, collect.matches(setting, thoughts.asked, thoughts.responses)

    bits, right = map(np.asarray, answer(params))
    by_bits = {f"{n} bits": float(right[bits == n].mean()) for n in sorted(set(bits.tolist()))}
    return {"all": float(right.mean())} | by_bits


def show_parity(root: pathlib.Path) -> None:
    """M1 to M3, R1 to R4."""
    names = ("accuracy", "last accuracy", "thought", "budget", "distance", "reward", "fall")
    worth = ("own gain", "shuffled", "right after", "right without")
    row("arm", *names, *worth)
    row(*["---"] * (len(names) + len(worth) + 1))
    for arm in ("start", *PARITY):
        configs = [config_of("parity", "RLP" if arm == "start" else arm, seed, root)
                   for seed in _SEEDS.value]  # fmt: skip
        folders = [config.workdir for config in configs]
        cells = ["-"] * len(names)
        if arm == "start":
            folders = [config.checkpoint.init_from for config in configs]
        else:
            runs = [lines_of(pathlib.Path(folder)) for folder in folders]
            first = [next((x["train/accuracy"] for x in run if "train/accuracy" in x), None)
                     for run in runs]  # fmt: skip
            last = [
                [fifth(run, f"train/{name}", 4) for run in runs]
                for name in ("accuracy", "thought_length", "budget", "reward", "reward_fall")
            ]
            cells = [
                spread(first), spread(last[0]), spread(last[1], 1), spread(last[2], 1),
                spread([distance_to_budget(run) for run in runs]), spread(last[3]), spread(last[4]),
            ]  # fmt: skip
        found = [
            kept(folder, "worth.json", functools.partial(worth_of_thoughts, folder, config))
            for folder, config in zip(folders, configs, strict=True)
        ]
        row(arm, *cells, *(spread([one[name] for one in found]) for name in worth))


def show_text(root: pathlib.Path) -> None:
    """M4, M5 and R5: validation at the end, against where the runs began."""
    names = ("loss", "accuracy", "accuracy_easy", "accuracy_medium", "accuracy_hard",
             "plain_accuracy", "thought_length", "information_gain")  # fmt: skip
    row("arm", *names, "first reward", "places, first fifth", "places, last fifth")
    row(*["---"] * (len(names) + 4))
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
            *(tiers_drawn(runs, number) for number in (0, 4)),
        )


def show_questions(root: pathlib.Path) -> None:
    """Accuracy on held-out questions before, while and after each start learns them."""
    configs = {arm: [config_of("questions", arm, seed, root) for seed in _SEEDS.value]
               for arm in AFTER}  # fmt: skip
    runs = {arm: [lines_of(pathlib.Path(config.workdir)) for config in configs[arm]]
            for arm in AFTER}  # fmt: skip
    measured = {}
    for arm, seeds in configs.items():
        for config in seeds:
            folders = {"before": config.checkpoint.init_from, "after": config.workdir}
            for when, folder in folders.items():
                measured.setdefault((arm, when), []).append(
                    kept(folder, "questions.json", functools.partial(right_by_bits, folder, config))
                )
    steps = [line["step"] for line in runs["RMT"][0] if "validation/accuracy" in line]
    names = list(measured["RMT", "after"][0])
    row("start", *(f"before, {name}" for name in names), *(f"step {step}" for step in steps),
        "thought", *(f"after, {name}" for name in names))  # fmt: skip
    row(*["---"] * (2 * len(names) + len(steps) + 2))
    for arm in AFTER:
        during = [{line["step"]: line["validation/accuracy"] for line in run
                   if "validation/accuracy" in line} for run in runs[arm]]  # fmt: skip
        row(
            arm,
            *(spread([one[name] for one in measured[arm, "before"]]) for name in names),
            *(spread([run[step] for run in during]) for step in steps),
            spread([fifth(run, "train/thought_length", 4) for run in runs[arm]], 1),
            *(spread([one[name] for one in measured[arm, "after"]]) for name in names),
        )


def main(argv: list[str]) -> None:
    """Trains what is missing and prints the tables."""
    del argv
    logging.set_verbosity(logging.WARNING)  # app.run sets INFO, at which Orbax talks
    root = pathlib.Path(_WORKDIR.value).absolute()
    root.mkdir(parents=True, exist_ok=True)
    shows = {"parity": show_parity, "text": show_text, "questions": show_questions}
    for table in _ONLY.value or TABLES:
        for stage in starts(table, root):
            pool.train_all(stage, root, workers=_WORKERS.value)
        arms = [config_of(table, arm, s, root) for s in _SEEDS.value for arm in TABLES[table]]
        pool.train_all(arms, root, workers=_WORKERS.value)
    import jax  # after the workers, which choose their cores first

    # The seeds of an arm are measured by one program.
    jax.config.update("jax_compilation_cache_dir", str(root / "compilation_cache"))
    for table in _ONLY.value or TABLES:
        print(f"\n### {table}\n")
        shows[table](root)


if __name__ == "__main__":
    app.run(main)
