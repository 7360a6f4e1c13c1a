"""Operations that have no kernel here, against what moving their arrays takes.

    python tests/benchmarks/plain_ops.py
    python tests/benchmarks/plain_ops.py --dtype=bfloat16 --tokens=16384 --width=2048

Measured, as the models call them: the root-mean-square norm and its gradient, rotary positions of
the queries, the gate of SwiGLU and its gradient, a draw from the logits at a temperature and with
`top_p`, and attention of one new token to a cache. The roofline moves each argument and result
once; attention's operations are 4 B D T. Inside a model XLA fuses the elementwise ones with their
neighbours, so that what is measured here is the worst they can cost.
Goal on a GPU or TPU: at most twice the roofline; above it a kernel is worth a try.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
from absl import app, flags

from jaxlib_methods.models import decoding
from jaxlib_methods.models.layers import rms_norm, rotate
from jaxlib_methods.pallas_kernels.attention import Part, attend_parts

_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")
_TOKENS = flags.DEFINE_integer("tokens", 2048, "Tokens of a call.")
_WIDTH = flags.DEFINE_integer("width", 512, "Features of a token; heads have 64.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32768, "Logits of a draw.")
_ROWS = flags.DEFINE_integer("rows", 8, "Sequences that are decoded.")
_SLOTS = flags.DEFINE_integer("slots", 2048, "Tokens in the cache of each.")
HEAD_SIZE, GOAL = 64, 2.0


class Case(NamedTuple):
    """A function, its arguments, its tokens, and the operations of its matrix products."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    tokens: int
    flops: int = 0


def gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Of a function's result's gradient and its arguments: the gradients of these."""
    return lambda slope, *arrays: jax.vjp(function, *arrays)[1](slope)


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return rotate(x, (cos, sin))


def _gate(x: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(x) * up


def _draw(logits: jax.Array, sampling: decoding.SamplingConfig) -> jax.Array:
    return decoding.sample(logits, sampling, key=jax.random.key(0))


def _decode(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    seen = jnp.ones((query.shape[0], 1, key.shape[2]), bool)
    return attend_parts(query, [Part(key, value, seen)])


def cases() -> dict[str, Case]:
    """Of the flags' sizes."""
    N, D, B, T = _TOKENS.value, _WIDTH.value, _ROWS.value, _SLOTS.value
    heads = D // HEAD_SIZE
    draw = functools.partial(jax.random.normal, jax.random.key(0))
    x, wide = draw((N, D), _DTYPE.value), draw((N, 4 * D), _DTYPE.value)
    scale, logits = draw((D,)), draw((B, _VOCABULARY.value))
    turned = draw((1, N, heads, HEAD_SIZE), _DTYPE.value)
    angle = draw((1, N, HEAD_SIZE // 2))
    one, cache = (B, 1, heads, HEAD_SIZE), (B, heads, T, HEAD_SIZE)
    read = tuple(draw(shape, _DTYPE.value) for shape in (one, cache, cache))
    rules = [
        jax.tree.map(jnp.asarray, decoding.SamplingConfig(temperature=0.7, top_p=top_p))
        for top_p in (1.0, 0.9)
    ]
    norm = functools.partial(rms_norm, eps=1e-6)
    return {
        "norm": Case(norm, (x, scale), N),
        "norm, gradient": Case(gradient(norm), (x, x, scale), N),
        "rotary": Case(_turn, (turned, angle, angle), N),
        "gate": Case(_gate, (wide, wide), N),
        "gate, gradient": Case(gradient(_gate), (wide, wide, wide), N),
        "draw": Case(_draw, (logits, rules[0]), B),
        "draw, top_p": Case(_draw, (logits, rules[1]), B),
        "decode attention": Case(_decode, read, B, 4 * B * D * T),
    }


def main(_: list[str]) -> None:
    """Times each case beside its bounds."""
    for name, case in cases().items():
        program = jax.jit(case.function)
        result = jax.eval_shape(program, *case.arguments)
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((case.arguments, result)))
        runs: dict[str, harness.Candidate] = {name: functools.partial(program, *case.arguments)}
        times = harness.measure(runs | harness.bounds(case.flops, moved, _DTYPE.value))
        arrays = (x for x in case.arguments if isinstance(x, jax.Array))
        shapes = ", ".join(str(list(x.shape)) for x in arrays)
        title = f"{name}, {_DTYPE.value}, {shapes}"
        harness.report(title, times, reference=name, tokens_per_call=case.tokens)
        share = harness.report_roofline(times)[name]
        if jax.default_backend() != "cpu":
            harness.check_goal(f"{name} / roofline", 1 / share, limit=GOAL)


if __name__ == "__main__":
    app.run(main)
