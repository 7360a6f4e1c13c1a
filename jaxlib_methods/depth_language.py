"""A recurrent-depth model as a language model: its call, its cache, and early ends of thinking.

See `models.recurrent_depth` for the model and `depth_config.DepthConfig` for the choices.
"""

# Dimension key: B batch, L tokens of a call, M cache slots, D width, V padded vocabulary.

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.depth_config import DepthConfig, resolve
from jaxlib_methods.models import decoding, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.decoding import Stream
from jaxlib_methods.models.recurrent_depth import Reading, RecurrentCache
from jaxlib_methods.models.transformer import Outputs


class DepthCache(NamedTuple):
    """What a row has read. state: `[B, D]`, where its last token ended, for a warm start."""

    tokens: RecurrentCache
    state: jax.Array

    @property
    def num_slots(self) -> int:
        """M: how many tokens the cache can hold."""
        return self.tokens.num_slots


class Thought(NamedTuple):
    """What `think_steps` gives.

    logits: `[B, L, V]`; state: `[B, L, D]`, the last of each token; steps_used: int32 `[B, L]`,
    how many iterations it took, 0 for padding; cache: the new one, or None.
    """

    logits: jax.Array
    state: jax.Array
    steps_used: jax.Array
    cache: RecurrentCache | None


class Watch(NamedTuple):
    """What a check compares with: what the last one saw, and since when it is so, int32 `[B, L]`.

    previous: of `kl` log-probabilities `[B, L, V]`, of `latent` states `[B, L, D]`, of `entropy`
    nats `[B, L]`, of `argmax` tokens int32 `[B, L]`.
    """

    previous: jax.Array
    since: jax.Array


@dataclasses.dataclass(frozen=True)
class RecurrentModel:
    """A language model with a call like `models.transformer.forward`, and its cache.

    depth is resolved here. A pytree of the seed: as an argument of `jit` another seed needs no
    other program. Hashable too, and equal where it does the same.
    seed: of the noise that a token begins from, which depends on its position alone. A call of one
    token with a cache is a decode step; other calls, and `read_prompt`, read theirs at once.
    """

    model: TransformerConfig
    depth: DepthConfig = DepthConfig()  # noqa: RUF009 (it is frozen)
    seed: jax.Array | int = 0

    def __post_init__(self) -> None:
        if not self.model.recurrence:
            raise ValueError("recurrence 0 is a plain transformer; give a model with recurrence")
        object.__setattr__(self, "depth", resolve(self.depth, self.model.recurrence))
        if self.model.injection == "none":
            self._check_without_injection()

    def _check_without_injection(self) -> None:
        depth, model = self.depth, "a model of injection 'none'"
        if depth.sampler == "parallel":
            raise ValueError(
                f"depth.sampler=parallel reads drafts again, which {model} does not; give "
                "depth.sampler=sequential or continuous"
            )
        for name, unread in {"warm_start": False, "state_scale": 1.0}.items():
            if getattr(depth, name) != unread:
                raise ValueError(
                    f"depth.{name}={getattr(depth, name)} has no meaning for {model}, whose tokens "
                    "begin from what they are; leave it out"
                )

    @property
    def num_steps(self) -> int:
        """Iterations of a token, at most."""
        assert self.depth.num_steps is not None
        return self.depth.num_steps

    def key(self, stream: Stream) -> jax.Array:
        """Of the draws of its own: the states that tokens begin from, and the noise in them."""
        return decoding.stream_key(self.seed, stream)

    def init_cache(self, params: Any, *, batch_size: int, length: int) -> DepthCache:
        """An empty cache of `length` tokens."""
        del params
        tokens = recurrent_depth.init_cache(
            self.model, batch_size=batch_size, length=length, kept_steps=self.depth.kept_steps
        )
        shape = (batch_size, self.model.embed_dim)
        return DepthCache(tokens, jnp.zeros(shape, jnp.dtype(self.model.compute_dtype)))

    def __call__(
        self,
        params: Any,
        inputs: jax.Array,
        *,
        positions: jax.Array,
        segments: jax.Array,
        cache: DepthCache | None = None,
    ) -> Outputs:
        """Logits `[B, L, V]` of the tokens after `inputs`, int32 `[B, L]`; see `Transformer`.

        Raises ValueError for a cache that is not of this model's `init_cache`.
        """
        decodes = cache is not None and inputs.shape[1] == 1
        arguments = {"positions": positions, "segments": segments, "cache": cache}
        return self._call(params, inputs, decodes=decodes, **arguments)

    def read_prompt(self, params: Any, inputs: jax.Array, **arguments: Any) -> Outputs:
        """A call whose tokens, even a single one, are a prompt's and not decoded."""
        return self._call(params, inputs, decodes=False, **arguments)

    def _call(
        self,
        params: Any,
        inputs: jax.Array,
        *,
        positions: jax.Array,
        segments: jax.Array,
        cache: DepthCache | None,
        decodes: bool,
    ) -> Outputs:
        self._check_cache(cache)
        warm = cache.state if cache is not None and decodes and self.depth.warm_start else None
        thought = think_steps(
            self,
            params,
            inputs,
            positions=positions,
            segments=segments,
            cache=None if cache is None else cache.tokens,
            warm=warm,
            exits=decodes or self.depth.exit_in_prompt,
        )
        if cache is None:
            return Outputs(thought.logits, None, None)
        assert thought.cache is not None
        real = (segments[:, -1] != 0)[:, None]
        state = jnp.where(real, thought.state[:, -1], cache.state)
        # `decoding` is generic in its cache, in fact if not in its annotations.
        new: Any = DepthCache(thought.cache, state)
        return Outputs(thought.logits, None, new)

    def _check_cache(self, cache: Any) -> None:
        if cache is None:
            return
        if not isinstance(cache, DepthCache):
            raise ValueError(
                f"a {type(cache).__name__} is no cache of a recurrent model; make one with "
                "RecurrentModel.init_cache"
            )
        if cache.tokens.kept_steps != self.depth.kept_steps:
            raise ValueError(
                f"the cache keeps {cache.tokens.kept_steps} iterations of each token and "
                f"depth.kept_steps={self.depth.kept_steps}; make one with RecurrentModel.init_cache"
            )


def _flatten(model: RecurrentModel) -> tuple[tuple[Any], tuple[TransformerConfig, DepthConfig]]:
    seed = model.seed  # which as a number of its own may have more than 31 bits
    seed = np.uint32(seed % 2**32) if isinstance(seed, int) else seed
    return (seed,), (model.model, model.depth)


def _unflatten(static: tuple[TransformerConfig, DepthConfig], leaves: Any) -> RecurrentModel:
    return RecurrentModel(*static, *leaves)


jax.tree_util.register_pytree_node(RecurrentModel, _flatten, _unflatten)


def start_state(
    model: RecurrentModel, reading: Reading, positions: jax.Array, *, warm: jax.Array | None = None
) -> jax.Array:
    """s_0 `[B, L, D]` of tokens at `positions`, int32 `[B, L]`.

    warm: `[B, D]`, where the token before ended; the first of a row has none before it.
    """
    cfg, depth = model.model, model.depth
    if cfg.injection == "none":
        return reading.embedded
    key = model.key(Stream.STATE)
    state = recurrent_depth.state_at(cfg, positions, key, scale=depth.state_scale)
    if warm is None:
        return state
    return jnp.where((positions > 0)[:, :, None], warm[:, None], state)


def start_watch(model: RecurrentModel, state: jax.Array) -> Watch:
    """The watch before the first iteration: of states `[B, L, D]`, s_0 itself; else nothing."""
    wide = jnp.promote_types(state.dtype, jnp.float32)
    since = jnp.zeros(state.shape[:2], jnp.int32)
    if model.depth.exit == "latent":
        return Watch(state, since)
    if model.depth.exit == "kl":
        shape = (*state.shape[:2], model.model.padded_vocab_size)
        return Watch(jnp.zeros(shape, wide), since)
    return Watch(since if model.depth.exit == "argmax" else since.astype(wide), since)


def check(
    depth: DepthConfig, watch: Watch, state: jax.Array, logits: jax.Array | None, step: jax.Array
) -> tuple[jax.Array, Watch]:
    """Which tokens have converged, bool `[B, L]`, and the new watch.

    state: `[B, L, D]`; logits: `[B, L, V]`, the prediction from it, or None for `latent`; step:
    int32 `[B, L]`, iterations taken. Where no check is due, nothing has.
    """
    due = step % depth.check_every == 0
    first = step <= depth.check_every
    previous, since = watch
    if depth.exit == "latent":
        current = state
        small = relative_change(previous, state) < depth.threshold
    else:
        assert logits is not None
        log_p = jax.nn.log_softmax(logits, axis=-1)
        if depth.exit == "kl":
            current = log_p
            # Rounding may make it negative, and a tolerance of 0 must never end a token.
            terms = jnp.exp(previous) * (previous - log_p)
            small = jnp.maximum(terms.sum(axis=-1), 0) < depth.threshold
        elif depth.exit == "entropy":
            current = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
            small = jnp.abs(current - previous) < depth.threshold
        else:
            current = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            since = jnp.where(due & (first | (current != previous)), step, since)
            small = step - since >= depth.threshold
        small &= ~first
    spread = jnp.expand_dims(due, range(due.ndim, current.ndim))
    watch = Watch(jnp.where(spread, current, previous), since)
    return small & due & (step >= depth.min_steps), watch


def relative_change(before: jax.Array, after: jax.Array) -> jax.Array:
    """||after - before|| / ||after|| of states `[..., D]`: `[...]`, float32 or better."""
    wide = jnp.promote_types(after.dtype, jnp.float32)
    before, after = before.astype(wide), after.astype(wide)
    size = jnp.maximum(jnp.linalg.norm(after, axis=-1), 1e-30)
    return jnp.linalg.norm(after - before, axis=-1) / size


_Examined = tuple[jax.Array, Watch, RecurrentCache | None]


def examine(
    model: RecurrentModel,
    params: Mapping[str, Any],
    watch: Watch,
    state: jax.Array,
    reading: Reading,
    cache: RecurrentCache | None,
    step: jax.Array,
) -> _Examined:
    """`check`, with the prediction that it needs; computed only where a check is due.

    The keys that the coda writes are the final ones, or are written again by the next prediction.
    """

    def look(cache: RecurrentCache | None) -> _Examined:
        logits = None
        if model.depth.checks_prediction:
            logits, _, cache = recurrent_depth.predict(
                model.model, params, state, reading, cache=cache
            )
        return *check(model.depth, watch, state, logits, step), cache

    def skip(cache: RecurrentCache | None) -> _Examined:
        return jnp.zeros(step.shape, bool), watch, cache

    if model.depth.check_every == 1:
        return look(cache)
    return jax.lax.cond((step % model.depth.check_every == 0).any(), look, skip, cache)


class _Search(NamedTuple):
    step: jax.Array
    state: jax.Array
    running: jax.Array
    steps_used: jax.Array
    watch: Watch
    cache: RecurrentCache | None


def think_steps(
    model: RecurrentModel,
    params: Mapping[str, Any],
    inputs: jax.Array,
    *,
    positions: jax.Array,
    segments: jax.Array,
    cache: RecurrentCache | None = None,
    warm: jax.Array | None = None,
    num_steps: int | None = None,
    exits: bool = True,
) -> Thought:
    """Predictions after each of `inputs`, int32 `[B, L]`, and how many iterations each token took.

    A token that has converged keeps its state and its keys; the loop ends when all have. With a
    cache that keeps all iterations, tokens that come at once are as if they came one by one (but
    for checks of a prediction, whose coda then sees tokens that still run). Without a cache a
    token that has ended is seen by the others through keys made of its last state.
    warm: see `start_state`. num_steps: in place of the model's. exits: whether tokens may end
    early; num_steps is then the largest number.
    """
    cfg = model.model
    exits = exits and model.depth.exit != "none"
    limit = model.num_steps if num_steps is None else num_steps
    reading, cache = recurrent_depth.read(
        cfg, params, inputs, positions=positions, segments=segments, cache=cache
    )
    state = start_state(model, reading, positions, warm=warm)
    real = segments != 0

    def advance(search: _Search) -> _Search:
        running = search.running
        state, cache = recurrent_depth.iterate(
            cfg,
            params,
            search.state,
            reading,
            cache=search.cache,
            step=search.step,
            active=running if exits else None,
        )
        step, used, watch = search.step + 1, search.steps_used + running, search.watch
        if exits:
            taken = jnp.broadcast_to(step, running.shape)
            ended, watch, cache = examine(model, params, watch, state, reading, cache, taken)
            running &= ~ended
        return _Search(step, state, running, used, watch, cache)

    found = jax.lax.while_loop(
        lambda search: (search.step < limit) & search.running.any(),
        advance,
        _Search(
            step=jnp.int32(0),
            state=state,
            running=real,
            steps_used=jnp.zeros(inputs.shape, jnp.int32),
            watch=start_watch(model, state),
            cache=cache,
        ),
    )
    logits, _, cache = recurrent_depth.predict(cfg, params, found.state, reading, cache=found.cache)
    return Thought(logits, found.state, found.steps_used, cache)
