"""Quality against compute: what more steps, more candidates and early stops give on a text.

One descent of one candidate and one of all of them, read after every step, give every budget.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlib_methods import energy_flops, losses, thinking, thinking_text
from jaxlib_methods.energy_text import Observed
from jaxlib_methods.infer import evaluate, report
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.correlation import correlation, moments
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.method import Batch
from jaxlib_methods.thinking import ThinkConfig
from jaxlib_methods.thinking_text import Thinker
from jaxlib_methods.train.config import DataConfig

DEFAULT_STEPS = 8
DEFAULT_CANDIDATES = 4
DEFAULT_BATCHES = 8
LARGEST_NATS = 700.0  # whose exponential is a float
STOPS: dict[Literal["energy", "entropy"], tuple[float, ...]] = {
    "energy": (0.02, 0.1, 0.5),
    "entropy": (0.1, 0.5, 1.0),
}


class Row(NamedTuple):
    """A way to think and what it gives.

    kind: `steps`, `candidates`, `choice` (another choice among all candidates), `stop_energy` or
    `stop_entropy`. steps: mean number that a candidate takes. flops: analytic, per token.
    gain: percent by which the perplexity is below that of the training number of steps.
    """

    kind: str
    name: str
    candidates: int
    steps: float
    nats_per_token: float
    perplexity: float
    flops: float
    gain: float


class Result(NamedTuple):
    """What thinking gives.

    rows: of the table. grid: nats per token `[step][candidates]`, by the selection. energies: mean
    final energy of one candidate after 1, 2, ... steps; text_energy: that of the text's own
    tokens. correlation: of final energy and loss over tokens, after reference_steps steps.
    """

    num_tokens: int
    reference_steps: int
    rows: list[Row]
    grid: list[list[float]]
    energies: list[float]
    text_energy: float
    correlation: float


class _Plan(NamedTuple):
    """one, several: with one candidate and with all, the same number of steps. reference: the
    training number of steps. stops: early ones, of one candidate."""

    one: Thinker
    several: Thinker
    reference: int
    stops: tuple[ThinkConfig, ...]


class _Read(NamedTuple):
    """Of every step, candidate and token, `[N, B, M, R]`: before is the energy before the step."""

    nll: jax.Array
    energy: jax.Array
    entropy: jax.Array
    before: jax.Array


def _plan(thinker: Thinker, asked: ThinkConfig) -> _Plan:
    reference = thinker.run.most_steps
    steps = max(asked.num_steps or DEFAULT_STEPS, reference)
    several = dataclasses.replace(asked, num_steps=steps, stop="none")
    one = dataclasses.replace(several, num_candidates=1)
    tolerances = STOPS | {
        kind: tuple(sorted({*STOPS[kind], asked.tolerance})) for kind in STOPS if kind == asked.stop
    }
    stops = tuple(
        dataclasses.replace(one, stop=kind, tolerance=tolerance)
        for kind, values in tolerances.items()
        for tolerance in values
    )
    return _Plan(
        dataclasses.replace(thinker, think=one),
        dataclasses.replace(thinker, think=several),
        reference,
        stops,
    )


def _read(thinker: Thinker, params: Any, context: Observed, targets: jax.Array) -> _Read:
    problem, candidates = thinker.problem(params, context)
    labels = jnp.broadcast_to(targets[:, None], candidates.shape[:-1])

    def read(z: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        nll = losses.token_nll(thinker.mask_padding(z), labels)
        assert problem.entropy is not None
        return nll, thinking.judge(problem, z, step), problem.entropy(z)

    before, (nll, energy, entropy) = thinking.trace(problem, candidates, thinker.think, read)
    return _Read(nll, energy, entropy, before)


@functools.partial(jax.jit, static_argnums=0)
def _measure(plan: _Plan, params: Any, batch: Batch) -> dict[str, Any]:
    """Sums over the batch's tokens, and the moments of energy and loss."""
    context = plan.one.observe(params, batch.inputs, batch.positions, batch.segments)
    several = _read(plan.several, params, context, batch.targets)
    if plan.one.think.noise == plan.several.think.noise:
        one = several  # its first candidate
    else:
        one = _read(plan.one, params, context, batch.targets)
    one = _Read(*(x[:, :, 0] for x in one))

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(batch.where, x, 0), axis=(-2, -1))

    text = thinking_text.score(plan.one.model, params, context, batch.targets)
    sums: dict[str, Any] = {
        "count": total(jnp.ones(batch.where.shape)),
        "nll": total(one.nll),
        "energy": total(one.energy),
        "text_energy": total(text),
        "stop": [total(x) for cfg in plan.stops for x in _stopped(cfg, one)],
    }
    sums |= {name: total(nll) for name, nll in _choices(plan.several.think, several).items()}
    at = plan.reference - 1
    sums["moments"] = moments(one.energy[at], one.nll[at], batch.where)
    return sums


def _stopped(cfg: ThinkConfig, one: _Read) -> tuple[jax.Array, jax.Array]:
    """Loss and number of steps of each token, `[B, R]`, where thinking stops early."""
    used = thinking.stop_steps(cfg, one.before, one.entropy)
    nll = jnp.take_along_axis(one.nll, used[None] - 1, axis=0)[0]
    return nll, used.astype(nll.dtype)


def _choices(cfg: ThinkConfig, read: _Read) -> dict[str, jax.Array]:
    """Losses: `grid` `[N, M, B, R]` of the first m candidates; of all, `[N, B, R]`, other ways."""
    first = jnp.broadcast_to(read.before[:1], read.energy.shape)
    nll, keys = read.nll, ("min_energy", "max_energy", "max_gap")
    scores = dict(zip(keys, (-read.energy, read.energy, first - read.energy), strict=True))

    def of(name: str, num_candidates: int) -> jax.Array:
        chosen = jnp.argmax(scores[name][:, :, :num_candidates], axis=2, keepdims=True)
        return jnp.take_along_axis(nll, chosen, axis=2)[:, :, 0]

    grid = [of(cfg.select, m + 1) for m in range(cfg.num_candidates)]
    found = {"grid": jnp.stack(grid, axis=1), "mean": nll.mean(axis=2), "oracle": nll.min(axis=2)}
    return found | {name: of(name, cfg.num_candidates) for name in keys}


def think(
    restored: Restored,
    data: DataConfig,
    asked: ThinkConfig,
    *,
    max_batches: int = DEFAULT_BATCHES,
) -> Result:
    """Every budget up to that of `asked`, on validation text.

    asked: the largest number of steps (none: 8, at least that of training) and of candidates; a
    stop in it joins those of the table. Raises ValueError where the run is no energy run.
    """
    plan = _plan(restored.require_thinker("think"), asked)
    plan.several.check_memory(data.batch_size * data.sequence_length)
    dataset = evaluate.open_validation(restored, data)
    totals: Any = None
    parts = []
    with jax.set_mesh(restored.mesh):
        for batch in evaluate.batches(dataset, data.batch_size, max_batches, restored):
            sums = jax.device_get(_measure(plan, restored.params, batch))
            parts.append(sums.pop("moments"))
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    count = totals.pop("count")
    means = jax.tree.map(lambda x: x / count, totals)
    return Result(
        int(count),
        plan.reference,
        list(_rows(plan, data.sequence_length, means)),
        means["grid"].tolist(),
        means["energy"].tolist(),
        float(means["text_energy"]),
        correlation(parts),
    )


def _rows(plan: _Plan, length: int, means: dict[str, Any]) -> Iterator[Row]:
    reference = float(means["nll"][plan.reference - 1])
    num_steps, several = len(means["nll"]), plan.several.think

    def row(kind: str, name: str, candidates: int, steps: float, nats: float) -> Row:
        gain = 100 * (1 - _exp(nats - reference))
        flops = _flops(plan, length, steps, candidates)
        return Row(kind, name, candidates, steps, nats, _exp(nats), flops, gain)

    for step, nats in enumerate(means["nll"], start=1):
        yield row("steps", f"{step} step{'s' * (step > 1)}", 1, step, float(nats))
    for index in range(several.num_candidates if several.num_candidates > 1 else 0):
        nats = float(means["grid"][-1][index])
        name = f"{several.select} of {index + 1}"
        yield row("candidates", name, index + 1, num_steps, nats)
    if several.num_candidates > 1:
        others = {"mean", "min_energy", "max_gap", "max_energy", "oracle"} - {several.select}
        for name in sorted(others):
            nats, count = float(means[name][-1]), several.num_candidates
            yield row("choice", f"{name} of {count}", count, num_steps, nats)
    stops = zip(means["stop"][::2], means["stop"][1::2], strict=True)
    for cfg, (nats, used) in zip(plan.stops, stops, strict=True):
        name = f"{cfg.stop} below {cfg.tolerance:g}"
        yield row(f"stop_{cfg.stop}", name, 1, float(used), float(nats))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < LARGEST_NATS else math.inf


def _flops(plan: _Plan, length: int, steps: float, candidates: int) -> float:
    model, cfg = plan.one.model, (plan.several if candidates > 1 else plan.one).think
    flops = energy_flops.think_flops(model, length, num_steps=steps, num_candidates=candidates)
    if cfg.accept == "always":
        return flops
    judged = 2 if cfg.noise else 1  # without noise, the energy before the step is there
    forward = sum(energy_flops.candidate_pass(model, length + model.shift))
    return flops + candidates * steps * judged * forward


def table(result: Result) -> str:
    """The rows as text, with what else was found."""
    lines = [
        f"{'':26}{'candidates':>10}{'steps':>8}{'nats/token':>12}{'perplexity':>12}"
        f"{'MFLOP/token':>13}{'gain %':>9}"
    ]
    for row in result.rows:
        mark = " *" if row.kind == "steps" and row.steps == result.reference_steps else ""
        lines.append(
            f"{row.name + mark:26}{row.candidates:10}{row.steps:8.2f}{row.nats_per_token:12.4f}"
            f"{row.perplexity:12.5g}{row.flops / 1e6:13.3f}{row.gain:9.4g}"
        )
    if any(row.kind.startswith("stop_") for row in result.rows):
        lines.append("Early stops count the steps that moved a token, as if it cost nothing after.")
    lines.append(
        f"* as trained. Energy {result.energies[result.reference_steps - 1]:.4f} there, "
        f"{result.text_energy:.4f} of the text itself; correlation of energy and loss "
        f"{result.correlation:.3f}."
    )
    return "\n".join(lines)


def draw(result: Result, path: epath.Path) -> bool:
    """Draws perplexity against FLOPs. Returns False, and says so, without matplotlib."""
    kinds = {
        "steps": ("o-", "more steps, one candidate"),
        "candidates": ("s-", "more candidates"),
        "stop_energy": ("^", "stopped by energy"),
        "stop_entropy": ("v", "stopped by entropy"),
    }

    def fill(figure: Any) -> None:
        panel = figure.subplots()
        for kind, (marker, label) in kinds.items():
            points = [(row.flops, row.perplexity) for row in result.rows if row.kind == kind]
            if points:
                panel.plot(*zip(*points, strict=True), marker, ms=5, label=label)
        trained = result.rows[result.reference_steps - 1]
        panel.plot(trained.flops, trained.perplexity, "k*", ms=12, label="as trained")
        panel.set_xscale("log")
        panel.set_xlabel("FLOPs per token")
        panel.set_ylabel("perplexity")
        panel.legend()

    return report.draw(path, (7, 4.5), fill)


def run(config: InferConfig, restored: Restored) -> None:
    """Prints the table, draws it, and writes JSON where `output` is given."""
    fields: dict[str, Any] = {"num_candidates": DEFAULT_CANDIDATES, **config.think}
    asked = ThinkConfig(**fields)
    restored.require_thinker("think")
    data = evaluate.data_config(restored, config.data)
    result = think(restored, data, asked, max_batches=config.eval_batches or DEFAULT_BATCHES)
    name = report.name(config, restored)
    print(f"{name}: {result.num_tokens:,} tokens of validation text\n{table(result)}")
    values = result._asdict() | {"rows": [row._asdict() for row in result.rows]}
    report.write(config, restored, values, lambda path: draw(result, path))
