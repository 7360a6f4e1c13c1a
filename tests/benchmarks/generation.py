"""Generating with the key-value cache against reading the whole prefix again for each token.

    python tests/benchmarks/generation.py

Measured: `models/decoding.py`'s `generate`, greedy, the cache's creation and the prompt included.
Against: one forward pass over all tokens so far for each new one, padded to a multiple of 32 so
that few programs are needed, without a cache. Same weights, and the same tokens, asserted.
Prompts of 64 tokens, 128 new ones, batches of 1 and 8.
Goal: the ratio, whatever it is; the cache must win.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import shapes
from absl import app, flags

from jaxlib_methods.models import decoding
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import unbox
from jaxlib_methods.models.transformer import forward, init_params

_PROMPT = flags.DEFINE_integer("prompt_length", 64, "Tokens of each prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 128, "Tokens generated.", lower_bound=1)
_BATCHES = flags.DEFINE_multi_integer("batch_size", [1, 8], "Prompts at a time; repeatable.")
flags.set_default(harness.ROUNDS, 7)
flags.set_default(harness.CALLS, 1)

MULTIPLE = 32  # the recomputed prefix is padded to a multiple of this
GREEDY = decoding.SamplingConfig(temperature=0.0)


@functools.partial(jax.jit, static_argnums=(0, 4))
def with_cache(
    cfg: TransformerConfig,
    params: dict,
    prompts: jax.Array,
    sampling: decoding.SamplingConfig,
    num_new: int,
) -> jax.Array:
    """New tokens `[B, T]`. `sampling` is an argument, as it is in `infer`."""
    batch, length = prompts.shape
    tokens, _ = decoding.generate(
        functools.partial(forward, cfg),
        params,
        prompts,
        jnp.full((batch,), length),
        cache=decoding.init_cache(cfg, batch_size=batch, length=length + num_new - 1),
        max_new_tokens=num_new,
        sampling=sampling,
        key=jax.random.key(0),
    )
    return tokens


@functools.partial(jax.jit, static_argnums=(0, 3))
def without_cache(
    cfg: TransformerConfig, params: dict, prompts: jax.Array, num_new: int
) -> jax.Array:
    """New tokens `[B, T]`, each from a forward pass over everything before it."""
    length, end = prompts.shape[1], prompts.shape[1] + num_new
    tokens = jnp.pad(prompts, ((0, 0), (0, -end % MULTIPLE + num_new)))
    start = length
    while start < end:
        padded = -(-start // MULTIPLE) * MULTIPLE  # holds tokens 0 to padded - 1

        def append(i: jax.Array, tokens: jax.Array, padded: int = padded) -> jax.Array:
            # What lies behind the last real token is later than it, and therefore not seen.
            logits = forward(cfg, params, tokens[:, :padded]).logits[:, i - 1]
            return tokens.at[:, i].set(jnp.argmax(logits, axis=-1).astype(tokens.dtype))

        stop = min(padded + 1, end)
        tokens = jax.lax.fori_loop(start, stop, append, tokens)
        start = stop
    return tokens[:, length:end]


def compare(cfg: TransformerConfig, params: dict, batch_size: int) -> None:
    """Asserts that both give the same tokens, times both and prints their rows."""
    shape = (batch_size, _PROMPT.value)
    prompts = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size)
    candidates = {
        "whole prefix": lambda: without_cache(cfg, params, prompts, _NEW.value),
        "cache": lambda: with_cache(cfg, params, prompts, GREEDY, _NEW.value),
    }
    slow, fast = (np.asarray(candidate()) for candidate in candidates.values())
    assert (slow == fast).all(), f"{(slow != fast).sum()} of {slow.size} greedy tokens differ"
    title = f"Generation, batch {batch_size}, {_PROMPT.value} + {_NEW.value} tokens"
    tokens = batch_size * _NEW.value
    times = harness.measure(candidates)
    ratio = harness.report(title, times, reference="whole prefix", tokens_per_call=tokens)
    harness.check_goal("cache / whole prefix", ratio["cache"], limit=1.0)


def main(_: list[str]) -> None:
    """Compares at every batch size."""
    cfg = shapes.model_config(_PROMPT.value + _NEW.value)
    params = jax.jit(lambda key: unbox(init_params(cfg, key)))(jax.random.key(0))
    for batch_size in _BATCHES.value:
        compare(cfg, params, batch_size)


if __name__ == "__main__":
    app.run(main)
