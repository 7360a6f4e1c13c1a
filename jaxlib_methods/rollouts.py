"""Rollouts: a model thinks, closes its thought and answers, several times for each prompt.

A response is `thought, close, answer`; the prompt ends with what opens the thought. `roll_out`
samples with a key-value cache. `response_log_probs` scores the same tokens in one differentiable
pass, `target_log_probs` and `prefix_log_probs` a given token, with and without the thought before
it. Here `apply` takes `num_logits` too, in passes without a cache (see `models.transformer`). From
what it gives `nll` takes losses: from the logits, or without them as `linear_losses` does.
"""

# Dimension key: N prompts, G rollouts of each, B = N G rows, P padded prompt, R response slots,
# A answer slots, W tokens of a pass, V padded vocabulary.

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxlib_methods.linear_losses import nll_of_logits
from jaxlib_methods.losses import token_nll
from jaxlib_methods.models.decoding import Apply, DecodeState, branch, next_logits, prefill, temper
from jaxlib_methods.models.partitioning import axis_size, constrain, join_rows, split_rows
from jaxlib_methods.models.transformer import KVCache, Outputs

# `nll(params, out, labels, *, where, temperature=None)`: `nll_of_logits`, or
# `functools.partial(linear_losses.token_nll, cfg)`. `out` is of `apply`, one for each label.
TokenNLL = Callable[..., jax.Array]


class Tokens(NamedTuple):
    """Ids of the tokens with a meaning, ints or int32 scalars.

    close: ends a thought, which the prompt has opened. end: ends an answer; -1 where it has a fixed
    length. pad: written behind a response.
    """

    close: jax.Array | int
    end: jax.Array | int
    pad: jax.Array | int


class Rollouts(NamedTuple):
    """Responses to N prompts, G to each.

    tokens: int32 `[N, G, R]`, thought, close, answer, then padding.
    where: bool `[N, G, R]`, what was sampled, neither forced nor padding: a policy's loss is of it.
    log_probs: float32 `[N, G, R]`, nats, of the sampled tokens at the temperature they were
    sampled with, over the whole vocabulary; 0 elsewhere.
    lengths: int32 `[N, G]`, tokens of the response. thought_lengths: int32 `[N, G]`, before close.
    closed: bool `[N, G]`, whether the model itself sampled close.
    answers: int32 `[N, G, A]`, padded; answer_lengths: int32 `[N, G]`; both without `end`.
    """

    tokens: jax.Array
    where: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    thought_lengths: jax.Array
    closed: jax.Array
    answers: jax.Array
    answer_lengths: jax.Array


class _Progress(NamedTuple):
    """state: of the B rows. log_probs: `[B, R]`. close_at: int32 `[B]`, -1 while a row thinks."""

    state: DecodeState
    log_probs: jax.Array
    close_at: jax.Array


def roll_out(
    apply: Apply,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    cache: KVCache,
    num_rollouts: int,
    max_thought: int,
    max_answer: int,
    temperature: jax.Array | float,
    tokens: Tokens,
    force_close: bool,
    key: jax.Array,
    thought_limit: jax.Array | int | None = None,
    numbers: jax.Array | None = None,
) -> Rollouts:
    """Samples `num_rollouts` responses to each prompt, of R = max_thought + 1 + max_answer slots.

    prompts: int32 `[N, P]`, left-padded; lengths: int32 `[N]`, at least 1. cache: empty, for N
    rows, of at least P slots; each prompt is read once, and its rollouts share what it left there:
    an `apply` of one's own attends to `KVCache.prefix` too. That a prompt and its response stay
    within the model's `max_length` is the caller's to see to.

    The first close ends the thought. After `thought_limit` tokens without one (none: max_thought,
    the most), `force_close` puts it there unsampled and the model answers; otherwise the response
    is over, and the limit is at least 1. The answer ends after `end`, or after `max_answer` tokens,
    of which `end` is one; 0 stops at close. An answer may hold any token, close too. temperature:
    divides the logits; 0 takes the likeliest token and gives log-probabilities of temperature 1.

    Row (n, g) draws its token t with `fold_in(fold_in(fold_in(key, n), g), t)`; numbers: int32
    `[N]`, the n of prompts that are a part of more. Temperature, limit, ids, lengths and key are
    data, not compiled in. Nothing here has a gradient. Raises ValueError for impossible sizes.
    """
    _check(prompts, lengths, numbers, cache, num_rollouts, max_thought, max_answer, force_close)
    (N, _), G, R = prompts.shape, num_rollouts, max_thought + 1 + max_answer
    tokens = Tokens(*(jnp.asarray(token, jnp.int32) for token in tokens))
    limit = max_thought if thought_limit is None else jnp.minimum(thought_limit, max_thought)
    params = jax.lax.stop_gradient(params)
    state = prefill(apply, params, prompts, lengths, cache=cache, max_new_tokens=1)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    numbers = jnp.arange(N) if numbers is None else numbers
    keys = jax.vmap(fold, (0, None))(fold(key, numbers), jnp.arange(G)).reshape(N * G)

    def gumbel(logits: jax.Array, row_key: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(row_key, step), logits.shape, logits.dtype)

    def advance(progress: _Progress) -> _Progress:
        logits, new_cache = next_logits(apply, params, progress.state)
        tempered = temper(logits, temperature)
        # `jax.random.categorical`, or the likeliest: one search for a maximum does both.
        noise = jax.vmap(gumbel, (0, 0, None))(tempered, keys, progress.state.step)
        perturbed = jnp.where(jnp.asarray(temperature) > 0, tempered + noise, tempered)
        drawn = jnp.argmax(perturbed, axis=-1).astype(jnp.int32)
        progress = progress._replace(state=progress.state._replace(cache=new_cache))
        log_prob = -token_nll(tempered, drawn)
        return _append(progress, drawn, log_prob, tokens, limit, max_answer, force_close)

    log_probs, close_at = jnp.zeros((N * G, R), jnp.float32), jnp.full((N * G,), -1, jnp.int32)
    progress = jax.lax.while_loop(
        lambda progress: (progress.state.step < R) & ~progress.state.done.all(),
        advance,
        _Progress(_fork(state, G, R), log_probs, close_at),
    )
    flat = _collect(progress, tokens.pad, tokens.end, limit, max_answer)
    return Rollouts(*(x.reshape(N, G, *x.shape[1:]) for x in flat))


def _check(
    prompts: jax.Array,
    lengths: jax.Array,
    numbers: jax.Array | None,
    cache: KVCache,
    num_rollouts: int,
    max_thought: int,
    max_answer: int,
    force_close: bool,
) -> None:
    if num_rollouts < 1:
        raise ValueError(f"num_rollouts {num_rollouts} must be at least 1")
    if max_thought < 0 or max_answer < 0:
        raise ValueError(
            f"max_thought {max_thought} and max_answer {max_answer} must be at least 0"
        )
    N = prompts.shape[0]
    for name, value in (("lengths", lengths), ("numbers", numbers)):
        if value is not None and value.shape != (N,):
            raise ValueError(f"{name} must be of shape {(N,)}, one for each prompt: {value.shape}")
    if max_thought == 0 and not force_close:
        raise ValueError("max_thought 0 samples nothing; give at least 1, or force_close")
    if not isinstance(cache, KVCache):
        raise ValueError(f"rollouts share a KVCache, not a {type(cache).__name__}")
    if cache.positions.shape[0] != N:
        raise ValueError(
            f"a cache for {cache.positions.shape[0]} rows does not fit {N} prompts; "
            "give one row to each prompt, not to each rollout"
        )


def _fork(state: DecodeState, times: int, slots: int) -> DecodeState:
    """Each row `times` times, one behind another, with room for `slots` tokens of its own."""

    def rows(x: jax.Array) -> jax.Array:
        return constrain(jnp.repeat(x, times, axis=0), "batch", *(None,) * (x.ndim - 1))

    last, positions, lengths, done = map(
        rows, (state.last, state.positions, state.lengths, state.done)
    )
    tokens = constrain(jnp.zeros((len(last), slots), jnp.int32), "batch", None)
    cache = branch(cast(KVCache, state.cache), times, length=slots)
    return DecodeState(cache, last, positions, tokens, lengths, done, state.step)


def _append(
    progress: _Progress,
    drawn: jax.Array,
    log_prob: jax.Array,
    tokens: Tokens,
    limit: jax.Array | int,
    max_answer: int,
    force_close: bool,
) -> _Progress:
    """Writes the tokens of a step: drawn `[B]`, unless close is due or the row is done."""
    state, log_probs, close_at = progress
    step = state.step
    thinking = close_at < 0
    forced = thinking & (step == limit)  # without force_close, no row comes this far
    new = jnp.where(forced, tokens.close, drawn)
    new = jnp.where(state.done, tokens.pad, new)
    closes = thinking & ~state.done & (new == tokens.close)
    close_at = jnp.where(closes, step, close_at)
    over = (close_at >= 0) & (step - close_at == max_answer)
    over |= ~thinking & (new == tokens.end)
    if not force_close:
        over |= (close_at < 0) & (step + 1 == limit)
    log_prob = jnp.where(state.done | forced, 0, log_prob).astype(log_probs.dtype)
    write = jax.lax.dynamic_update_slice_in_dim
    state = state._replace(
        last=new,
        positions=state.positions + 1,
        tokens=write(state.tokens, new[:, None], step, axis=1),
        lengths=state.lengths + ~state.done,
        done=state.done | over,
        step=step + 1,
    )
    return _Progress(state, write(log_probs, log_prob[:, None], step, axis=1), close_at)


def _collect(
    progress: _Progress, pad: Any, end: Any, limit: jax.Array | int, max_answer: int
) -> Rollouts:
    """What became of the B rows; all without the axis of rollouts."""
    state, log_probs, close_at = progress
    slot = jnp.arange(log_probs.shape[1])[None]
    written = slot < state.lengths[:, None]
    # Steps that an early end left out were never written.
    tokens = jnp.where(written, state.tokens, pad)
    ended, forced = close_at >= 0, close_at == limit
    begin, place = close_at + 1, jnp.arange(max_answer)[None]
    answers = jnp.take_along_axis(tokens, begin[:, None] + place, axis=1)
    counted = ended[:, None] & (place < (state.lengths - begin)[:, None]) & (answers != end)
    return Rollouts(
        tokens=tokens,
        where=written & ~(forced[:, None] & (slot == limit)),
        log_probs=log_probs,
        lengths=state.lengths,
        thought_lengths=jnp.where(ended, close_at, state.lengths),
        closed=ended & ~forced,
        answers=jnp.where(counted, answers, pad),
        answer_lengths=counted.sum(axis=1, dtype=jnp.int32),
    )


def in_parts(num_parts: int, function: Callable[..., Any], *arrays: Any) -> Any:
    """A function of N prompts on parts of them, one after another: the memory of one part.

    arrays: trees of `[N, ...]`. Raises ValueError where the parts are not equal.
    """
    N = len(jax.tree.leaves(arrays)[0])
    if num_parts == 1:
        return function(*arrays)
    if N % num_parts:
        raise ValueError(f"{num_parts} parts do not divide {N} prompts; choose a divisor of {N}")
    parts = split_rows(arrays, num_parts)
    return join_rows(jax.lax.map(lambda part: function(*part), parts))


def response_log_probs(
    apply: Apply,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    rollouts: Rollouts,
    *,
    temperature: jax.Array | float,
    nll: TokenNLL = nll_of_logits,
) -> jax.Array:
    """Log-probabilities of the sampled tokens in one pass over prompts and responses.

    prompts: int32 `[N, P]`, left-padded; lengths: int32 `[N]`. Returns `[N, G, R]` nats, float32 or
    better, at the temperature (0 counts as 1); 0 and no gradient where nothing was sampled. With
    the parameters that sampled it is `rollouts.log_probs`.
    """
    N, G, R = rollouts.tokens.shape
    P = prompts.shape[1]
    labels = rollouts.tokens.reshape(N * G, R)
    rows = jnp.concatenate([jnp.repeat(prompts, G, axis=0), labels], axis=1)
    begin = P - jnp.repeat(lengths, G)
    end = P + rollouts.lengths.reshape(N * G)
    # Column P - 1 predicts the first token of the response; the last column predicts none.
    out = _predict(apply, params, rows, begin, end, num_logits=R + 1)
    out = jax.tree.map(lambda x: x[:, :-1], out)
    where = rollouts.where.reshape(N * G, R)
    return -nll(params, out, labels, where=where, temperature=temperature).reshape(N, G, R)


def target_log_probs(
    apply: Apply,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    rollouts: Rollouts,
    target: jax.Array,
    *,
    tokens: Tokens,
    nll: TokenNLL = nll_of_logits,
) -> jax.Array:
    """Log-probability of one token after each thought (RLP, arXiv 2510.01265, section 2).

        S_pred = log p(target | prompt, thought, close)

    prompts: int32 `[N, P]`, left-padded; lengths, target: int32 `[N]`. Returns `[N, G]` nats, of
    temperature 1.
    """
    rows, total = _thoughts(prompts, lengths, rollouts, tokens)
    G = rollouts.tokens.shape[1]
    found = prefix_log_probs(apply, params, rows, total, jnp.repeat(target, G), nll=nll)
    return found.reshape(-1, G)


def thought_logits(
    apply: Apply,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    rollouts: Rollouts,
    *,
    tokens: Tokens,
) -> jax.Array:
    """Logits `[N, G, V]` of the token after each thought; see `target_log_probs`."""
    rows, total = _thoughts(prompts, lengths, rollouts, tokens)
    return prefix_logits(apply, params, rows, total).reshape(*rollouts.tokens.shape[:2], -1)


def _thoughts(
    prompts: jax.Array, lengths: jax.Array, rollouts: Rollouts, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    """Prompts with their thoughts up to close: rows `[B, W]`, left-padded, and lengths `[B]`.

    A thought that was never closed is closed here.
    """
    (N, G, R), A = rollouts.tokens.shape, rollouts.answers.shape[2]
    slots = R - A  # of the longest thought and close
    thought_lengths = rollouts.thought_lengths.reshape(N * G, 1)
    thoughts = rollouts.tokens[:, :, :slots].reshape(N * G, slots)
    thoughts = jnp.where(jnp.arange(slots)[None] == thought_lengths, tokens.close, thoughts)
    rows = jnp.concatenate([jnp.repeat(prompts, G, axis=0), thoughts], axis=1)
    # Turned until close is the last of each row: one prediction is enough, and all padding is left.
    W = rows.shape[1]
    turned = (jnp.arange(W)[None] - (slots - 1 - thought_lengths)) % W
    total = jnp.repeat(lengths, G) + thought_lengths[:, 0] + 1
    return jnp.take_along_axis(rows, turned, axis=1), total


def prefix_log_probs(
    apply: Apply,
    params: Any,
    prefixes: jax.Array,
    lengths: jax.Array,
    target: jax.Array,
    *,
    nll: TokenNLL = nll_of_logits,
) -> jax.Array:
    """Log-probability of the token after each prefix (RLP, arXiv 2510.01265, section 2).

        S_ema = log p(target | prefix)

    prefixes: int32 `[N, P]`, left-padded, as they are; lengths, target: int32 `[N]`. Returns `[N]`
    nats, of temperature 1.
    """
    out = _predict_last(apply, params, prefixes, lengths)
    where = jnp.ones((len(target), 1), bool)
    return -nll(params, out, target[:, None], where=where)[:, 0]


def prefix_logits(apply: Apply, params: Any, prefixes: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits `[N, V]` of the token after each prefix; see `prefix_log_probs`."""
    return _predict_last(apply, params, prefixes, lengths).logits[:, 0]


def _predict_last(apply: Apply, params: Any, prefixes: jax.Array, lengths: jax.Array) -> Outputs:
    W = prefixes.shape[1]
    end = jnp.full_like(lengths, W)
    return _predict(apply, params, prefixes, W - lengths, end, num_logits=1)


def _predict(
    apply: Apply,
    params: Any,
    tokens: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    *,
    num_logits: int,
) -> Outputs:
    """The last `num_logits` predictions of rows `[B, W]` whose tokens are from begin to end."""
    # Padded until the mesh can cut them: a prompt has the length that its wording takes.
    short = -tokens.shape[1] % axis_size("sequence")
    tokens = jnp.pad(tokens, [(0, 0), (short, 0)])
    begin, end = begin + short, end + short
    column = jnp.arange(tokens.shape[1])[None]
    real = (column >= begin[:, None]) & (column < end[:, None])
    return apply(
        params,
        constrain(tokens, "batch", "sequence"),
        positions=jnp.where(real, column - begin[:, None], 0),
        segments=real.astype(jnp.int32),
        num_logits=num_logits,
    )
