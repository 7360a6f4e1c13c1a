"""What the samplers of a recurrent-depth model share: prompts, draws, the text and the loop."""

# Dimension key: B batch, P padded prompt, L tokens at once, T new tokens, V padded vocabulary.

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from jaxlib_methods.depth_language import DepthCache, RecurrentModel
from jaxlib_methods.models import decoding
from jaxlib_methods.models.decoding import SamplingConfig


class Draws(NamedTuple):
    """How tokens are drawn, and which end a row: a pytree of arguments.

    Token t of row b has the key `fold_in(fold_in(key, b), t)`, as in `decoding.decode_steps`: with
    it a draw is a function of the logits, and a token drawn again from the same logits is the same.
    stop_tokens: int32 `[N]`.
    """

    sampling: SamplingConfig
    key: jax.Array
    stop_tokens: jax.Array


class Text(NamedTuple):
    """What has been generated. tokens: int32 `[B, T]`, 0 from `lengths` `[B]` on; done: `[B]`."""

    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array


def make_draws(
    sampling: SamplingConfig, key: jax.Array, stop_tokens: jax.Array | tuple[int, ...] = ()
) -> Draws:
    """`Draws` of what `decoding.decode_steps` takes."""
    return Draws(sampling, key, jnp.asarray(stop_tokens, jnp.int32))


def draw(draws: Draws, logits: jax.Array, steps: jax.Array) -> jax.Array:
    """Tokens int32 `[B, L]` from logits `[B, L, V]`; steps: int32 `[B, L]`, the t of each."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(draws.key, jnp.arange(len(logits)))

    def one(logits: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
        return decoding.sample(logits, draws.sampling, key=jax.random.fold_in(key, step))

    return jax.vmap(jax.vmap(one, (0, None, 0)))(logits, keys, steps)


def empty_text(batch_size: int, max_new_tokens: int) -> Text:
    """A text of no tokens. Raises ValueError where it may have none."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
    lengths = jnp.zeros((batch_size,), jnp.int32)
    tokens = jnp.zeros((batch_size, max_new_tokens), jnp.int32)
    return Text(tokens, lengths, jnp.zeros((batch_size,), bool))


def append(draws: Draws, text: Text, new: jax.Array, count: jax.Array) -> Text:
    """The text with the first `count` (int32 `[B]`) of the tokens `new`, int32 `[B, L]`.

    Those after a stop token, and those for which there is no room, are left out. A row is done at
    its stop token, or when it is full; it then takes no more.
    """
    room = text.tokens.shape[1]
    index = jnp.arange(new.shape[1])[None]
    at = text.lengths[:, None] + index
    valid = (index < count[:, None]) & (at < room) & ~text.done[:, None]
    stops = (new[:, :, None] == draws.stop_tokens[None, None]).any(axis=-1) & valid
    valid &= jnp.cumsum(stops, axis=1) - stops == 0
    rows = jnp.arange(len(new))[:, None]
    tokens = text.tokens.at[rows, jnp.where(valid, at, room)].set(new, mode="drop")
    lengths = text.lengths + valid.sum(axis=1)
    return Text(tokens, lengths, text.done | stops.any(axis=1) | (lengths >= room))


def read_prompts(
    model: RecurrentModel, params: Any, tokens: jax.Array, lengths: jax.Array, *, num_slots: int
) -> DepthCache:
    """A cache with all but the last token of each prompt, as `decoding.prefill` reads them.

    tokens: int32 `[B, P]`, left-padded; lengths: int32 `[B]`, real tokens, at least 1.
    """
    B, P = tokens.shape
    cache = model.init_cache(params, batch_size=B, length=num_slots)
    if P == 1:
        return cache
    indices = jnp.arange(P - 1)[None] - (P - lengths)[:, None]
    out: Any = model.read_prompt(
        params,
        tokens[:, :-1],
        positions=jnp.maximum(indices, 0),
        segments=(indices >= 0).astype(jnp.int32),
        cache=cache,
    )
    return out.cache


class _Sampled(Protocol):
    @property
    def text(self) -> Text: ...


State = TypeVar("State", bound=_Sampled)


@dataclasses.dataclass(frozen=True)
class Sampler(Generic[State]):
    """A way to continue prompts: how it begins, and what it does again and again.

    start: `(model, params, tokens, lengths, *, max_new_tokens)` to a first state.
    next_round: `(model, params, state, draws)` to a state with the same tokens, and maybe more.
    """

    start: Callable[..., State]
    next_round: Callable[[RecurrentModel, Any, State, Draws], State]

    def advance(
        self,
        model: RecurrentModel,
        params: Any,
        state: State,
        draws: Draws,
        *,
        num_rounds: jax.Array | int | None = None,
        num_tokens: jax.Array | int | None = None,
    ) -> State:
        """More rounds until every row is done, at its stop token, which counts, or with no room.

        num_rounds: at most so many. num_tokens: until a row has so many more tokens.
        """
        lengths = state.text.lengths

        def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
            count, text = carry[0], carry[1].text
            more = ~text.done.all()
            if num_rounds is not None:
                more &= count < num_rounds
            if num_tokens is not None:
                more &= (text.lengths - lengths < num_tokens).all()
            return more

        def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            return carry[0] + 1, self.next_round(model, params, carry[1], draws)

        return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]

    def generate(
        self,
        model: RecurrentModel,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        draws: Draws,
        *,
        max_new_tokens: int,
    ) -> State:
        """Continues each prompt by up to `max_new_tokens` tokens: from the start to the end.

        tokens: int32 `[B, P]`, left-padded; lengths: int32 `[B]`, real tokens, at least 1.
        """
        state = self.start(model, params, tokens, lengths, max_new_tokens=max_new_tokens)
        return self.advance(model, params, state, draws)
