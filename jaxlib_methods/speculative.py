"""Self-speculative sampling: a recurrent-depth model drafts with few iterations of itself.

A round drafts n tokens, one by one, with `draft_steps` iterations; then one pass with all
iterations reads them together and draws a token after each. Drafts are accepted as long as the
drawn token is the drafted one; the first that differs takes its place. So a round yields 1 to
n + 1 tokens (arXiv 2502.05171, section 6.4).

Every token is drawn from logits of all iterations, with the draw that belongs to its position: the
text is that of sequential sampling with the same key, at any temperature (drafts share the draw,
and are not rejected by chance). Exact where the cache keeps all iterations; where it keeps fewer,
tokens that are read together see each other's unfinished keys, and the text is that of sequential
sampling as far as predictions have converged.
"""

# Dimension key: B batch, N drafts, P padded prompt, T new tokens.

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.depth_language import RecurrentModel, think_steps
from jaxlib_methods.depth_sampling import (
    Draws,
    Sampler,
    Text,
    append,
    draw,
    empty_text,
    read_prompts,
)
from jaxlib_methods.models.recurrent_depth import RecurrentCache


class SpeculativeState(NamedTuple):
    """Where a batch of continuations stands.

    cache: everything before `last`, int32 `[B]`, the newest token, which stands at `positions`
    `[B]`. text: what has been generated. rounds, accepted: int32 `[B]`, verifications until a row
    is done, and the drafts that they accepted. serial_steps: int32 scalar, passes of the core one
    after the other, the prompt's included.
    """

    cache: RecurrentCache
    last: jax.Array
    positions: jax.Array
    text: Text
    rounds: jax.Array
    accepted: jax.Array
    serial_steps: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """What has been generated, int32 `[B, T]`."""
        return self.text.tokens

    @property
    def lengths(self) -> jax.Array:
        """How many tokens of each row, int32 `[B]`."""
        return self.text.lengths


def start(
    model: RecurrentModel,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
) -> SpeculativeState:
    """Reads all but the last token of each prompt.

    tokens: int32 `[B, P]`, left-padded; lengths: int32 `[B]`, real tokens, at least 1.
    Raises ValueError for a model whose tokens begin from the state before, or end early.
    """
    depth = model.depth
    if depth.exit != "none" or depth.warm_start:
        raise ValueError(
            f"depth.exit={depth.exit} and depth.warm_start={depth.warm_start} are not for drafts, "
            "which are verified at once; give exit=none and warm_start=False"
        )
    B, P = tokens.shape
    text = empty_text(B, max_new_tokens)
    return SpeculativeState(
        cache=read_prompts(model, params, tokens, lengths, num_slots=P + max_new_tokens).tokens,
        last=tokens[:, -1],
        positions=lengths - 1,
        text=text,
        rounds=jnp.zeros((B,), jnp.int32),
        accepted=jnp.zeros((B,), jnp.int32),
        serial_steps=jnp.int32(model.num_steps if P > 1 else 0),
    )


def next_round(
    model: RecurrentModel, params: Any, state: SpeculativeState, draws: Draws
) -> SpeculativeState:
    """Drafts, verifies them together, and appends 1 to n + 1 tokens to each row."""
    N, running = model.depth.draft_tokens, ~state.text.done
    drafts, cache = _draft(model, params, state, draws)
    read = jnp.concatenate([state.last[:, None], drafts], axis=1)
    offsets = jnp.arange(N + 1)[None]
    logits, cache = _think(model, params, state, read, offsets, cache, model.num_steps)
    drawn = draw(draws, logits, state.text.lengths[:, None] + offsets)
    accepted = jnp.cumprod(drawn[:, :-1] == drafts, axis=1).sum(axis=1)
    text = append(draws, state.text, drawn, accepted + 1)
    new = text.lengths - state.text.lengths
    newest = jnp.take_along_axis(drawn, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0]
    return SpeculativeState(
        cache=cache,
        last=jnp.where(running, newest, state.last),
        positions=state.positions + new,
        text=text,
        rounds=state.rounds + running,
        # Of what was accepted, the last may be the verification's own.
        accepted=state.accepted + jnp.minimum(accepted, new),
        serial_steps=state.serial_steps + N * model.depth.draft_steps + model.num_steps,
    )


def _draft(
    model: RecurrentModel, params: Any, state: SpeculativeState, draws: Draws
) -> tuple[jax.Array, RecurrentCache]:
    """Drafts int32 `[B, N]`, and the cache, whose slots of them will be written again."""

    def body(carry: Any, offset: jax.Array) -> tuple[Any, jax.Array]:
        last, cache = carry
        offsets = offset[None, None]
        steps = model.depth.draft_steps
        logits, cache = _think(model, params, state, last[:, None], offsets, cache, steps)
        token = draw(draws, logits, state.text.lengths[:, None] + offsets)[:, 0]
        return (token, cache), token

    offsets = jnp.arange(model.depth.draft_tokens)
    (_, cache), drafts = jax.lax.scan(body, (state.last, state.cache), offsets)
    return drafts.T, cache


def _think(
    model: RecurrentModel,
    params: Any,
    state: SpeculativeState,
    tokens: jax.Array,
    offsets: jax.Array,
    cache: RecurrentCache,
    num_steps: int,
) -> tuple[jax.Array, RecurrentCache]:
    """Logits after `tokens` `[B, L]` at `offsets` `[1, L]` from the newest, and the cache."""
    room = state.text.tokens.shape[1] - state.text.lengths
    real = offsets < room[:, None]
    thought = think_steps(
        model,
        params,
        tokens,
        positions=state.positions[:, None] + offsets,
        segments=real.astype(jnp.int32),
        cache=cache,
        num_steps=num_steps,
        exits=False,
    )
    assert thought.cache is not None
    return thought.logits, thought.cache


SPECULATIVE = Sampler(start, next_round)
