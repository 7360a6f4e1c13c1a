"""Time and memory of attention and its derivatives against forms that keep all scores.

    python tests/benchmarks/attention.py --rounds=5 --calls=1
    python tests/benchmarks/attention.py --preset=late_to_early_7b --implementation=pallas

Candidates: `attention` in tiles of plain JAX (`tiles`); the same output by `attention_reference`
(`all scores`), by `jax.nn.dot_product_attention` (`jax.nn`) and by `peers`, causal, one document.
Operations: the output; the gradient of a loss of it; that gradient's derivative along the
arguments, forward over reverse and in reverse twice. The roofline counts the products by hand,
2 L^2 C operations each, of which causality leaves half: 2 in the output, 5 more in the gradient, 17
more in a second derivative; and each argument and result once. Memory: temporary bytes that the
compiler reserves; nothing is run for it.
Goals: twice the length takes at most 2.1 times the memory of the second derivative. On a GPU output
and gradient take no longer than any of the peers that has them (JAX's own kernel takes float16 and
bfloat16 and has no gradient of causal attention), and from 8192 tokens a second derivative takes a
third of what it takes with all scores.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import peers
from absl import app, flags

from jaxlib_methods.pallas_kernels.attention import (
    Keys,
    attention,
    attention_reference,
    visible,
)
from jaxlib_methods.train import presets

LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a row, for the times.")
HEADS = flags.DEFINE_integer("heads", 4, "Query heads.")
KEY_HEADS = flags.DEFINE_integer("key_heads", 4, "Key heads.")
HEAD_SIZE = flags.DEFINE_integer("head_size", 64, "Features of a head.")
DTYPES = flags.DEFINE_list("dtypes", ["float32"], "Of queries, keys and values.")
MEMORY = flags.DEFINE_list("memory", ["512", "1024", "2048", "4096", "8192"], "Lengths; empty: no.")
PRESET = flags.DEFINE_string("preset", None, "Length, heads and dtype of its model instead.")
IMPLEMENTATION = flags.DEFINE_enum("implementation", "xla", ["xla", "pallas"], "Of `tiles`.")

PRODUCTS = {"output": 2, "gradient": 7, "forward over reverse": 24, "reverse twice": 24}
SECOND = ("forward over reverse", "reverse twice")
GROWTH, LONG, FASTER = 2.1, 8192, 1 / 3
MEGABYTE = 2**20

Attend = Callable[[Any], jax.Array]  # of (query, key, value)


def _index(query: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(query.shape[1])[None], query.shape[:2])


def _tiles(arrays: Any) -> jax.Array:
    query, key, value = arrays
    index = _index(query)
    at: dict[str, Any] = {"positions": index, "segments": jnp.ones_like(index)}
    implementation: Any = IMPLEMENTATION.value
    context = Keys(key, value, *at.values())
    return attention(query, context, implementation=implementation, **at)[0]


def _all_scores(arrays: Any) -> jax.Array:
    index = _index(arrays[0])
    ones = jnp.ones_like(index)
    return attention_reference(*arrays, where=visible(index, index, ones, ones))


def _jax_nn(arrays: Any) -> jax.Array:
    return jax.nn.dot_product_attention(*arrays, is_causal=True)


CANDIDATES: dict[str, Attend] = {
    "tiles": _tiles,
    "all scores": _all_scores,
    "jax.nn": _jax_nn,
}


def operation(name: str, attend: Attend) -> Callable[[Any, Any], Any]:
    """A function of the arguments and of a direction of the same shapes."""

    def loss(arrays: Any) -> jax.Array:
        return jnp.sum(jnp.sin(attend(arrays).astype(jnp.float32)))

    gradient = jax.grad(loss)

    def along(arrays: Any, way: Any) -> jax.Array:
        pairs = zip(gradient(arrays), way, strict=True)
        return sum((jnp.sum((g * w).astype(jnp.float32)) for g, w in pairs), jnp.zeros(()))

    return {
        "output": lambda arrays, _: attend(arrays),
        "gradient": lambda arrays, _: gradient(arrays),
        "forward over reverse": lambda arrays, way: jax.jvp(gradient, (arrays,), (way,)),
        "reverse twice": jax.grad(along),
    }[name]


def shapes(length: int, dtype: str) -> Any:
    """Of (query, key, value)."""
    heads = (HEADS.value, KEY_HEADS.value, KEY_HEADS.value)
    return tuple(jax.ShapeDtypeStruct((1, length, h, HEAD_SIZE.value), dtype) for h in heads)


def temporary(name: str, attend: Attend, length: int, dtype: str) -> float:
    """Megabytes that an operation reserves beside arguments and results."""
    like = shapes(length, dtype)
    compiled = jax.jit(operation(name, attend)).lower(like, like).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes / MEGABYTE


def compare_times(dtype: str) -> None:
    """Prints a table for each operation."""
    length = LENGTH.value
    keys = jax.random.split(jax.random.key(0), 6)
    both = [*shapes(length, dtype)] * 2
    drawn = tuple(jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, both, strict=True))
    like = shapes(length, dtype)
    for name, products in PRODUCTS.items():
        others = peers.usable(peers.attention(), functools.partial(operation, name), like, like)
        runs: dict[str, harness.Candidate] = {
            label: functools.partial(jax.jit(operation(name, attend)), drawn[:3], drawn[3:])
            for label, attend in (CANDIDATES | others).items()
        }
        flops = products * HEADS.value * length**2 * HEAD_SIZE.value  # half of 2 a product
        arguments = (like, like) if name in SECOND else (like,)
        result = jax.eval_shape(operation(name, _tiles), like, like)
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arguments, result)))
        title = f"{name}, {dtype}, {length} tokens, {HEADS.value} heads of {HEAD_SIZE.value}"
        times = harness.measure(runs | harness.bounds(flops, moved, dtype))
        found = harness.report(title, times, reference="all scores", tokens_per_call=length)
        harness.report_roofline(times)
        if jax.default_backend() != "gpu":
            continue
        if name in SECOND and length >= LONG:
            harness.check_goal(f"{name}, tiles / all scores", found["tiles"], limit=FASTER)
        for other in () if name in SECOND else others:
            ratio = found["tiles"] / found[other]
            harness.check_goal(f"{name}, tiles / {other}", ratio, limit=1.0)


def compare_memory(dtype: str) -> None:
    """Prints the tables over lengths, and the goal."""
    lengths = [int(length) for length in MEMORY.value]
    for name in PRODUCTS:
        found = {
            label: [temporary(name, attend, length, dtype) for length in lengths]
            for label, attend in CANDIDATES.items()
        }
        print(f"\n{name}, {dtype}, MiB of temporaries\n\n| tokens | {' | '.join(found)} |")
        print("|---" * (len(found) + 1) + "|")
        for length, *row in zip(lengths, *found.values(), strict=True):
            print(f"| {length} | {' | '.join(f'{x:.1f}' for x in row)} |")
        if len(lengths) > 1 and name in SECOND:
            growth = [b / a for a, b in itertools.pairwise(found["tiles"])][-1]
            harness.check_goal(f"growth of `{name}`", growth, limit=GROWTH)


def main(_: list[str]) -> None:
    """Times, then memory, of each dtype."""
    if PRESET.value:
        run, given = presets.get(PRESET.value), flags.FLAGS
        given.length, given.dtypes = run.data.sequence_length, [run.model.compute_dtype]
        given.heads, given.key_heads = run.model.num_heads, run.model.kv_heads
        given.head_size = run.model.head_size
    for dtype in DTYPES.value:
        compare_times(dtype)
        if MEMORY.value:
            print("\n" + ", ".join(harness.provenance()))
            compare_memory(dtype)


if __name__ == "__main__":
    app.run(main)
