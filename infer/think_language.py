"""What depth gives a recurrent language model, on validation text.

For each number of iterations the loss and how the state moves; for each early exit its loss and
the iterations that it takes; and the gradient of the loss in the state of each iteration.
"""

# Dimension key: B batch, L tokens, D width, N iterations, W tokens of a batch.

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import depth_language, flops, losses
from jaxlib_methods.depth_config import TOLERANCES, DepthConfig
from jaxlib_methods.depth_language import RecurrentModel, relative_change, start_state
from jaxlib_methods.infer import evaluate, report, think_language_report
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.correlation import correlation, moments
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.infer.think_language_report import Exit, Step, Thinking
from jaxlib_methods.method import Batch
from jaxlib_methods.models import recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train.config import DataConfig

DEFAULT_BATCHES = 8
DEEPEST = 4  # times the model's recurrence, where --depth.num_steps is not given


class _Plan(NamedTuple):
    """model: with the most iterations, without exits. steps: at which the loss is measured."""

    model: RecurrentModel
    steps: tuple[int, ...]
    exits: tuple[RecurrentModel, ...]


def _plan(restored: Restored) -> _Plan:
    asked, usual = restored.depth, restored.model.recurrence
    most = asked.num_steps or DEEPEST * usual
    plain = dataclasses.replace(asked, num_steps=most, exit="none", tolerance=None, min_steps=1)
    model = RecurrentModel(restored.model, plain, restored.seed)
    steps = {most, *(2**k for k in range(most.bit_length())), *((usual,) if usual < most else ())}
    rules: list[DepthConfig] = [
        dataclasses.replace(asked, num_steps=most, exit=kind, tolerance=None)
        for kind in TOLERANCES
        if kind != "none"
    ]
    if asked.exit != "none" and asked.threshold != TOLERANCES[asked.exit]:
        rules.append(dataclasses.replace(asked, num_steps=most))
    exits = [RecurrentModel(restored.model, rule, restored.seed) for rule in rules]
    return _Plan(model, tuple(sorted(steps)), tuple(exits))


def _read(model: RecurrentModel, params: Any, batch: Batch) -> recurrent_depth.Reading:
    return recurrent_depth.read(
        model.model, params, batch.inputs, positions=batch.positions, segments=batch.segments
    )[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trace(
    model: RecurrentModel, steps: tuple[int, ...], params: Any, batch: Batch
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Sums over tokens after each iteration, `[N]`, and the entropy of the last prediction.

    nll: of the `steps`, in other places 0. change, norm: see `movement`. gap: ||a - b|| / ||a|| of
    two states that began from different noise.
    """
    cfg, where = model.model, batch.where
    reading = _read(model, params, batch)
    other = dataclasses.replace(model, seed=model.seed + 1)
    starts = tuple(start_state(m, reading, batch.positions) for m in (model, other))
    measured = np.isin(np.arange(1, model.num_steps + 1), steps)

    def total(x: jax.Array) -> jax.Array:
        return jnp.where(where, x, 0).sum()

    def nll(state: jax.Array) -> jax.Array:
        logits, _, _ = recurrent_depth.predict(cfg, params, state, reading)
        return losses.token_nll(logits, batch.targets, where=where).sum()

    def body(states: Any, is_measured: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        new, second = (recurrent_depth.iterate(cfg, params, s, reading)[0] for s in states)
        zero = jnp.zeros((), jnp.float32)
        values = {
            "nll": jax.lax.cond(is_measured, nll, lambda _: zero, new),
            "change": total(relative_change(states[0], new)),
            "norm": total(jnp.linalg.norm(new.astype(jnp.float32), axis=-1)) / cfg.embed_dim**0.5,
            "gap": total(relative_change(second, new)),
        }
        return (new, second), values

    (last, _), sums = jax.lax.scan(body, starts, jnp.asarray(measured))
    log_p = jax.nn.log_softmax(recurrent_depth.predict(cfg, params, last, reading)[0], axis=-1)
    return sums, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _exit(
    model: RecurrentModel, params: Any, batch: Batch, entropy: jax.Array
) -> dict[str, jax.Array]:
    """Sum of the loss, tokens that took 0, 1, ... iterations, `moments` of those and entropy."""
    thought = depth_language.think_steps(
        model, params, batch.inputs, positions=batch.positions, segments=batch.segments
    )
    nll = losses.token_nll(thought.logits, batch.targets, where=batch.where)
    used = jnp.where(batch.where, thought.steps_used, 0)
    where = batch.where.astype(jnp.float32)
    counts = jnp.bincount(used.ravel(), weights=where.ravel(), length=model.num_steps + 1)
    both = moments(used.astype(jnp.float32), entropy, batch.where)
    return {"nll": nll.sum(), "counts": counts, "moments": both}


@functools.partial(jax.jit, static_argnums=(0, 1))
def state_gradients(model: RecurrentModel, num_steps: int, params: Any, batch: Batch) -> jax.Array:
    """|dL / ds_i|^2 for i = 0, ..., `num_steps`, `[num_steps + 1]`, in float32.

    L: the summed loss after that many iterations; the norm is that of all tokens' states, and
    every iteration is differentiated, those beyond the trained window too.
    """
    cfg, where = model.model, batch.where
    reading = _read(model, params, batch)

    def advance(state: jax.Array) -> jax.Array:
        return recurrent_depth.iterate(cfg, params, state, reading)[0]

    def loss(state: jax.Array) -> jax.Array:
        logits, _, _ = recurrent_depth.predict(cfg, params, state, reading)
        return losses.token_nll(logits, batch.targets, where=where).sum()

    def back(gradient: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient = jax.vjp(advance, state)[1](gradient)[0]
        return gradient, square(gradient)

    def square(x: jax.Array) -> jax.Array:
        return jnp.square(x.astype(jnp.float32)).sum()

    start = start_state(model, reading, batch.positions)
    last, before = jax.lax.scan(lambda s, _: (advance(s), s), start, None, length=num_steps)
    gradient = jax.grad(loss)(last)
    _, squares = jax.lax.scan(back, gradient, before, reverse=True)
    return jnp.concatenate([squares, square(gradient)[None]])


def think(restored: Restored, cfg: DataConfig, *, max_batches: int = DEFAULT_BATCHES) -> Thinking:
    """What more iterations, and ending them early, give on validation text.

    The restored `depth` says how many iterations at most (none: 4 times the model's recurrence),
    and an exit in it with a tolerance of its own joins those of the table.
    """
    plan = _plan(restored)
    usual = min(restored.model.recurrence, plan.model.num_steps)
    dataset = evaluate.open_validation(restored, cfg)
    totals: Any = None
    varied: list[list[np.ndarray]] = [[] for _ in plan.exits]
    with jax.set_mesh(restored.mesh):
        for batch in evaluate.batches(dataset, cfg.batch_size, max_batches, restored):
            trace, entropy = _trace(plan.model, plan.steps, restored.params, batch)
            sums = {
                "count": batch.where.sum(),
                "trace": trace,
                "exits": [_exit(m, restored.params, batch, entropy) for m in plan.exits],
                "gradients": state_gradients(plan.model, usual, restored.params, batch),
            }
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
            for parts, found in zip(varied, sums["exits"], strict=True):
                parts.append(found.pop("moments"))
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    correlations = [correlation(parts) for parts in varied]
    return _summarise(plan, cfg.sequence_length, totals, correlations)


def _summarise(
    plan: _Plan, length: int, totals: dict[str, Any], correlations: list[float]
) -> Thinking:
    cfg, count = plan.model.model, float(totals["count"])
    trace = {name: x / count for name, x in totals["trace"].items()}
    if cfg.injection == "none":
        trace["gap"] = np.full_like(trace["gap"], np.nan)  # the state begins at the embedding
    steps = [
        Step(
            iterations=i + 1,
            nats_per_token=float(trace["nll"][i]) if i + 1 in plan.steps else None,
            flops=flops.recurrent_forward_flops(cfg, length, num_steps=i + 1),
            change=float(trace["change"][i]),
            norm=float(trace["norm"][i]),
            gap=float(trace["gap"][i]),
        )
        for i in range(plan.model.num_steps)
    ]
    deepest = steps[-1].nats_per_token
    assert deepest is not None
    exits = [
        _exit_row(model, length, found, deepest=deepest, entropy_correlation=r)
        for model, found, r in zip(plan.exits, totals["exits"], correlations, strict=True)
    ]
    gradients = (np.sqrt(totals["gradients"]) / count).tolist()
    return Thinking(int(count), cfg.recurrence, cfg.trained_steps, steps, exits, gradients)


def _exit_row(
    model: RecurrentModel,
    length: int,
    found: dict[str, Any],
    *,
    deepest: float,
    entropy_correlation: float,
) -> Exit:
    cfg, depth, counts = model.model, model.depth, found["counts"]
    total = counts.sum()
    mean = float(counts @ np.arange(len(counts)) / total)
    p10, p50, p90 = (int(np.searchsorted(np.cumsum(counts), q * total)) for q in (0.1, 0.5, 0.9))
    nats = float(found["nll"] / total)
    checks = mean / depth.check_every if depth.checks_prediction else 0.0
    cost = flops.recurrent_forward_flops(cfg, length, num_steps=mean)
    return Exit(
        exit=depth.exit,
        tolerance=depth.threshold,
        mean=mean,
        p10=p10,
        p50=p50,
        p90=p90,
        nats_per_token=nats,
        difference=nats - deepest,
        flops=cost + checks * _predict_flops(cfg, length),
        correlation=entropy_correlation if (counts > 0).sum() > 1 else math.nan,
        shares=(counts / total)[1:].tolist(),
    )


def _predict_flops(cfg: TransformerConfig, length: int) -> float:
    """Forward FLOPs of the coda and the head, per token."""
    block = dataclasses.replace(cfg, num_layers=1, recurrence=0)
    each = flops.transformer_forward_flops(block, length, head=False)
    return cfg.coda_layers * each + 2.0 * cfg.embed_dim * cfg.padded_vocab_size


def run(config: InferConfig, restored: Restored) -> None:
    """Prints the tables, draws them, and writes JSON where `output` is given."""
    data = evaluate.data_config(restored, config.data)
    found = think(restored, data, max_batches=config.eval_batches or DEFAULT_BATCHES)
    print(
        f"{report.name(config, restored)}: {found.num_tokens:,} tokens of validation text\n"
        f"{think_language_report.table(found)}"
    )
    values = found._asdict()
    for name in ("steps", "exits"):
        values[name] = [row._asdict() for row in values[name]]
    report.write(config, restored, values, lambda path: think_language_report.draw(found, path))
