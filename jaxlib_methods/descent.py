"""Descending an energy, with an outer derivative that is exact and needs little memory.

One step of Energy-Based Transformers (arXiv 2507.02092, eq. 1) on a candidate y:

    y' = y - alpha * grad_y sum(E(theta, x, y))

Its pullback of a cotangent u, with v = alpha * u and the Hessian's symmetry, is one Jacobian-vector
product of a gradient, forward over reverse:

    (theta, x, y) <- (0, 0, u) - d/de grad_(theta, x, y) E(theta, x, y + e v)
    alpha         <- -<u, grad_y E>

so that a step saves its inputs and nothing of the energy's own computation, and only functions
whose first derivative can be pushed forward (tiled attention among them) are needed inside.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

# `energy(params, context, candidate) -> energies`: one energy for each part of the candidate that
# is judged alone (a position, an image); the parts do not see each other.
Energy = Callable[[Any, Any, jax.Array], jax.Array]
Memory = Literal["recompute", "save"]
Gradient = Literal["one_step", "all_steps"]


class Step(NamedTuple):
    """candidate: y'. energies: E(theta, x, y), before the step. slope: grad_y E there.

    Only the candidate carries a gradient.
    """

    candidate: jax.Array
    energies: jax.Array
    slope: jax.Array


class Trajectory(NamedTuple):
    """A descent of N steps; the leading axis of the fields is the step.

    candidates: `[N, ...]`, after each step. energies: `[N, ...]`, before each step.
    slopes: `[N]`, root mean square of grad_y E before each step.
    """

    candidates: jax.Array
    energies: jax.Array
    slopes: jax.Array


def descent_step(
    energy: Energy,
    params: Any,
    context: Any,
    candidate: jax.Array,
    step_size: jax.Array | float,
    *,
    memory: Memory = "recompute",
) -> Step:
    """One step down the energy, differentiable once in params, context, candidate and step size.

    params, context: pytrees; leaves that are not floating point have no gradient. What is
    differentiated in must be among them: where `energy` closes over it instead, `recompute` ends
    with JAX's CustomVJPException. candidate: floating point, any shape. step_size: of a shape that
    broadcasts to the candidate's.
    memory: `recompute` keeps the arguments and computes the energy again in the backward pass;
    `save` is plain reverse over reverse, which keeps what the gradient's computation needs (5 to
    11 times more) and saves one evaluation.
    """
    if memory not in ("recompute", "save"):
        raise ValueError(f"memory {memory!r} is unknown; choose one of ['recompute', 'save']")
    step = _recomputing if memory == "recompute" else _plain_step
    alpha = jnp.asarray(step_size, candidate.dtype)
    return cast(Step, step(energy, params, context, candidate, alpha))


def _slope(energy: Energy, params: Any, context: Any, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(grad_y sum E, E)."""

    def total(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        energies = energy(params, context, y)
        return energies.sum(), energies

    return jax.grad(total, has_aux=True)(y)


def _plain_step(energy: Energy, params: Any, context: Any, y: jax.Array, alpha: jax.Array) -> Step:
    slope, energies = _slope(energy, params, context, y)
    stop = jax.lax.stop_gradient
    return Step(y - alpha * slope, stop(energies), stop(slope))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputing(energy: Energy, params: Any, context: Any, y: jax.Array, alpha: jax.Array) -> Step:
    return _plain_step(energy, params, context, y, alpha)


_Inputs = tuple[Any, Any, jax.Array, jax.Array]


def _forward(
    energy: Energy, params: Any, context: Any, y: jax.Array, alpha: jax.Array
) -> tuple[Step, _Inputs]:
    return _plain_step(energy, params, context, y, alpha), (params, context, y, alpha)


def _backward(energy: Energy, saved: _Inputs, cotangent: Step) -> _Inputs:
    params, context, y, alpha = saved
    u = cotangent.candidate
    leaves, treedef = jax.tree.flatten((params, context))
    floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def total(moving: list[jax.Array], y: jax.Array) -> jax.Array:
        parts = iter(moving)
        whole = [next(parts) if f else leaf for f, leaf in zip(floating, leaves, strict=True)]
        params, context = treedef.unflatten(whole)
        return energy(params, context, y).sum()

    moving = [leaf for f, leaf in zip(floating, leaves, strict=True) if f]
    gradient: Any = jax.grad(total, argnums=(0, 1))
    (_, slope), (of_moving, of_y) = jax.jvp(lambda y: gradient(moving, y), (y,), (alpha * u,))
    found = iter(of_moving)
    cotangents = [
        -next(found) if f else np.zeros(np.shape(leaf), jax.dtypes.float0)
        for f, leaf in zip(floating, leaves, strict=True)
    ]
    of_params, of_context = treedef.unflatten(cotangents)
    return of_params, of_context, u - of_y, -_sum_to(u * slope, alpha.shape)


_recomputing.defvjp(_forward, _backward)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of broadcasting an array of `shape` to x's."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    stretched = tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1)
    return x.sum(axis=stretched, keepdims=True)


def _identity(candidate: jax.Array, step: jax.Array) -> jax.Array:
    del step
    return candidate


def _same_context(context: Any, step: jax.Array) -> Any:
    del step
    return context


def descend(
    energy: Energy,
    params: Any,
    context: Any,
    candidate: jax.Array,
    *,
    step_size: jax.Array | float,
    num_steps: int,
    start: Callable[[jax.Array, jax.Array], jax.Array] = _identity,
    context_at: Callable[[Any, jax.Array], Any] = _same_context,
    gradient: Gradient = "all_steps",
    memory: Memory = "recompute",
) -> Trajectory:
    """N steps down an energy; exact outer derivatives through any of the candidates.

        y_k = start(z_k, k);   z_(k+1) = y_k - alpha * grad_y E(theta, context_at(x, k), y_k)

    params, context: all that is differentiated in, never closed over; see `descent_step`.
    candidate: z_0. step_size: alpha, of a shape that broadcasts to the candidate's. num_steps: a
    Python int; `descend_freely` takes an array.
    start: from what a step left to where the next one begins (noise, a projection); k is an int32
    array. context_at: the context of step k. gradient: `all_steps` differentiates through the
    whole descent; `one_step` takes each z_k as a constant, so that what is computed from
    `candidates[k]` has the gradient of step k alone.
    memory: per step, see `descent_step`. Either way a step keeps where it began and ended, and its
    context where that is another in each step.
    Raises ValueError for a number of steps below 1 and for an unknown policy.

    >>> import jax.numpy as jnp
    >>> bowl = lambda a, x, y: 0.5 * a * (y - x) ** 2
    >>> descend(bowl, 1.0, 3.0, jnp.zeros(1), step_size=0.5, num_steps=2).candidates[:, 0].tolist()
    [1.5, 2.25]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1: a descent takes a step")
    if gradient not in ("one_step", "all_steps"):
        raise ValueError(
            f"gradient {gradient!r} is unknown; choose one of ['one_step', 'all_steps']"
        )

    def body(z: jax.Array, k: jax.Array) -> tuple[jax.Array, Trajectory]:
        y = start(jax.lax.stop_gradient(z) if gradient == "one_step" else z, k)
        step = descent_step(energy, params, context_at(context, k), y, step_size, memory=memory)
        slope = jnp.sqrt(jnp.mean(jnp.square(step.slope)))
        return step.candidate, Trajectory(step.candidate, step.energies, slope)

    return jax.lax.scan(body, candidate, jnp.arange(num_steps))[1]


def descend_freely(
    energy: Energy,
    params: Any,
    context: Any,
    candidate: jax.Array,
    *,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    start: Callable[[jax.Array, jax.Array], jax.Array] = _identity,
    context_at: Callable[[Any, jax.Array], Any] = _same_context,
) -> jax.Array:
    """The candidate after `num_steps` steps of `descend`, 0 or more, without any derivative.

    num_steps may be an array: one compiled program for every number.
    """
    params, context, candidate = jax.lax.stop_gradient((params, context, candidate))
    alpha = jax.lax.stop_gradient(jnp.asarray(step_size, candidate.dtype))

    def body(k: jax.Array, z: jax.Array) -> jax.Array:
        y = start(z, k)
        return _plain_step(energy, params, context_at(context, k), y, alpha).candidate

    return jax.lax.fori_loop(0, num_steps, body, candidate)
