"""Thinking about text: candidates of every next token, and a language model made of them.

See `jaxlib_methods.thinking` for the loop, `jaxlib_methods.energy` for the method.
"""

# Dimension key: B batch, M candidates, R rows (positions), L tokens, V padded vocabulary.

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods import energy_text
from jaxlib_methods.descent import Energy
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.energy_text import Descent, Observed
from jaxlib_methods.models import decoding, energy_transformer
from jaxlib_methods.models.decoding import Stream
from jaxlib_methods.models.energy_transformer import EnergyTransformerConfig, ObservedCache, Rows
from jaxlib_methods.models.transformer import Outputs
from jaxlib_methods.thinking import Problem, ThinkConfig, think


def resolve(cfg: ThinkConfig, run: EnergyConfig) -> ThinkConfig:
    """The same with the run's own number of steps and noise where they are none."""
    noise = run.noise if cfg.num_candidates > 1 else run.eval_noise
    return dataclasses.replace(
        cfg,
        num_steps=cfg.num_steps or run.most_steps,
        noise=noise if cfg.noise is None else cfg.noise,
    )


def candidate_keys(key: jax.Array, num_candidates: int) -> jax.Array:
    """A key for each candidate `[M]`; those of fewer candidates are the first of these."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_candidates))


def make_problem(
    run: EnergyConfig,
    model: EnergyTransformerConfig,
    params: Any,
    context: Observed,
    cfg: ThinkConfig,
    *,
    keys: jax.Array,
) -> tuple[Problem, jax.Array]:
    """Thinking about text: the problem, and the first candidates `[B, M, R, V]`.

    keys: `[M]`, see `candidate_keys`. What a candidate draws depends on its key, its position and
    the step: the prediction of a token is the same in whatever batch, and whether the tokens
    before it come at once or one by one. cfg: resolved.
    """
    vocab = model.trunk.padded_vocab_size
    at = context.rows.positions

    def of_position(position: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(key, position))

    of_row = jax.vmap(of_position, (0, None))
    both = jax.vmap(jax.vmap(of_row, (None, 0)), (0, None))(at, keys)  # [B, M, R, 2]
    initial = functools.partial(energy_text.initial_logits, run, (vocab,))
    candidates = _for_each(initial)(both[..., 0])
    quiet = Descent(run, model, 0.0, keys[0])
    sigma = cfg.noise or 0.0

    def noisy(logits: jax.Array, step: jax.Array) -> jax.Array:
        drawn = _for_each(
            lambda key: jax.random.normal(jax.random.fold_in(key, step), (vocab,), logits.dtype)
        )(both[..., 1])
        return quiet.start(logits + sigma * drawn, step)

    problem = Problem(
        energy=functools.partial(_energy_of_candidates, quiet.energy()),
        params=params,
        context=context,
        step_size=_step_size(cfg, params),
        start=noisy if sigma else quiet.start,
        context_at=quiet.context_at,
        settle=quiet.start if sigma else None,
        entropy=functools.partial(entropy, vocab_size=model.trunk.vocab_size),
    )
    return problem, candidates


def _for_each(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return jax.vmap(jax.vmap(jax.vmap(function)))  # over [B, M, R]


def _energy_of_candidates(
    energy: Energy, params: Any, context: Observed, candidates: jax.Array
) -> jax.Array:
    """M candidates at a place are M rows of the candidate stream, over one observed cache."""
    B, M, R, V = candidates.shape
    rows = Rows(*(jnp.tile(x, (1, M)) for x in context.rows))
    stood = candidates.reshape(B, M * R, V)
    return energy(params, context._replace(rows=rows), stood).reshape(B, M, R)


def _step_size(cfg: ThinkConfig, params: Mapping[str, Any]) -> jax.Array:
    trained = energy_text.step_size(params)
    if cfg.step_size is None:
        return trained
    return trained * cfg.step_size if cfg.step_size < 1 else jnp.full_like(trained, cfg.step_size)


def entropy(logits: jax.Array, *, vocab_size: int) -> jax.Array:
    """Entropy of softmax(logits) over the real vocabulary: `[..., V]` to `[...]` nats."""
    log_p = jax.nn.log_softmax(energy_text.mask_padding(logits, vocab_size), axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def score(
    model: EnergyTransformerConfig, params: Any, context: Observed, tokens: jax.Array
) -> jax.Array:
    """Energies of given tokens, int32 `[B, R]`, as certain predictions in their rows: `[B, R]`.

    In the last landscape, which serves all later steps.
    """
    last = jnp.int32(max(model.num_landscapes, 1) - 1)
    cache = energy_transformer.landscape_at(context.cache, last)
    certain = jax.nn.one_hot(tokens, model.trunk.padded_vocab_size)
    return energy_transformer.judge(model, params, certain, context.rows, cache)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Thinker:
    """A language model that thinks: a call like `models.transformer.forward`, and its cache.

    `Thinker(run, model, think)`: think is resolved here. Hashable, and equal where it does the
    same: a static argument of `jit`. seed: of candidates and noise.
    """

    run: EnergyConfig
    model: EnergyTransformerConfig
    think: ThinkConfig = ThinkConfig()  # noqa: RUF009 (it is frozen)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "think", resolve(self.think, self.run))

    @property
    def reserved_slots(self) -> int:
        """Slots of a cache that hold no token."""
        return self.model.shift

    def check_memory(self, num_rows: int) -> None:
        """Raises ValueError where the candidates of `num_rows` predictions are too large."""
        vocab, count = self.model.trunk.padded_vocab_size, self.think.num_candidates
        # Where a step began, its slope, where it ended, and the noise.
        needed = 4 * num_rows * count * vocab * 4 / 2**30
        if needed > self.run.max_candidate_gib:
            raise ValueError(
                f"{count} candidates over a vocabulary of {vocab} tokens for {num_rows} "
                f"predictions at once take {needed:.1f} GiB over all devices, the run's "
                f"energy.max_candidate_gib={self.run.max_candidate_gib} allows less; give a "
                "smaller --data.batch_size or --think.num_candidates"
            )

    def init_cache(self, params: Any, *, batch_size: int, length: int) -> ObservedCache:
        """A cache of `length` tokens that has observed the landscapes."""
        return energy_transformer.begin(self.model, params, batch_size=batch_size, length=length)

    def __call__(
        self,
        params: Any,
        inputs: jax.Array,
        *,
        positions: jax.Array,
        segments: jax.Array,
        cache: ObservedCache | None = None,
    ) -> Outputs:
        """Logits `[B, L, V]` of the tokens after `inputs`, int32 `[B, L]`; see `Transformer`."""
        observed = self.observe(params, inputs, positions, segments, cache)
        logits = self.predict(params, observed)
        # `decoding` is generic in its cache, in fact if not in its annotations.
        new: Any = None if cache is None else observed.cache
        return Outputs(logits, None, new)

    def observe(
        self,
        params: Any,
        inputs: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        cache: ObservedCache | None = None,
    ) -> Observed:
        """The context of predictions after each of `inputs`, appended to what a cache holds."""
        read = energy_transformer.observe(
            self.model, params, inputs, positions=positions, segments=segments, cache=cache
        )
        return Observed(read, Rows(positions, segments))

    def predict(self, params: Any, context: Observed) -> jax.Array:
        """Logits `[B, R, V]` of the next tokens in a context, padding masked."""
        problem, candidates = self.problem(params, context)
        return self.mask_padding(think(problem, candidates, self.think).candidate)

    def mask_padding(self, logits: jax.Array) -> jax.Array:
        """Logits `[..., V]` with those of the padded vocabulary out of reach."""
        return energy_text.mask_padding(logits, self.model.trunk.vocab_size)

    def problem(self, params: Any, context: Observed) -> tuple[Problem, jax.Array]:
        """What is thought about in a context: see `make_problem`."""
        key = decoding.stream_key(self.seed, Stream.CANDIDATES)
        keys = candidate_keys(key, self.think.num_candidates)
        return make_problem(self.run, self.model, params, context, self.think, keys=keys)
