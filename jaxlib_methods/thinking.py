"""Thinking: how far to descend an energy, from how many starts, and which arrival to keep.

Energy-Based Transformers (arXiv 2507.02092) predict by descending an energy; more steps and more
candidates are more thinking (its sections on System 2). For each part of a prediction (a token, an
image) and its M candidates

    z_(k+1) = y_k - alpha * grad_y E(theta, x, y_k),   y_k = start(z_k, k),   k < N
    e_m = E(theta, x, y_N without noise);   the prediction is that of the m that `select` names

until the budget is spent or the part stops. Everything here works on any energy;
`jaxlib_methods.thinking_text` thinks about text.
"""

# Dimension key: B batch, M candidates, N steps.

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.descent import Energy, descent_step
from jaxlib_methods.models.config import check_choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkConfig:
    """How much to think.

    num_steps: descent steps, at most; none takes the largest number of training.
    num_candidates: starts of each prediction, of which `select` keeps one, position by position.
    step_size: of the descent; none is the trained one, below 1 a factor on it, else in its place.
    noise: standard deviation of the noise on the logits before each step; none is that of training
        for several candidates, which differ little without it, and that of evaluation (usually 0)
        for one, which noise would only blur.
    select: keep the lowest final energy, the largest fall of it, or (as a check) the highest.
    stop: a position stops early by `energy`, after the step before which the energy changed by
        less than `tolerance` times its first change, or by `entropy`, after the step that brings
        the prediction's entropy below `tolerance` nats.
    tolerance: see `stop`.
    accept: keep each step, or only where the energy without noise fell.
    """

    num_steps: int | None = None
    num_candidates: int = 1
    step_size: float | None = None
    noise: float | None = None
    select: Literal["min_energy", "max_gap", "max_energy"] = "min_energy"
    stop: Literal["none", "energy", "entropy"] = "none"
    tolerance: float = 0.02
    accept: Literal["always", "if_lower"] = "always"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("num_steps", "num_candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"think.{name}={value} must be at least 1")
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"think.step_size={self.step_size} must be positive, or none")
        for name in ("noise", "tolerance"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"think.{name}={value} must not be negative")


class Problem(NamedTuple):
    """What is descended: see `descent.descend` for the fields up to `context_at`.

    Candidates are `[B, M, ...]`; their energies too, of a shape that is the beginning of the
    candidates' and parts that do not see each other. `over_candidates` stands M candidates before
    an energy that takes one. settle: `start` without its noise; None where it has none.
    entropy: candidates -> nats, of the energies' shape; only for `stop=entropy`.
    """

    energy: Energy
    params: Any
    context: Any
    step_size: jax.Array | float
    start: Callable[[jax.Array, jax.Array], jax.Array] = lambda z, k: z
    context_at: Callable[[Any, jax.Array], Any] = lambda context, k: context
    settle: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    entropy: Callable[[jax.Array], jax.Array] | None = None


class Thought(NamedTuple):
    """candidate: `[B, ...]`, the chosen z. chosen: int32 `[B, ...]`, which one of M.

    Of all candidates, `[B, M, ...]`: energies, at the end and without noise, in the landscape of
    the budget's last step; first_energies, before the first step; steps_used, int32, how many
    steps moved the part. All parts are computed until the last has stopped, so that early stops
    save time only where a whole batch stops.
    """

    candidate: jax.Array
    chosen: jax.Array
    energies: jax.Array
    first_energies: jax.Array
    steps_used: jax.Array


def over_candidates(energy: Energy) -> Energy:
    """The energy of candidates `[B, M, ...]` in one context, from that of `[B, ...]`."""
    return jax.vmap(energy, in_axes=(None, None, 1), out_axes=1)


def judge(problem: Problem, candidates: jax.Array, step: jax.Array | int) -> jax.Array:
    """Energies of candidates without noise, as step `step` sees them."""
    at = jnp.asarray(step, jnp.int32)
    settled = (problem.settle or problem.start)(candidates, at)
    context = problem.context_at(problem.context, at)
    return problem.energy(problem.params, context, settled)


def think(problem: Problem, candidates: jax.Array, cfg: ThinkConfig) -> Thought:
    """Descends from all candidates, floating point `[B, M, ...]`, and keeps one of each part.

    No derivative. The loop ends when every part of the batch has stopped; a part that has stopped
    keeps its candidate. cfg: with its number of steps; its step size and noise are the problem's.
    Raises ValueError for a configuration that the problem does not allow.

    >>> import jax.numpy as jnp
    >>> double_well = Problem(lambda a, x, y: (y * y - 1) ** 2 + a * y, 0.3, None, 0.1)
    >>> start = jnp.array([[0.9, -0.9]])
    >>> found = think(double_well, start, ThinkConfig(num_steps=20, num_candidates=2))
    >>> found.chosen.tolist(), round(float(found.candidate[0]), 2)
    ([1], -1.04)
    """
    num_steps = _check(problem, candidates, cfg)
    problem = problem._replace(params=jax.lax.stop_gradient(problem.params))
    candidates = jax.lax.stop_gradient(candidates)
    energies = jax.eval_shape(lambda z: judge(problem, z, 0), candidates)
    zeros = jnp.zeros(energies.shape, energies.dtype)
    start = _Search(
        step=jnp.int32(0),
        candidates=candidates,
        running=jnp.ones(energies.shape, bool),
        steps_used=jnp.zeros(energies.shape, jnp.int32),
        first=zeros,
        previous=zeros,
        first_change=zeros,
    )
    found = jax.lax.while_loop(
        lambda search: (search.step < num_steps) & search.running.any(),
        functools.partial(_advance, problem, cfg),
        start,
    )
    final = judge(problem, found.candidates, num_steps - 1)
    score = {"min_energy": -final, "max_energy": final, "max_gap": found.first - final}
    chosen = jnp.argmax(score[cfg.select], axis=1).astype(jnp.int32)
    candidate = pick(found.candidates, chosen)
    return Thought(candidate, chosen, final, found.first, found.steps_used)


def pick(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """Of values `[B, M, ...]` those of the candidate `chosen` `[B, ...]` of each part."""
    index = jnp.expand_dims(chosen, 1)
    index = jnp.expand_dims(index, range(index.ndim, values.ndim))
    return jnp.take_along_axis(values, index, axis=1)[:, 0]


def trace(
    problem: Problem,
    candidates: jax.Array,
    cfg: ThinkConfig,
    read: Callable[[jax.Array, jax.Array], Any],
) -> tuple[jax.Array, Any]:
    """Every budget of 1 to N steps at once: the whole descent of `think`, without early stops.

    read: (candidates after a step, the step) -> a pytree. Returns the energies before each step
    `[N, B, M, ...]` and what was read, its leaves with a leading axis of steps.
    """
    num_steps = _check(problem, candidates, cfg)

    def body(z: jax.Array, step: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        z, energies = _step(problem, cfg, z, step)
        return z, (energies, read(z, step))

    return jax.lax.scan(body, jax.lax.stop_gradient(candidates), jnp.arange(num_steps))[1]


def stop_steps(cfg: ThinkConfig, energies: jax.Array, entropies: jax.Array) -> jax.Array:
    """How many steps `think` would take: int32, of the shape of a part.

    energies: `[N, ...]`, before each step; entropies: `[N, ...]`, after it; both from `trace`.
    """
    num_steps = energies.shape[0]
    if cfg.stop == "entropy":
        stops = entropies < cfg.tolerance
    else:
        changes = jnp.abs(jnp.diff(energies, axis=0))
        stops = changes < cfg.tolerance * changes[:1]
        stops = jnp.concatenate([jnp.zeros_like(energies[:1], bool), stops])
    first = jnp.argmax(stops, axis=0) + 1
    stopped = stops.any(axis=0) & (cfg.stop != "none")
    return jnp.where(stopped, first, num_steps).astype(jnp.int32)


def _check(problem: Problem, candidates: jax.Array, cfg: ThinkConfig) -> int:
    if cfg.num_steps is None:
        raise ValueError("think.num_steps is none; `resolve` fills in a run's own")
    if candidates.ndim < 2 or candidates.shape[1] != cfg.num_candidates:
        raise ValueError(
            f"candidates of shape {candidates.shape} are not [B, M, ...] with "
            f"M = think.num_candidates={cfg.num_candidates}"
        )
    if cfg.stop == "entropy" and problem.entropy is None:
        raise ValueError("think.stop=entropy needs an entropy of the candidates; give stop=energy")
    return cfg.num_steps


class _Search(NamedTuple):
    step: jax.Array
    candidates: jax.Array
    running: jax.Array
    steps_used: jax.Array
    first: jax.Array  # energies before step 0
    previous: jax.Array  # energies before the last step
    first_change: jax.Array  # |E_1 - E_0|


def _advance(problem: Problem, cfg: ThinkConfig, search: _Search) -> _Search:
    step, running = search.step, search.running
    moved, energies = _step(problem, cfg, search.candidates, step)
    change = jnp.abs(energies - search.previous)
    first_change = jnp.where(step == 1, change, search.first_change)
    stops = jnp.zeros_like(running)
    if cfg.stop == "energy":
        stops = (step >= 1) & (change < cfg.tolerance * first_change)
    elif cfg.stop == "entropy":
        assert problem.entropy is not None
        stops = problem.entropy(moved) < cfg.tolerance
    return _Search(
        step=step + 1,
        candidates=jnp.where(_beside(running, moved), moved, search.candidates),
        running=running & ~stops,
        steps_used=search.steps_used + running,
        first=jnp.where(step == 0, energies, search.first),
        previous=energies,
        first_change=first_change,
    )


def _step(
    problem: Problem, cfg: ThinkConfig, z: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The candidates after a step, and the energies before it."""
    start = problem.start(z, step)
    context = problem.context_at(problem.context, step)
    taken = descent_step(
        problem.energy, problem.params, context, start, problem.step_size, memory="save"
    )
    if cfg.accept == "always":
        return taken.candidate, taken.energies
    before = taken.energies if problem.settle is None else judge(problem, z, step)
    lower = judge(problem, taken.candidate, step) < before
    return jnp.where(_beside(lower, z), taken.candidate, z), taken.energies


def _beside(parts: jax.Array, candidates: jax.Array) -> jax.Array:
    """What holds for a part, in a shape that broadcasts to the candidates'."""
    return jnp.expand_dims(parts, range(parts.ndim, candidates.ndim))
