"""The elementwise end of a recurrent block, with its own derivative and with JAX's.

    python tests/benchmarks/recurrent_tail.py
    python tests/benchmarks/recurrent_tail.py --tokens=8192 --width=768

Measured: value and gradient of a chain of `--steps` steps, in which `recurrent_tail` stands between
two matrix products of the width (`tail`). Against: `recurrent_tail_reference` with JAX's derivative
(`plain`). Temporaries are what the compiler reserves. Counted by hand, of N tokens and width D: the
products cost 3 * 6 N D^2 operations a step; the tail alone reads 4 and writes 2 arrays forward, and
reads 6 and writes 4 in its derivative. The roofline has the operations of the products and the
bytes of the tails.
Goal: temporaries of `tail` at most 0.9 of those of `plain`.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxlib_methods.pallas_kernels.recurrent_tail import recurrent_tail, recurrent_tail_reference

_TOKENS = flags.DEFINE_integer("tokens", 64 * 20, "Tokens; the default is the preset's batch.")
_WIDTH = flags.DEFINE_integer("width", 128, "Width of the state.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps of the chain.")
GOAL, MEGABYTE = 0.9, 2**20
PRODUCTS = 3 * 6  # operations of a step in N D^2
ARRAYS = 6 + 10  # that the tail and its derivative read or write


def loss(op: Callable[..., Any], params: dict[str, jax.Array], state: jax.Array) -> jax.Array:
    """Of a chain of steps: two products (of what is normed, of the candidate) and the tail."""

    def body(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[Any, Any], None]:
        state, normed = carry
        update = jnp.tanh(normed @ params["mlp"])
        gate = update @ params["gate"][0] + state @ params["gate"][1] - 2.0
        tail = op(state, update, state, gate, **{k: params[k] for k in ("scale", "depth")},
                  norm_scale=params["norm_scale"], norm_bias=params["norm_bias"])  # fmt: skip
        return (tail.state, tail.normed), None

    (state, normed), _ = jax.lax.scan(body, (state, state), length=_STEPS.value)
    return jnp.sum(jnp.sin(state) * normed)


def main(_: list[str]) -> None:
    """Compiles, times, prints the rows and the goal."""
    N, D = _TOKENS.value, _WIDTH.value
    keys = jax.random.split(jax.random.key(0), 3)
    line = jnp.ones(D)
    params = {"scale": 0.1 * line, "depth": 0.1 * line, "norm_scale": line, "norm_bias": 0 * line}
    params["mlp"] = jax.random.normal(keys[0], (D, D)) * D**-0.5
    params["gate"] = jax.random.normal(keys[1], (2, D, D)) * D**-0.5
    state = jax.random.normal(keys[2], (N, D))
    programs, memory = {}, {}
    for name, op in {"plain": recurrent_tail_reference, "tail": recurrent_tail}.items():
        slope = jax.value_and_grad(functools.partial(loss, op))
        programs[name] = jax.jit(slope).lower(params, state).compile()
        analysis: Any = programs[name].memory_analysis()
        memory[name] = analysis.temp_size_in_bytes / MEGABYTE
    values = [float(program(params, state)[0]) for program in programs.values()]
    np.testing.assert_allclose(*values, rtol=1e-3)
    calls: dict[str, harness.Candidate] = {
        name: functools.partial(program, params, state) for name, program in programs.items()
    }
    flops, moved = PRODUCTS * N * D**2 * _STEPS.value, ARRAYS * state.nbytes * _STEPS.value
    times = harness.measure(calls | harness.bounds(flops, moved, state.dtype))
    title = f"{_STEPS.value} steps: {N} tokens, width {D}"
    harness.report(title, times, reference="plain", tokens_per_call=N)
    harness.report_roofline(times)
    print("\nTemporaries: " + ", ".join(f"{n} {m:.1f} MiB" for n, m in memory.items()))
    harness.check_goal("temporaries, tail / plain", memory["tail"] / memory["plain"], limit=GOAL)


if __name__ == "__main__":
    app.run(main)
