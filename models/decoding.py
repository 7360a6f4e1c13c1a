"""Sampling from a language model with a key-value cache: pure functions of arrays.

`prefill` reads the prompts, `decode_steps` appends tokens, `generate` does both. A model takes
part through its `apply` and a cache, so that every trunk with `Transformer`'s call can be sampled.
"""

# Dimension key: B batch, P padded prompt, M cache slots, T new tokens, V padded vocabulary.

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import constrain, whole_along_batch
from jaxlib_methods.models.transformer import KVCache, Outputs, init_params
from jaxlib_methods.pallas_kernels.attention import MASKED_SCORE

# `apply(params, inputs, *, positions, segments, cache)`: `functools.partial(forward, cfg)`.
# Where it has a `read_prompt`, called alike, prompts are read by that.
Apply = Callable[..., Outputs]


class Stream(enum.IntEnum):
    """What is drawn from a seed. No two share a key."""

    TOKENS = 0
    STATE = 1  # that a recurrent model's thinking begins from
    NOISE = 2  # in such a state
    CANDIDATES = 3  # of an energy model


def stream_key(seed: jax.Array | int, stream: Stream) -> jax.Array:
    """The key of what is drawn, of which everything folds further."""
    return jax.random.fold_in(jax.random.key(seed), stream)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn: temperature first, then top-k, top-p and min-p, in this order.

    temperature: divides the logits; 0 takes the likeliest token and ignores the rest.
    top_k: keeps the k likeliest tokens; 0 keeps all. Of equal ones the lower id is likelier.
    top_p: keeps the fewest likeliest tokens whose probability, after top-k, reaches p; 1 keeps all.
    min_p: keeps tokens at least `min_p` times as probable as the likeliest; 0 keeps all.
    The likeliest token always stays. A pytree of four numbers: an argument of a jitted function,
    changed without another compilation.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature {self.temperature} must be finite and at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be at least 1, or 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} must be between 0 and 1")


def _flatten(cfg: SamplingConfig) -> tuple[tuple[Any, ...], None]:
    return (cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p), None


def _unflatten(_: None, leaves: tuple[Any, ...]) -> SamplingConfig:
    cfg = object.__new__(SamplingConfig)  # traced leaves cannot be validated, and were
    for field, leaf in zip(dataclasses.fields(SamplingConfig), leaves, strict=True):
        object.__setattr__(cfg, field.name, leaf)
    return cfg


jax.tree_util.register_pytree_node(SamplingConfig, _flatten, _unflatten)


class Cache(Protocol):
    """`KVCache`, or what another model keeps of the tokens seen so far."""

    @property
    def num_slots(self) -> int:
        """How many tokens it can hold."""
        ...


class DecodeState(NamedTuple):
    """Where a batch of continuations stands.

    cache: everything read so far but `last`. last: int32 `[B]`, the newest token; positions: int32
    `[B]`, where it stands. tokens: int32 `[B, T]`, what was generated, padding from
    `lengths` `[B]` on. done: bool `[B]`. step: int32 scalar, tokens drawn so far in each row.
    """

    cache: Cache
    last: jax.Array
    positions: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    step: jax.Array


def init_cache(
    cfg: TransformerConfig, *, batch_size: int, length: int, dtype: Any = None
) -> KVCache:
    """An empty cache of `length` slots, in the compute dtype unless another is given.

    Under a mesh the batch is cut over (data, fsdp) and the key heads over tensor.
    """
    shape, dtype = (cfg.kv_heads, length, cfg.head_size), dtype or jnp.dtype(cfg.compute_dtype)
    return _empty_cache(cfg.num_layers, batch_size, shape, dtype)


def gather_weights(cfg: TransformerConfig, params: Any) -> Any:
    """The weights of `Transformer(cfg)` as sampling many tokens should have them.

    In the compute dtype, as every token multiplies by them, and under a mesh whole but for what is
    cut along tensor. See `partitioning.whole_along_batch`.
    """
    boxed = jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))
    return whole_along_batch(params, boxed, dtype=cfg.compute_dtype)


def branch(cache: KVCache, times: int, *, length: int) -> KVCache:
    """An empty cache of `length` slots for `times` rows behind each row of a cache.

    All of them see what the cache holds, which is kept once and stays as it is.
    """
    B, K, _, C = cache.layers[0][0].shape
    dtype = cache.layers[0][0].dtype
    empty = _empty_cache(len(cache.layers), B * times, (K, length, C), dtype)
    return empty._replace(prefix=cache)


def _empty_cache(
    num_layers: int, batch_size: int, shape: tuple[int, int, int], dtype: Any
) -> KVCache:
    """shape: `[K, M, C]`."""

    def empty() -> jax.Array:
        zeros = jnp.zeros((batch_size, *shape), dtype)
        return constrain(zeros, "batch", "kv_heads", None, None)

    def unset() -> jax.Array:
        return constrain(jnp.zeros((batch_size, shape[1]), jnp.int32), "batch", None)

    # Each its own array: the state is donated, and a buffer can be donated only once.
    layers = tuple((empty(), empty()) for _ in range(num_layers))
    return KVCache(layers, unset(), unset(), jnp.zeros((), jnp.int32))


def filter_logits(
    logits: jax.Array,
    *,
    top_k: jax.Array | int = 0,
    top_p: jax.Array | float = 1.0,
    min_p: jax.Array | float = 0.0,
) -> jax.Array:
    """Sets the logits of the tokens that `SamplingConfig`'s rules leave out to minus infinity.

    logits: `[..., V]`, tempered. Returns the same shape.
    """
    # What is sorted and what is compared to it below must be the same to the last bit.
    logits = jax.lax.optimization_barrier(logits)
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    keep = rank < jnp.where(jnp.asarray(top_k) > 0, top_k, logits.shape[-1])
    prob = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(prob, axis=-1) - prob
    # Rounded sums reach 1 before the last token: top_p = 1 must be a switch, not a comparison.
    keep &= (before < top_p) | (jnp.asarray(top_p) >= 1) | (rank == 0)
    keep &= prob >= min_p * prob[..., :1]
    # The first so many are kept: those above the last of them, and of its equals the lower ids.
    # Values alone are sorted sooner than with their ids and back.
    count = keep.sum(axis=-1, keepdims=True)
    last = jnp.take_along_axis(ranked, count - 1, axis=-1)
    above, equal = logits > last, logits == last
    left = count - above.sum(axis=-1, keepdims=True)
    keep = above | (equal & (jnp.cumsum(equal, axis=-1) <= left))
    return jnp.where(keep, logits, -jnp.inf)


def temper(logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Logits `[..., V]` over the temperature, up to a constant; 0 and less count as 1.

    Padding of the vocabulary stays out of reach, which a high temperature would make likely; the
    largest becomes 0, so that a tiny one cannot overflow.

    >>> import jax.numpy as jnp
    >>> temper(jnp.array([1.0, 3.0]), 0.5).tolist()
    [-4.0, 0.0]
    """
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    divisor = divisor_of(temperature).astype(logits.dtype)
    return jnp.where(logits > 0.5 * MASKED_SCORE, (logits - top) / divisor, MASKED_SCORE)


def divisor_of(temperature: jax.Array | float) -> jax.Array:
    """What logits are divided by: the temperature, 1 where that is 0 or less.

    At least 1e-6, at which the likeliest token is as good as certain and no logit overflows.
    """
    temperature = jnp.asarray(temperature, float)
    return jnp.where(temperature > 0, jnp.maximum(temperature, 1e-6), 1)


def sample(logits: jax.Array, sampling: SamplingConfig, *, key: jax.Array) -> jax.Array:
    """Draws a token from each row of logits `[..., V]`. Returns int32 `[...]`."""
    temperature = jnp.asarray(sampling.temperature)
    # Padding of the vocabulary has a finite score, which a high temperature would make likely.
    real = jnp.where(logits > 0.5 * MASKED_SCORE, logits, -jnp.inf)
    # The maximum becomes 0, so that a tiny temperature cannot overflow.
    tempered = (real - real.max(axis=-1, keepdims=True)) / divisor_of(temperature)
    top_k, top_p, min_p = map(jnp.asarray, (sampling.top_k, sampling.top_p, sampling.min_p))
    # The vocabulary is sorted only where a rule asks for it.
    filtered = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    keep = functools.partial(filter_logits, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = jax.lax.cond(filtered, keep, lambda logits: logits, tempered)
    drawn = jax.random.categorical(key, kept, axis=-1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def prefill(
    apply: Apply,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    cache: Cache,
    max_new_tokens: int,
) -> DecodeState:
    """Reads all but the last token of each prompt into an empty cache.

    The last token is left to the first decode step: nothing here needs logits, and `jit` drops
    the `[B, P, V]` array.

    tokens: int32 `[B, P]`, left-padded; lengths: int32 `[B]`, real tokens, at least 1.
    Raises ValueError where the cache has too few slots for `max_new_tokens` more.
    """
    B, P = tokens.shape
    # A model may have put something of its own into the empty cache.
    slots = cache.num_slots - getattr(apply, "reserved_slots", 0)
    needed = P + max_new_tokens - 1
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if needed > slots:
        raise ValueError(
            f"a cache of {slots} slots is too small for {P} prompt tokens and {max_new_tokens} "
            f"new ones; it needs {needed}"
        )
    if P > 1:
        indices = jnp.arange(P - 1)[None] - (P - lengths)[:, None]
        positions, segments = jnp.maximum(indices, 0), (indices >= 0).astype(jnp.int32)
        read = getattr(apply, "read_prompt", apply)
        out = read(params, tokens[:, :-1], positions=positions, segments=segments, cache=cache)
        assert out.cache is not None
        cache = out.cache
    zeros = jnp.zeros((B,), jnp.int32)
    return DecodeState(
        cache=cache,
        last=tokens[:, -1],
        positions=lengths - 1,
        tokens=jnp.zeros((B, max_new_tokens), jnp.int32),
        lengths=zeros,
        done=zeros.astype(bool),
        step=jnp.zeros((), jnp.int32),
    )


def next_logits(apply: Apply, params: Any, state: DecodeState) -> tuple[jax.Array, Cache]:
    """Logits `[B, V]` of the token after `state.last`, and the cache with `state.last` in it.

    Rows that are done read padding: they mean nothing, and no thinking waits for them.
    """
    out = apply(
        params,
        state.last[:, None],
        positions=state.positions[:, None],
        segments=(~state.done).astype(jnp.int32)[:, None],
        cache=state.cache,
    )
    assert out.cache is not None
    return out.logits[:, 0], out.cache


def decode_steps(
    apply: Apply,
    params: Any,
    state: DecodeState,
    *,
    num_steps: jax.Array | int,
    sampling: SamplingConfig,
    key: jax.Array,
    stop_tokens: jax.Array | tuple[int, ...] = (),
    pad_token: jax.Array | int = 0,
) -> DecodeState:
    """Draws up to `num_steps` more tokens per row; ends when every row is done.

    A row is done after a stop token, which is emitted and counted; from then on it emits
    `pad_token`. Row b draws its token t with `fold_in(fold_in(key, b), t)`: neither the
    other rows nor the cutting into calls change it. Only shapes and `apply` are compiled in.
    """
    stop = jnp.asarray(stop_tokens, jnp.int32)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(state.last.shape[0]))
    end = jnp.minimum(state.step + num_steps, state.tokens.shape[1])

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < end) & ~state.done.all()

    def draw(logits: jax.Array, row_key: jax.Array, step: jax.Array) -> jax.Array:
        return sample(logits, sampling, key=jax.random.fold_in(row_key, step))

    def advance(state: DecodeState) -> DecodeState:
        logits, cache = next_logits(apply, params, state)
        drawn = jax.vmap(draw, (0, 0, None))(logits, row_keys, state.step)
        new = jnp.where(state.done, jnp.asarray(pad_token, jnp.int32), drawn)
        stopped = (new[:, None] == stop[None]).any(axis=-1)
        return DecodeState(
            cache=cache,
            last=new,
            positions=state.positions + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                state.tokens, new[:, None], state.step, axis=1
            ),
            lengths=state.lengths + ~state.done,
            done=state.done | stopped,
            step=state.step + 1,
        )

    return jax.lax.while_loop(unfinished, advance, state)


def generate(
    apply: Apply,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    cache: Cache,
    max_new_tokens: int,
    sampling: SamplingConfig,
    key: jax.Array,
    stop_tokens: jax.Array | tuple[int, ...] = (),
    pad_token: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Continues each prompt by up to `max_new_tokens` tokens.

    tokens: int32 `[B, P]`, left-padded; lengths: int32 `[B]`; cache: empty, of at least
    P + max_new_tokens - 1 slots. Returns the new tokens, int32 `[B, T]`, and how many of each row
    count, int32 `[B]`, a stop token included. See `decode_steps`. Raises ValueError where the cache
    has too few slots. That `lengths` and the new tokens stay within the model's `max_length` is the
    caller's to see to: behind it learned positions mean nothing.
    """
    state = prefill(apply, params, tokens, lengths, cache=cache, max_new_tokens=max_new_tokens)
    state = decode_steps(
        apply,
        params,
        state,
        num_steps=max_new_tokens,
        sampling=sampling,
        key=key,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
    )
    # Steps that an early end left out were never written.
    rest = jnp.arange(max_new_tokens)[None] >= state.lengths[:, None]
    return jnp.where(rest, jnp.asarray(pad_token, jnp.int32), state.tokens), state.lengths
