"""Thinking about consecutive tokens at once (arXiv 2510.14961): sampling in parallel.

A wave of tokens is iterated together: the last final token, and drafts after it. In a round

    e_j <- (1 - eta) prelude(y)_j + eta e_j;   r' times: s_j <- core(s_j, e_j)
    y_(j+1) <- the token drawn from head(s_j), with the draw that belongs to its position

Tokens become final from the front on: token j when all before it are, its state moved by less than
epsilon in the round, and what is drawn for it is still what it was embedded as. Only the token
itself then is final, not the one it predicts. A token costs about r' serial iterations, not r.

Where predictions do not depend on the states they begin from, the text is that of sequential
sampling with the same key, at any temperature: a position keeps its draw from round to round
(the published code draws anew, and its waves do not settle), and a token's keys in the cache were
made from what the token is. A final token whose state does not settle stops after `PATIENCE` times
the model's iterations, and lets the next one pass.
"""

# Dimension key: B batch, W wave, P padded prompt, T new tokens, M cache slots, D width.

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.depth_language import RecurrentModel, relative_change
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
from jaxlib_methods.models.decoding import Stream
from jaxlib_methods.models.recurrent_depth import RecurrentCache

PATIENCE = 2
SMALLEST_WINDOW = 8


class Wave(NamedTuple):
    """Tokens that are thought about at once; those from `width` `[B]` on are not there yet.

    tokens: int32 `[B, W]`; the first is final, the others are drafts. start: int32 `[B]`, the
    position of the first. state, embedded: `[B, W, D]`, at the end of the last round. steps: int32
    `[B, W]`, iterations taken; steady: those since the token or one before it in the wave changed.
    """

    tokens: jax.Array
    start: jax.Array
    width: jax.Array
    state: jax.Array
    embedded: jax.Array
    steps: jax.Array
    steady: jax.Array


class WaveState(NamedTuple):
    """Where a batch of continuations stands.

    cache: its slots before `wave.start` are final. text: what is final. first: int32 `[B]`, the
    position of its first token. steps: int32 `[B, T]`, iterations that each new token has taken,
    drafts too. rounds: int32 `[B]`, until a row is done; serial_steps: int32 scalar, passes of the
    core one after the other, the prompt's included.
    """

    cache: RecurrentCache
    wave: Wave
    text: Text
    first: jax.Array
    steps: jax.Array
    rounds: jax.Array
    serial_steps: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """What is final, int32 `[B, T]`."""
        return self.text.tokens

    @property
    def lengths(self) -> jax.Array:
        """How many tokens of each row are final, int32 `[B]`."""
        return self.text.lengths


def start(
    model: RecurrentModel,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
) -> WaveState:
    """Reads all but the last token of each prompt, from which the first wave begins.

    tokens: int32 `[B, P]`, left-padded; lengths: int32 `[B]`, real tokens, at least 1.
    Raises ValueError for a model that keeps more than one iteration of each token.
    """
    depth = model.depth
    if depth.kept_steps != 1:
        raise ValueError(
            f"depth.kept_steps={depth.kept_steps} must be 1 for tokens that are thought about at "
            "once; give depth.sampler=parallel"
        )
    B, P = tokens.shape
    text = empty_text(B, max_new_tokens)
    cache = read_prompts(model, params, tokens, lengths, num_slots=P + max_new_tokens).tokens
    assert depth.max_wave is not None
    W = min(depth.max_wave, max_new_tokens + 1)
    begin = lengths - 1
    wave = Wave(
        tokens=jnp.zeros((B, W), jnp.int32).at[:, 0].set(tokens[:, -1]),
        start=begin,
        width=jnp.ones((B,), jnp.int32),
        state=_fresh(model, _positions(begin, W)),
        embedded=jnp.zeros((B, W, model.model.embed_dim), jnp.dtype(model.model.compute_dtype)),
        steps=jnp.zeros((B, W), jnp.int32),
        steady=jnp.zeros((B, W), jnp.int32),
    )
    return WaveState(
        cache=cache,
        wave=wave,
        text=text,
        first=begin + 1,
        steps=jnp.zeros_like(text.tokens),
        rounds=jnp.zeros((B,), jnp.int32),
        serial_steps=jnp.int32(model.num_steps if P > 1 else 0),
    )


def _positions(start: jax.Array, width: int) -> jax.Array:
    return start[:, None] + jnp.arange(width)[None]


def _fresh(model: RecurrentModel, positions: jax.Array) -> jax.Array:
    key, scale = model.key(Stream.STATE), model.depth.state_scale
    return recurrent_depth.state_at(model.model, positions, key, scale=scale)


def next_round(model: RecurrentModel, params: Any, state: WaveState, draws: Draws) -> WaveState:
    """Takes r' iterations of all tokens of the wave, and moves it behind what is final then.

    What is computed is a window of the wave, the smallest of a few that holds all its tokens.
    """
    sizes = window_sizes(state.wave.tokens.shape[1])
    width = jnp.where(state.text.done, 0, state.wave.width).max()

    def of_size(size: int, state: WaveState) -> WaveState:
        cut = _resize(state.wave, size)
        new = _round(model, params, state._replace(wave=cut), draws)
        return new._replace(wave=_resize(new.wave, sizes[-1]))

    # With room for the token that the round adds.
    smallest = jnp.searchsorted(jnp.array(sizes[:-1], jnp.int32), width + 1)
    return jax.lax.switch(smallest, [functools.partial(of_size, size) for size in sizes], state)


def window_sizes(wave: int) -> list[int]:
    """The sizes of windows of a wave: itself, and halves as long as they are not too small.

    >>> window_sizes(18)
    [9, 18]
    """
    sizes = [wave]
    while sizes[0] >= 2 * SMALLEST_WINDOW:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def _resize(wave: Wave, size: int) -> Wave:
    """Its first `size` places, of which those that were not there are empty."""
    more = max(0, size - wave.tokens.shape[1])

    def of(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, :size], ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))

    resized = jax.tree.map(of, wave._replace(start=wave.tokens, width=wave.tokens))
    return resized._replace(start=wave.start, width=wave.width)


def _round(model: RecurrentModel, params: Any, state: WaveState, draws: Draws) -> WaveState:
    B, W = state.wave.tokens.shape
    T = state.text.tokens.shape[1]
    positions = _positions(state.wave.start, W)
    running = jnp.arange(W)[None] < state.wave.width[:, None]
    running &= ~state.text.done[:, None]
    wave, logits, cache = _think(model, params, state, positions, running)
    # What row j of the wave predicts is token j + 1 of the wave.
    index = positions - state.first[:, None]
    drawn = draw(draws, logits, index + 1)
    passed = count_final(model, state.wave, wave, drawn, running=running)
    at = jnp.where(running & (index >= 0), index, T)
    rows = jnp.arange(B)[:, None]
    return WaveState(
        cache=cache,
        wave=_move(model, wave, drawn, passed, end=state.first + T),
        text=append(draws, state.text, wave.tokens[:, 1:], passed),
        first=state.first,
        steps=state.steps.at[rows, at].set(wave.steps, mode="drop"),
        rounds=state.rounds + ~state.text.done,
        serial_steps=state.serial_steps + model.depth.inner_steps,
    )


def _think(
    model: RecurrentModel,
    params: Any,
    state: WaveState,
    positions: jax.Array,
    running: jax.Array,
) -> tuple[Wave, jax.Array, RecurrentCache]:
    """The wave after r' iterations, what it predicts `[B, W, V]`, and the cache."""
    cfg, depth, wave = model.model, model.depth, state.wave
    reading, cache = recurrent_depth.read(
        cfg,
        params,
        wave.tokens,
        positions=positions,
        segments=running.astype(jnp.int32),
        cache=state.cache,
    )
    embedded, eta = reading.embedded, depth.embedding_average
    average = (1 - eta) * embedded + eta * wave.embedded
    embedded = jnp.where((wave.steps > 0)[:, :, None], average, embedded)
    reading = reading._replace(embedded=embedded)
    active = running & ((jnp.arange(running.shape[1]) > 0)[None] | ~_exhausted(model, wave))
    latent = wave.state
    if depth.noise:
        blurred = _blur(model, wave, positions, state.rounds)
        latent = jnp.where(active[:, :, None], blurred, latent)

    def body(_: Any, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        latent, cache = carry
        # One slot is shared by all iterations, so that their number means nothing.
        return recurrent_depth.iterate(
            cfg, params, latent, reading, cache=cache, step=jnp.int32(0), active=active
        )

    latent, cache = jax.lax.fori_loop(0, depth.inner_steps, body, (latent, cache))
    logits, _, cache = recurrent_depth.predict(cfg, params, latent, reading, cache=cache)
    assert cache is not None
    taken = depth.inner_steps * active
    wave = wave._replace(
        state=latent,
        embedded=embedded,
        steps=wave.steps + taken,
        steady=wave.steady + taken,
    )
    return wave, logits, cache


def _exhausted(model: RecurrentModel, wave: Wave) -> jax.Array:
    return wave.steady >= PATIENCE * max(model.num_steps, model.depth.inner_steps)


def _blur(model: RecurrentModel, wave: Wave, positions: jax.Array, rounds: jax.Array) -> jax.Array:
    """(1 - b) s + b noise,  b = beta / (1 + iterations taken)."""
    key, scale = model.key(Stream.NOISE), model.depth.state_scale

    def of_row(positions: jax.Array, number: jax.Array) -> jax.Array:
        drawn = jax.random.fold_in(key, number)
        return recurrent_depth.state_at(model.model, positions[None], drawn, scale=scale)[0]

    weight = (model.depth.noise / (1 + wave.steps))[:, :, None].astype(wave.state.dtype)
    return (1 - weight) * wave.state + weight * jax.vmap(of_row)(positions, rounds)


def count_final(
    model: RecurrentModel, before: Wave, after: Wave, drawn: jax.Array, *, running: jax.Array
) -> jax.Array:
    """How many drafts of a wave become final in a round, int32 `[B]`: those before the first that
    does not.

    before, after: the wave at the ends of the last and this round. drawn: int32 `[B, W]`, the token
    after each. running: bool `[B, W]`, where the wave has a token.
    """
    small = relative_change(before.state, after.state) < model.depth.freeze_tolerance
    small |= _exhausted(model, after)
    # A token is what the one before it predicts still; the first of the wave is final.
    same = after.tokens[:, 1:] == drawn[:, :-1]
    same = jnp.concatenate([jnp.ones_like(same[:, :1]), same], axis=1)
    settled = small & same & (before.steps > 0) & running
    return jnp.maximum(jnp.cumprod(settled, axis=1).sum(axis=1) - 1, 0)


def _move(
    model: RecurrentModel, wave: Wave, drawn: jax.Array, passed: jax.Array, *, end: jax.Array
) -> Wave:
    """The next wave: begins `passed` tokens later, has what was drawn, and one token more.

    end: int32 `[B]`, the position behind the last token there may be.
    """
    W = wave.tokens.shape[1]
    start = wave.start + passed
    left = wave.width - passed
    width = jnp.minimum(jnp.minimum(left + 1, W), end - start)
    index = jnp.arange(W)[None]
    source = jnp.minimum(index + passed[:, None], W - 1)
    rows = jnp.arange(len(source))[:, None]
    here = index < left[:, None]
    fresh = _fresh(model, _positions(start, W))
    if model.depth.warm_start:
        last = wave.state[jnp.arange(len(left)), wave.width - 1]
        fresh = jnp.broadcast_to(last[:, None], fresh.shape)
    first = wave.tokens[rows, passed[:, None]]
    tokens = jnp.concatenate([first, drawn[rows, source][:, :-1]], axis=1)
    changed = jnp.cumsum((tokens != wave.tokens[rows, source]) | ~here, axis=1) > 0
    return Wave(
        tokens=tokens,
        start=start,
        width=width,
        state=jnp.where(here[:, :, None], wave.state[rows, source], fresh),
        embedded=wave.embedded[rows, source],
        steps=jnp.where(here, wave.steps[rows, source], 0),
        steady=jnp.where(changed, 0, wave.steady[rows, source]),
    )


PARALLEL = Sampler(start, next_round)
