"""What a step of reinforcement mid-training learns from: places, thoughts, rewards, advantages."""

# Dimension key: D rows, L sequence, K places of a row, N = D K prompts, G responses of each,
# R response slots.

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import (
    curriculum,
    linear_losses,
    losses,
    policy_gradient,
    rewards,
    rollouts,
    taught_thoughts,
)
from jaxlib_methods.method import Batch, Metrics, TieredBatch
from jaxlib_methods.models import decoding, transformer
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import constrain
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.reinforcement_state import move, watch
from jaxlib_methods.rollouts import Rollouts, Tokens
from jaxlib_methods.thought_prompts import Asked, Frame, ask, frame

EVENLY = np.ones(len(curriculum.TIERS), np.float32) / len(curriculum.TIERS)


class Collected(NamedTuple):
    """What a step learns from. Of K places in each of D rows, G responses each.

    text: the batch; its `where` leaves the chosen targets out. prompts: int32 `[D, K, W]`,
    left-padded, with their lengths `[D, K]`. responses: as `Rollouts`, `[D, K, G, ...]`.
    advantages: `[D, K, G]`. reference: log-probabilities under the initial model `[D, K, G, R]`, or
    zeros. share: `[D]`, tokens of the batch for each of its prompts, so that micro-batches of
    unequal padding give the whole batch's mean.
    """

    text: Batch
    prompts: jax.Array
    lengths: jax.Array
    responses: Rollouts
    advantages: jax.Array
    reference: jax.Array
    share: jax.Array


class Setting(NamedTuple):
    """What is fixed for a run: its model, configuration, tokens and prompts."""

    cfg: ReinforcementMidtrainingConfig
    model: TransformerConfig
    num_steps: int
    prefix_length: int
    tokens: Tokens
    frame: Frame
    spelling: tuple[np.ndarray, np.ndarray] | None  # bytes of each token, where they are compared

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt."""
        return self.prefix_length + self.frame.length

    @property
    def apply(self) -> decoding.Apply:
        """The model as a function of its parameters."""
        return functools.partial(transformer.forward, self.model)

    @property
    def nll(self) -> rollouts.TokenNLL:
        """Losses of its predictions, in the form that `model.loss_implementation` says."""
        return functools.partial(linear_losses.token_nll, self.model)


def tiers_of(setting: Setting, extra: Any, batch: Any) -> jax.Array:
    """The tier of every target, int8 `[D, L]`.

    Those of the batch, where it has any. Otherwise by the entropy of the initial model,
    `extra["initial"]`, and for `positions=uniform` one and the same for all.
    """
    cfg = setting.cfg
    if isinstance(batch, TieredBatch):
        return jnp.where(batch.where, batch.tier, -1).astype(jnp.int8)
    hardest = len(curriculum.TIERS) - 1
    if not cfg.has_tiers:
        return jnp.where(batch.where, hardest, -1).astype(jnp.int8)
    out = setting.apply(
        extra["initial"], batch.inputs, positions=batch.positions, segments=batch.segments
    )
    entropy = linear_losses.token_entropy(setting.model, extra["initial"], out, where=batch.where)
    cuts: Any = cfg.thresholds
    if cuts is None:
        known = jnp.where(batch.where, entropy, jnp.nan)
        cuts = jnp.nanquantile(known, jnp.asarray(cfg.quantiles))
    return jnp.where(batch.where, curriculum.assign_tiers(entropy, cuts), -1).astype(jnp.int8)


def proportions(setting: Setting, step: jax.Array) -> jax.Array:
    """Proportions of easy, medium and hard places at a step, float32 `[3]`."""
    cfg = setting.cfg
    if cfg.task != "text":
        return jnp.asarray(EVENLY)
    if cfg.positions != "curriculum":
        return jnp.array([0.0, 0.0, 1.0])
    return curriculum.tier_probabilities(
        step,
        num_steps=setting.num_steps,
        first=cfg.first_tiers,
        last=cfg.last_tiers,
        begin=cfg.curriculum_begin,
        end=cfg.curriculum_end,
    )


class Thoughts(NamedTuple):
    """Places that were drawn, and what was thought there."""

    places: jax.Array
    tiers: jax.Array
    valid: jax.Array
    asked: Asked
    prompts: jax.Array
    lengths: jax.Array
    responses: Rollouts


def think(
    setting: Setting,
    params: Any,
    batch: Any,
    tiers: jax.Array,
    probabilities: jax.Array,
    budget: jax.Array,
    *,
    num_rollouts: int,
    taught: bool = False,
    temperature: jax.Array | float | None = None,
    thought_limit: jax.Array | int | None = None,
    key: jax.Array,
) -> Thoughts:
    """Draws places and thinks at each of them; or makes up one thought each, `taught`.

    temperature, thought_limit: see `roll_out`; none are those of the configuration.
    """
    cfg = setting.cfg
    place_key, thought_key = jax.random.split(key)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(place_key, jnp.arange(len(tiers)))
    places, drawn, valid = curriculum.draw_positions(
        tiers, probabilities, num_per_row=cfg.positions_per_row, keys=row_keys
    )
    asked = ask(
        batch.inputs, batch.targets, batch.positions, batch.where, places,
        prefix_length=setting.prefix_length, answer_length=cfg.max_answer,
    )  # fmt: skip
    prompts, lengths = frame(setting.frame, budget, asked.prefixes, asked.lengths)
    prompts = constrain(prompts, "batch", None)
    if taught:
        bits = cfg.task == "parity"
        of_task = taught_thoughts.of_parity if bits else taught_thoughts.of_text
        thoughts, sizes = of_task(asked, max_thought=cfg.max_thought, key=thought_key)
        responses = taught_thoughts.respond(
            thoughts, sizes, asked, tokens=setting.tokens, answer_slots=cfg.answer_slots
        )
    else:
        respond = functools.partial(
            _respond,
            setting,
            decoding.gather_weights(setting.model, params) if cfg.gather_weights else params,
            num_rollouts=num_rollouts,
            temperature=cfg.temperature if temperature is None else temperature,
            thought_limit=thought_limit,
            key=thought_key,
        )
        responses = rollouts.in_parts(
            cfg.collect_parts, respond, prompts, lengths, jnp.arange(len(prompts))
        )
    return Thoughts(places, drawn, valid, asked, prompts, lengths, responses)


def _respond(
    setting: Setting,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    numbers: jax.Array,
    **settings: Any,
) -> Rollouts:
    cfg = setting.cfg
    return rollouts.roll_out(
        setting.apply,
        params,
        prompts,
        lengths,
        cache=decoding.init_cache(
            setting.model, batch_size=len(prompts), length=setting.prompt_length
        ),
        max_thought=cfg.max_thought,
        max_answer=cfg.answer_slots,
        tokens=setting.tokens,
        force_close=cfg.force_close or cfg.answer_slots == 0,
        numbers=numbers,
        **settings,
    )


def matches(setting: Setting, asked: Asked, responses: Rollouts) -> jax.Array:
    """Whether each answer is right by the chosen rule, float32 `[N, G]`."""
    answers, lengths = responses.answers, responses.answer_lengths
    truths, truth_lengths = asked.truths[:, None], asked.truth_lengths[:, None]
    if setting.cfg.reward == "match":
        return rewards.match_reward(answers, lengths, truths[..., 0])
    place = jnp.arange(answers.shape[-1])[None, None]
    if setting.cfg.reward == "exact":
        same = (answers == truths) | (place >= lengths[..., None])
        return (same.all(axis=-1) & (lengths == truth_lengths)).astype(jnp.float32)
    assert setting.spelling is not None
    table, sizes = map(jnp.asarray, setting.spelling)
    room = table.shape[1] * answers.shape[-1]
    said, said_length = rewards.spell(answers, lengths, table, sizes, size=room)
    true, true_length = rewards.spell(truths, truth_lengths, table, sizes, size=room)
    if setting.cfg.reward == "boxed":
        said, said_length = rewards.boxed(said, said_length)
    if setting.cfg.reward != "prefix_match":
        return rewards.same_text_reward(said, said_length, true, true_length)
    ends = jnp.cumsum(sizes[truths], axis=-1)
    ends = jnp.where(place < truth_lengths[..., None], ends, 0)
    return rewards.prefix_match_reward(said, said_length, true, ends)


def _gain(
    setting: Setting, params: Any, baseline: Any, thoughts: Thoughts
) -> tuple[jax.Array, jax.Array]:
    """log p(x | prefix, thought) `[N, G]` and log p(x | prefix) `[N]`, both without gradient."""
    asked, target = thoughts.asked, thoughts.asked.truths[:, 0]
    after_thoughts = functools.partial(
        rollouts.target_log_probs, setting.apply, params, tokens=setting.tokens, nll=setting.nll
    )
    thought = (thoughts.prompts, thoughts.lengths, thoughts.responses)
    with_thought = rollouts.in_parts(setting.cfg.collect_parts, after_thoughts, *thought, target)
    after_prefixes = functools.partial(
        rollouts.prefix_log_probs, setting.apply, baseline, nll=setting.nll
    )
    without = rollouts.in_parts(
        setting.cfg.collect_parts, after_prefixes, asked.prefixes, asked.lengths, target
    )
    return jax.lax.stop_gradient(with_thought), jax.lax.stop_gradient(without)


def advantages_of(cfg: ReinforcementMidtrainingConfig, reward: jax.Array) -> jax.Array:
    """Advantages of rewards `[..., G]`."""
    if cfg.advantage == "group":
        return policy_gradient.group_advantages(reward, epsilon=cfg.advantage_epsilon)
    if cfg.advantage == "leave_one_out":
        return policy_gradient.leave_one_out_advantages(reward)
    return reward


def average(values: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) over the responses `[N, G]`, or prompts `[N]`, of valid prompts `[N]`."""
    where = jnp.broadcast_to(jnp.reshape(valid, (-1,) + (1,) * (values.ndim - 1)), values.shape)
    return losses.masked_sum(values.astype(jnp.float32), where=where)


def budget_at(cfg: ReinforcementMidtrainingConfig, step: jax.Array, num_steps: int) -> jax.Array:
    """The step's token budget, int32."""
    return rewards.token_budget(
        step,
        num_steps=num_steps,
        first=cfg.budget,
        decay=cfg.budget_decay,
        least=cfg.least_budget,
    )


def score(
    setting: Setting, params: Any, baseline: Any, thoughts: Thoughts, budget: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Rewards `[N, G]` and what is to be known of them."""
    cfg, responses = setting.cfg, thoughts.responses
    valid = thoughts.valid.reshape(-1)
    metrics: Metrics = {
        "thought_length": average(responses.thought_lengths, valid),
        "closed": average(responses.closed, valid),
    }
    if cfg.reward == "information_gain":
        with_thought, without = _gain(setting, params, baseline, thoughts)
        reward = rewards.information_gain(with_thought, without[:, None])
        metrics["log_prob"] = average(with_thought, valid)
        metrics["plain_log_prob"] = average(without, valid)
        return reward, metrics
    match = matches(setting, thoughts.asked, responses)
    length = rewards.length_reward(responses.thought_lengths, budget, peak=cfg.length_peak)
    metrics["accuracy"] = average(match, valid)
    metrics["length_reward"] = average(length, valid)
    return rewards.total_reward(match, length, weight=cfg.length_weight), metrics


def _shares(setting: Setting, thoughts: Thoughts) -> Metrics:
    """How many of the places belong to each tier, where they have any."""
    if not setting.cfg.has_tiers:
        return {}
    tiers, where = thoughts.tiers.reshape(-1), thoughts.valid.reshape(-1)
    return {
        f"share_{name}": losses.masked_sum((tiers == i).astype(jnp.float32), where=where)
        for i, name in enumerate(curriculum.TIERS)
    }


def _empties(setting: Setting, tiers: jax.Array, probabilities: jax.Array) -> Metrics:
    """Whether a tier of the text that is to be drawn from has no token in the whole batch."""
    if setting.cfg.task != "text" or not setting.cfg.has_tiers:
        return {}
    empty = [(share > 0) & ~(tiers == i).any() for i, share in enumerate(probabilities)]
    pairs = zip(curriculum.TIERS, empty, strict=True)
    return {f"empty_{name}": (found.astype(jnp.float32), jnp.ones(())) for name, found in pairs}


def make_collect(setting: Setting) -> Callable[..., Any]:
    """Draws places, thinks, scores: see `CollectFn`. Its state is that of `init_state`."""
    cfg = setting.cfg

    def collect(
        params: Any, extra: Any, batch: Any, state: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[Collected, Any, Metrics]:
        state = move(cfg, state, params, step)
        budget = budget_at(cfg, step, setting.num_steps)
        tiers, probabilities = tiers_of(setting, extra, batch), proportions(setting, step)
        thoughts = think(
            setting, params, batch, tiers, probabilities, budget, num_rollouts=cfg.rollouts, key=key
        )
        reward, metrics = score(setting, params, state.get("average"), thoughts, budget)
        valid = thoughts.valid.reshape(-1)
        rewarded = average(reward, valid)
        state, fall = watch(state, *rewarded, step)
        one = jnp.ones(())
        metrics |= {
            "reward": rewarded,
            "reward_fall": (fall, one),
            "budget": (budget.astype(jnp.float32), one),
            **_shares(setting, thoughts),
            **_empties(setting, tiers, probabilities),
        }
        advantages = jnp.where(valid[:, None], advantages_of(cfg, reward), 0)
        reference = jnp.zeros_like(thoughts.responses.log_probs)
        if cfg.kl_weight:
            by_initial = functools.partial(
                rollouts.response_log_probs, setting.apply, extra["initial"],
                temperature=cfg.temperature, nll=setting.nll,
            )  # fmt: skip
            asked = (thoughts.prompts, thoughts.lengths, thoughts.responses)
            reference = rollouts.in_parts(cfg.collect_parts, by_initial, *asked)
        # Behind a question stands nothing but its answer.
        left_out = "place" if cfg.task == "text" else "rest"
        found = _collected(batch, thoughts, advantages, reference, left_out=left_out)
        return found, state, metrics

    return collect


def make_teach(setting: Setting) -> Callable[..., Any]:
    """Draws places and makes up a thought for each: a `CollectFn` without a state.

    Prompts show budgets drawn evenly, so that each has been read; the thoughts do not follow them.
    """
    cfg = setting.cfg

    def teach(
        params: Any, extra: Any, batch: Any, state: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[Collected, Any, Metrics]:
        budget_key, key = jax.random.split(key)
        budget = jax.random.randint(budget_key, (), cfg.least_budget, cfg.budget + 1)
        tiers, probabilities = tiers_of(setting, extra, batch), proportions(setting, step)
        thoughts = think(
            setting, params, batch, tiers, probabilities, budget,
            num_rollouts=1, taught=True, key=key,
        )  # fmt: skip
        responses, valid = thoughts.responses, thoughts.valid.reshape(-1)
        metrics = {"thought_length": average(responses.thought_lengths, valid)}
        metrics |= _empties(setting, tiers, probabilities)
        weights = valid[:, None].astype(jnp.float32)
        reference = jnp.zeros_like(responses.log_probs)
        # As next tokens these targets count too: nothing else teaches them without a thought.
        found = _collected(batch, thoughts, weights, reference, left_out="none")
        return found, state, metrics

    return teach


def _collected(
    batch: Any,
    thoughts: Thoughts,
    advantages: jax.Array,
    reference: jax.Array,
    *,
    left_out: Literal["place", "rest", "none"],
) -> Collected:
    """left_out: what is no next token: the chosen targets, or those behind them in a row too."""
    D, K = thoughts.places.shape
    rows = jnp.arange(D)[:, None]
    chosen = jnp.zeros(batch.where.shape, bool).at[rows, thoughts.places].max(thoughts.valid)
    if left_out == "rest":
        chosen = jnp.cumsum(chosen, axis=1) > 0
    where = batch.where if left_out == "none" else batch.where & ~chosen
    text = Batch(batch.inputs, batch.targets, batch.positions, batch.segments, where)
    share = where.sum() / jnp.maximum(thoughts.valid.sum(), 1)
    by_row = lambda x: x.reshape(D, K, *x.shape[1:])  # noqa: E731
    # Where no place was found, the thoughts about the row's first token count nowhere.
    responses = jax.tree.map(by_row, thoughts.responses)
    responses = responses._replace(where=responses.where & thoughts.valid[..., None, None])
    return Collected(
        text=text,
        prompts=by_row(thoughts.prompts),
        lengths=by_row(thoughts.lengths),
        responses=responses,
        advantages=by_row(advantages),
        reference=by_row(reference),
        share=jnp.broadcast_to(share, (D,)),
    )
