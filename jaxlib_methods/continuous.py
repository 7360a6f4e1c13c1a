"""Continuous batching in depth: rows of a batch at different tokens and different iterations.

All rows share one core, so one pass of it can be any iteration of any token. A tick is one pass; a
row whose token has converged, or has had all its iterations, emits it and begins its next token
in the next tick, while others go on. In lock step (`decoding.decode_steps`) each token costs as
many passes as that of the slowest row. The text of each row is that of sequential sampling of the
row alone.
"""

# Dimension key: B batch, P padded prompt, T new tokens, V padded vocabulary.

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.depth_language import RecurrentModel, Watch, examine, start_state, start_watch
from jaxlib_methods.depth_sampling import (
    Draws,
    Sampler,
    Text,
    append,
    draw,
    empty_text,
    read_prompts,
)
from jaxlib_methods.models import recurrent_depth
from jaxlib_methods.models.recurrent_depth import Reading, RecurrentCache


class ContinuousState(NamedTuple):
    """Where a batch of continuations stands.

    cache: everything before `last`, int32 `[B]`, the token that is thought about, which stands at
    `positions` `[B]`. reading, state, watch: of that token, `[B, 1, ...]`. step: int32 `[B]`, its
    iterations so far. text: what has been generated. steps: int32 `[B, T]`, iterations that each
    new token took. ticks: int32 scalar, passes of the core.
    """

    cache: RecurrentCache
    last: jax.Array
    positions: jax.Array
    reading: Reading
    state: jax.Array
    watch: Watch
    step: jax.Array
    text: Text
    steps: jax.Array
    ticks: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """What has been generated, int32 `[B, T]`."""
        return self.text.tokens

    @property
    def lengths(self) -> jax.Array:
        """How many tokens of each row, int32 `[B]`."""
        return self.text.lengths

    @property
    def lock_step_ticks(self) -> jax.Array:
        """Passes for the same tokens where each row waits for the slowest, int32 scalar."""
        return self.steps.max(axis=0).sum()


def start(
    model: RecurrentModel,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
) -> ContinuousState:
    """Reads the prompts; their last tokens are the first to be thought about.

    tokens: int32 `[B, P]`, left-padded; lengths: int32 `[B]`, real tokens, at least 1.
    """
    B, P = tokens.shape
    text = empty_text(B, max_new_tokens)
    read = read_prompts(model, params, tokens, lengths, num_slots=P + max_new_tokens - 1)
    last, positions = tokens[:, -1], lengths - 1
    reading, cache = _read(model, params, last, positions, read.tokens, running=~text.done)
    warm = read.state if model.depth.warm_start else None
    state = start_state(model, reading, positions[:, None], warm=warm)
    return ContinuousState(
        cache=cache,
        last=last,
        positions=positions,
        reading=reading,
        state=state,
        watch=start_watch(model, state),
        step=jnp.zeros((B,), jnp.int32),
        text=text,
        steps=jnp.zeros_like(text.tokens),
        ticks=jnp.int32(0),
    )


def next_round(
    model: RecurrentModel, params: Any, state: ContinuousState, draws: Draws
) -> ContinuousState:
    """A tick: one iteration of each row's token, and the next token where that is the last."""
    running = ~state.text.done
    latent, cache = recurrent_depth.iterate(
        model.model,
        params,
        state.state,
        state.reading,
        cache=state.cache,
        step=state.step,
    )
    assert cache is not None
    # A row that is done stays before its first iteration, where nothing ends.
    step, watch = state.step + running, state.watch
    ended = step >= model.num_steps
    if model.depth.exit != "none":
        small, watch, cache = examine(
            model, params, watch, latent, state.reading, cache, step[:, None]
        )
        assert cache is not None
        ended |= small[:, 0]
    state = state._replace(cache=cache, state=latent, watch=watch, step=step, ticks=state.ticks + 1)
    # Prelude, coda and head are for tokens that end or begin; mostly none does.
    return jax.lax.cond(
        ended.any(), lambda state: _next_token(model, params, state, draws, ended), _same, state
    )


def _same(state: ContinuousState) -> ContinuousState:
    return state


def _next_token(
    model: RecurrentModel, params: Any, state: ContinuousState, draws: Draws, ended: jax.Array
) -> ContinuousState:
    """Emits the tokens of rows that have `ended`, bool `[B]`, and begins their next ones."""
    logits, _, cache = recurrent_depth.predict(
        model.model, params, state.state, state.reading, cache=state.cache
    )
    assert cache is not None
    before = state.text.lengths
    drawn = draw(draws, logits, before[:, None])
    text = append(draws, state.text, drawn, ended.astype(jnp.int32))
    room = text.tokens.shape[1]
    at = jnp.where(ended, before, room)
    steps = state.steps.at[jnp.arange(len(at)), at].set(state.step, mode="drop")
    last = jnp.where(ended, drawn[:, 0], state.last)
    positions = state.positions + ended
    reading, cache = _read(model, params, last, positions, cache, running=~text.done)
    warm = state.state[:, 0] if model.depth.warm_start else None
    fresh = start_state(model, reading, positions[:, None], warm=warm)
    latent = jnp.where(ended[:, None, None], fresh, state.state)
    begun = start_watch(model, fresh)
    watch = jax.tree.map(lambda new, old: _choose(ended, new, old), begun, state.watch)
    return ContinuousState(
        cache=cache,
        last=last,
        positions=positions,
        reading=reading,
        state=latent,
        watch=watch,
        step=jnp.where(ended, 0, state.step),
        text=text,
        steps=steps,
        ticks=state.ticks,
    )


def _choose(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(rows, range(1, new.ndim)), new, old)


def _read(
    model: RecurrentModel,
    params: Any,
    last: jax.Array,
    positions: jax.Array,
    cache: RecurrentCache,
    *,
    running: jax.Array,
) -> tuple[Reading, RecurrentCache]:
    """The prelude of each row's token; of one that goes on it gives the same once more."""
    reading, new = recurrent_depth.read(
        model.model,
        params,
        last[:, None],
        positions=positions[:, None],
        segments=running.astype(jnp.int32)[:, None],
        cache=cache,
    )
    assert new is not None
    return reading, new


CONTINUOUS = Sampler(start, next_round)
