"""Thoughts made up by a rule, to be imitated before any are rewarded: the cold start.

A model that has never seen a thought does not end one. These teach the form: think, end it,
answer. Only in parity do half of them help. Neither paper says how this is done.
"""

# Dimension key: N prompts, P prefix, R response slots, A answer slots.

import jax
import jax.numpy as jnp

from jaxlib_methods.rollouts import Rollouts, Tokens
from jaxlib_methods.thought_prompts import Asked

FILLER = ord(".")
MOST_FILLER = 8  # behind a useful thought


def of_parity(asked: Asked, *, max_thought: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thoughts int32 `[N, max_thought]` about bits, and their lengths `[N]`.

    Half of them are the running parities and 0 to 8 fillers, as many as fit; the others are 0 to
    max_thought fillers.
    """
    N, P = asked.prefixes.shape
    bits = P - 1  # behind them stands "="
    kind_key, few_key, any_key = jax.random.split(key, 3)
    useful = jax.random.bernoulli(kind_key, shape=(N,))
    few = bits + jax.random.randint(few_key, (N,), 0, MOST_FILLER + 1)
    lengths = jnp.where(
        useful,
        jnp.minimum(few, max_thought),
        jax.random.randint(any_key, (N,), 0, max_thought + 1),
    )
    parities = jnp.cumsum(asked.prefixes[:, :bits] - ord("0"), axis=1) % 2 + ord("0")
    parities = jnp.pad(parities, ((0, 0), (0, max(max_thought - bits, 0))), constant_values=FILLER)
    thoughts = jnp.where(useful[:, None], parities[:, :max_thought], FILLER)
    return thoughts.astype(jnp.int32), lengths.astype(jnp.int32)


def of_text(asked: Asked, *, max_thought: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thoughts that repeat the last tokens of the prefix, 0 to max_thought of them as they fit."""
    N, P = asked.prefixes.shape
    lengths = jax.random.randint(key, (N,), 0, max_thought + 1)
    lengths = jnp.minimum(lengths, asked.lengths)
    place = P - lengths[:, None] + jnp.arange(max_thought)[None]
    thoughts = jnp.take_along_axis(asked.prefixes, jnp.clip(place, 0, P - 1), axis=1)
    return thoughts, lengths


def respond(
    thoughts: jax.Array,
    lengths: jax.Array,
    asked: Asked,
    *,
    tokens: Tokens,
    answer_slots: int,
) -> Rollouts:
    """Responses `[N, 1, R]` that think this and answer what the text says. No log-probabilities."""
    N, room = thoughts.shape
    slot = jnp.arange(room + 1 + answer_slots)[None]
    padded = jnp.pad(thoughts, ((0, 0), (0, 1 + answer_slots)))
    count = jnp.minimum(asked.truth_lengths, answer_slots)
    answers = asked.truths[:, :answer_slots]
    place = slot - lengths[:, None] - 1  # in the answer
    response = jnp.where(slot < lengths[:, None], padded, tokens.pad)
    response = jnp.where(place == -1, tokens.close, response)
    if answer_slots:
        said = jnp.take_along_axis(answers, jnp.clip(place, 0, answer_slots - 1), axis=1)
        response = jnp.where((place >= 0) & (place < count[:, None]), said, response)
        # An answer that is shorter than its slots is ended.
        ends = (place == count[:, None]) & (count < answer_slots)[:, None]
        response = jnp.where(ends, tokens.end, response)
    ended = jnp.minimum(count + 1, answer_slots)
    whole = lengths + 1 + ended
    one = lambda x: x[:, None]  # noqa: E731
    return Rollouts(
        tokens=one(response),
        where=one(slot < whole[:, None]),
        log_probs=one(jnp.zeros(response.shape)),
        lengths=one(whole),
        thought_lengths=one(lengths),
        closed=one(jnp.ones((N,), bool)),
        answers=one(
            jnp.where(jnp.arange(answer_slots)[None] < count[:, None], answers, tokens.pad)
        ),
        answer_lengths=one(count),
    )
