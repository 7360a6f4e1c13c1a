"""Linear cross-entropy in tiles of the vocabulary against the logits and the losses on them.

    python tests/benchmarks/linear_cross_entropy.py
    python tests/benchmarks/linear_cross_entropy.py --shape=8192,1024,50304,bfloat16
    python tests/benchmarks/linear_cross_entropy.py --preset=reinforcement_midtraining_14b

Measured: `linear_cross_entropy` as `auto` chooses it, its statistics and the gradient of their
means. Against: `tied_logits`, then `token_nll`, `token_entropy` and a logsumexp; and `peers`.
Temporaries are what the compiler reserves beyond arguments and results. The roofline: the logits
cost 2 N D V operations and the gradient twice that (2 N D V more to compute the logits again, which
the plain form saves, are not counted); arguments and results are moved once. Goals: temporaries of
the gradient stay below one float32 array of tokens times vocabulary; on a GPU from 128,000 classes
no slower than tokamax.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import peers
from absl import app, flags

from jaxlib_methods import losses
from jaxlib_methods.models.transformer import tied_logits
from jaxlib_methods.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from jaxlib_methods.train import presets

_SHAPES = flags.DEFINE_multi_string(
    "shape",
    ["1024,256,8192,float32", "1024,256,8192,bfloat16", "512,128,50304,float32"],
    "Tokens, width, vocabulary and dtype; may be given several times.",
)
_PRESET = flags.DEFINE_string("preset", None, "One row of tokens of its model instead.")
PRODUCTS = {"statistics": 1, "gradient": 3}  # of 2 N D V operations
LARGE, MEGABYTE = 128_000, 2**20


def plain(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """The logits, then the losses: what the models do."""
    logits = tied_logits(hidden, weight)
    nll, entropy = losses.token_nll(logits, labels), losses.token_entropy(logits)
    return nll, entropy, jax.nn.logsumexp(logits, axis=-1)


def total(op: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
    """A scalar that needs all that `op` gives."""
    return jnp.stack(op(*arrays)).mean()


def operation(what: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """A function of hidden, weight and labels."""
    program = functools.partial(total, op)
    return jax.grad(program, argnums=(0, 1)) if what == "gradient" else program


def compare(tokens: int, width: int, vocabulary: int, dtype: str) -> None:
    """Prints the rows and the goal of one shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, width), dtype)
    weight = jax.random.normal(keys[1], (vocabulary, width)) * width**-0.5
    arrays = hidden, weight, jax.random.randint(keys[2], (1, tokens), 0, vocabulary)
    ops = {"logits": plain, "tiles": linear_cross_entropy}
    shape = f"{tokens} tokens, width {width}, vocabulary {vocabulary}, {dtype}"
    memory = {}
    for what, products in PRODUCTS.items():
        others = peers.usable(
            peers.linear_cross_entropy(), functools.partial(operation, what), *arrays
        )
        programs = {}
        for name, op in (ops | others).items():
            programs[name] = jax.jit(operation(what, op)).lower(*arrays).compile()
            analysis: Any = programs[name].memory_analysis()
            memory[name] = analysis.temp_size_in_bytes / MEGABYTE
        calls: dict[str, harness.Candidate] = {
            name: functools.partial(program, *arrays) for name, program in programs.items()
        }
        moved = sum(x.nbytes for x in arrays) + (what == "gradient") * (
            hidden.nbytes + weight.nbytes
        )
        flops = products * 2 * tokens * width * vocabulary
        times = harness.measure(calls | harness.bounds(flops, moved, dtype))
        found = harness.report(
            f"{what}: {shape}", times, reference="logits", tokens_per_call=tokens
        )
        harness.report_roofline(times)
        print("\nTemporaries: " + ", ".join(f"{n} {m:.1f} MiB" for n, m in memory.items()))
        if jax.default_backend() == "gpu" and vocabulary >= LARGE:
            for name in others:
                ratio = found["tiles"] / found[name]
                harness.check_goal(f"{what}, tiles / {name}", ratio, limit=1.0)
    limit = tokens * vocabulary * 4 / MEGABYTE
    harness.check_goal("temporaries of the gradient in MiB", memory["tiles"], limit=limit)


def main(_: list[str]) -> None:
    """Compares every shape."""
    if _PRESET.value:
        run = presets.get(_PRESET.value)
        sizes = run.data.sequence_length, run.model.embed_dim, run.model.vocab_size
        compare(*sizes, run.model.compute_dtype)
        return
    for shape in _SHAPES.value:
        tokens, width, vocabulary, dtype = shape.split(",")
        compare(int(tokens), int(width), int(vocabulary), dtype)


if __name__ == "__main__":
    app.run(main)
