"""Reinforcement mid-training (RMT, arXiv 2509.24375), with RPT (2506.08007) and RLP (2510.01265).

At a few places of a text the model thinks before it says the next token. Thoughts of one place are
compared with one another: the reward is that the token is the text's, and that the thought has the
length of a budget which shrinks during the run. Every other token is predicted as usual:

    L = -mean_i A_i log pi(thought_i, answer_i | prefix) + beta KL + lambda L_NTP(other tokens)
    r = (1 - w) [y = x_t] + w r_len(|thought|; B_t),   A = (r - mean r) / std r

A step first collects (`make_collect`): it draws the places, thinks, and scores. Its loss then sees
the responses as data.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import curriculum, losses, next_token, policy_gradient, rewards, rollouts
from jaxlib_methods.method import Context, LossFn, Method, Metrics
from jaxlib_methods.reinforcement_collect import (
    EVENLY,
    Collected,
    Setting,
    Thoughts,
    average,
    budget_at,
    make_collect,
    make_teach,
    matches,
    score,
    think,
    tiers_of,
)
from jaxlib_methods.reinforcement_flops import train_flops
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.reinforcement_state import init_state
from jaxlib_methods.rollouts import Tokens
from jaxlib_methods.tasks import parity, written_questions
from jaxlib_methods.tasks.questions import SPLITS, Split
from jaxlib_methods.tasks.written_questions import WrittenQuestions
from jaxlib_methods.thought_prompts import make_frame


def make_loss(setting: Setting) -> LossFn:
    """The loss on what was collected.

    Metrics: `loss` (next tokens that were not reasoned about), `policy_loss`, `clip_fraction`,
    `mismatch` (between log-probabilities of the rollout and of training, mean absolute), `kl`.
    """
    cfg = setting.cfg
    plain = next_token.make_loss(setting.model)

    def loss(
        params: Any, extra: Any, batch: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        found: Collected = batch
        trained = params if cfg.ntp_weight else jax.lax.stop_gradient(params)
        ntp, metrics = plain(trained, extra, found.text, step=step, key=key)
        flat = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # noqa: E731
        responses = jax.tree.map(flat, found.responses)
        log_probs = rollouts.response_log_probs(
            setting.apply, params, flat(found.prompts), flat(found.lengths), responses,
            temperature=cfg.temperature, nll=setting.nll,
        )  # fmt: skip
        clip: dict[str, Any] = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
        old, where, advantages = responses.log_probs, responses.where, flat(found.advantages)
        taught = cfg.policy == "taught"
        each = -log_probs * advantages[..., None]
        if not taught:
            each = policy_gradient.clipped_surrogate(
                log_probs, old, advantages, where=where, **clip
            )
        metrics = dict(metrics)
        if cfg.kl_weight:
            kl = policy_gradient.k3_kl(log_probs, flat(found.reference))
            each = each + cfg.kl_weight * kl
            metrics["kl"] = losses.masked_sum(kl, where=where)
        divisor = None if cfg.token_mean else cfg.response_slots
        of_each = policy_gradient.per_response(each, where=where, divisor=divisor).mean(axis=-1)
        count = metrics["loss"][1]
        policy = found.share[0] * of_each.sum() / jnp.maximum(count, 1)
        metrics["policy_loss"] = (policy * count, count)
        if not taught:
            clipped = policy_gradient.clipped(log_probs, old, advantages, where=where, **clip)
            metrics["clip_fraction"] = losses.masked_sum(clipped.astype(jnp.float32), where=where)
            metrics["mismatch"] = losses.masked_sum(jnp.abs(log_probs - old), where=where)
        return cfg.rl_weight * policy + cfg.ntp_weight * ntp, metrics

    return loss


def make_evaluate(setting: Setting) -> LossFn:
    """Validation: next tokens without thought, and places with one.

    Metrics: `loss`; at places drawn evenly from the tiers, where text has any, `accuracy`, of each
    tier too, after a thought within the step's budget, and `plain_accuracy` of the likeliest token
    without thought; or `information_gain`, and `shuffled_gain` of thoughts about other places,
    which shows whether it is what they say that helps; `thought_length`.
    """
    # One thought a place is less than a step collects: micro-batches are parts enough.
    cfg = dataclasses.replace(setting.cfg, collect_parts=1)
    setting = setting._replace(cfg=cfg)
    plain = next_token.make_loss(setting.model)

    def evaluate(
        params: Any, extra: Any, batch: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        scalar, metrics = plain(params, (), batch, step=step, key=key)
        key = jax.random.fold_in(key, batch.inputs.sum())  # each batch has the key of all others
        last = jnp.minimum(step, setting.num_steps - 1)
        budget = budget_at(cfg, last, setting.num_steps)
        thoughts = think(
            setting, params, batch, tiers_of(setting, extra, batch), jnp.asarray(EVENLY), budget,
            num_rollouts=1, key=key,
        )  # fmt: skip
        _, scores = score(setting, params, params, thoughts, budget)
        valid, tiers = thoughts.valid.reshape(-1), thoughts.tiers.reshape(-1)
        kept = ("thought_length", "accuracy", "log_prob", "plain_log_prob")
        metrics = dict(metrics) | {name: scores[name] for name in kept if name in scores}
        if cfg.reward == "information_gain":
            moved = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), thoughts.responses)
            _, others = score(setting, params, params, thoughts._replace(responses=moved), budget)
            for name, found in (("information_gain", scores), ("shuffled_gain", others)):
                total, count = found["log_prob"]
                metrics[name] = (total - found["plain_log_prob"][0], count)
            return scalar, metrics
        match = matches(setting, thoughts.asked, thoughts.responses)[:, 0]
        for i, name in enumerate(curriculum.TIERS if cfg.has_tiers else ()):
            metrics[f"accuracy_{name}"] = average(match, valid & (tiers == i))
        metrics["plain_accuracy"] = average(_guesses_right(setting, params, thoughts), valid)
        return scalar, metrics

    return evaluate


def _guesses_right(setting: Setting, params: Any, thoughts: Thoughts) -> jax.Array:
    """Whether the likeliest next token without thought is the text's, bool `[N]`."""
    asked = thoughts.asked
    logits = rollouts.prefix_logits(setting.apply, params, asked.prefixes, asked.lengths)
    return jnp.argmax(logits, axis=-1) == asked.truths[:, 0]


def make_monitor(guard: float) -> Callable[[Mapping[str, float]], dict[str, str | None]]:
    """The `Method.monitor`.

    `train/reward_collapsed`: RLP's failure at too large a rate. `train/tier_empty`: some step was
    to draw from a tier that had no token in its batch.
    """

    def monitor(metrics: Mapping[str, float]) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        fall = metrics.get("train/reward_fall")
        if fall is not None:
            collapsed = (
                f"the reward has collapsed: its running mean is {fall:.3g} below its best, more "
                f"than {guard:g}; begin anew with a lower optimizer.learning_rate or a higher "
                "reinforcement_midtraining.ntp_weight"
            )
            found["train/reward_collapsed"] = collapsed if fall > guard else None
        names = {f"train/empty_{name}": name for name in curriculum.TIERS}
        shares = {name: metrics[key] for key, name in names.items() if key in metrics}
        if shares:
            name = max(shares, key=lambda name: shares[name])
            empty = (
                f"the tier {name} has no token in {shares[name]:.0%} of the batches since the last "
                "line: what was to be drawn from it comes from the other tiers, or is left out "
                "with positions=hard; lower reinforcement_midtraining.thresholds, leave them out "
                "for quantiles, or raise data.batch_size"
            )
            found["train/tier_empty"] = empty if shares[name] > 0 else None
        return found

    return monitor


def make_setting(cfg: ReinforcementMidtrainingConfig, context: Context) -> Setting:
    """What is fixed for a run. Raises ValueError where its context is too short."""
    model = context.model
    if model.recurrence:
        raise ValueError(
            "reinforcement_midtraining needs a plain transformer, and "
            f"model.recurrence={model.recurrence} is recurrent in depth; leave it out"
        )
    prefix_length = _prefix_length(cfg, context)
    tokenizer = context.tokens
    if tokenizer is None or "</think>" not in tokenizer.special:
        raise ValueError(
            "reinforcement_midtraining needs a tokenizer with a token </think>, and "
            "data.tokenizer has none; give one that has, or bytes"
        )
    special = tokenizer.special
    made = make_frame(
        tokenizer.encode,
        special,
        most=cfg.budget,
        before=cfg.prompt_before or "",
        after=cfg.prompt_after,
    )
    # A single token needs no end.
    end = -1 if cfg.max_answer == 1 else special.get("<end>", tokenizer.separator)
    tokens = Tokens(close=special["</think>"], end=end, pad=0)
    spelling = None
    if cfg.reward in ("prefix_match", "same_text", "boxed"):
        spelling = tokenizer.spelling()
        spelling = spelling if cfg.reward == "prefix_match" else rewards.without_form(*spelling)
    needed = prefix_length + made.length + cfg.response_slots
    if needed > model.max_length:
        raise ValueError(
            f"a prefix of {prefix_length} tokens, {made.length} of the prompt and a response of "
            f"{cfg.response_slots} do not fit model.max_length={model.max_length}; lower "
            "reinforcement_midtraining.prompt_length or max_thought, or raise model.max_length to "
            f"{needed}"
        )
    return Setting(cfg, model, context.num_steps, prefix_length, tokens, made, spelling)


def make(cfg: ReinforcementMidtrainingConfig, context: Context) -> Method:
    """RMT as a `Method`; `rl_weight=0` is next-token prediction on the same data."""
    dataset = _dataset(cfg, context)
    setting = make_setting(cfg, context)
    plain = next_token.make(next_token.NextTokenConfig(), context)
    method = dataclasses.replace(
        plain,
        init=_initial_model(setting, context),
        evaluate=make_evaluate(setting),
        dataset=dataset,
    )
    if cfg.rl_weight == 0:
        return method
    length, prompt_length = _row_length(cfg, context), setting.prompt_length
    method = dataclasses.replace(
        method,
        loss=make_loss(setting),
        flops_per_token=train_flops(context.model, length, cfg, prompt_length=prompt_length),
        monitor=make_monitor(cfg.guard),
    )
    if cfg.policy == "taught":
        return dataclasses.replace(method, collect=make_teach(setting))
    return dataclasses.replace(
        method,
        init_state=functools.partial(init_state, cfg, context.model),
        collect=make_collect(setting),
        rows_multiple=cfg.collect_parts // math.gcd(cfg.collect_parts, cfg.positions_per_row),
    )


def _dataset(cfg: ReinforcementMidtrainingConfig, context: Context) -> Any:
    """Split -> examples, where they are not the run's plain text."""
    of_task = {
        "bits": "parity",
        "questions": "questions",
        "validation_questions": "questions",
        "entropy": "text",
    }
    for name, task in of_task.items():
        value = getattr(cfg, name)
        if value is not None and cfg.task != task:
            raise ValueError(
                f"reinforcement_midtraining.{name}={value} has no meaning with task={cfg.task}; "
                f"leave it out, or give task={task}"
            )
    if cfg.task == "parity":
        questions = {"bits": cfg.question_bits, "seed": cfg.data_seed}
        return functools.partial(parity.ParityDataset, **questions)
    if cfg.task == "questions":
        return _open_questions(cfg, context)
    if cfg.entropy is None:
        return None
    if cfg.positions == "uniform":
        raise ValueError(
            f"reinforcement_midtraining.entropy={cfg.entropy} has no meaning with "
            "positions=uniform; leave one of them out"
        )
    assert context.open_tiers is not None
    return context.open_tiers(cfg.entropy, functools.partial(_cut, cfg))


def _open_questions(
    cfg: ReinforcementMidtrainingConfig, context: Context
) -> Callable[[Split], WrittenQuestions]:
    """Reads and checks both splits at once, before a device is touched."""
    assert cfg.questions is not None
    assert context.tokens is not None
    found = written_questions.read(cfg.questions)
    if cfg.validation_questions is None:
        parts = written_questions.divide(found, cfg.questions)
    else:
        parts = {"train": found, "validation": written_questions.read(cfg.validation_questions)}
    shape: Any = {
        "sequence_length": context.sequence_length,
        "max_question": _prefix_length(cfg, context),
        "max_answer": cfg.max_answer,
        "vocab_size": context.model.vocab_size,
        "seed": cfg.data_seed,
    }
    encode = context.tokens.encode
    datasets = {split: WrittenQuestions(split, parts[split], encode, **shape) for split in SPLITS}
    return datasets.__getitem__


def _cut(cfg: ReinforcementMidtrainingConfig, entropy: np.ndarray) -> tuple[float, ...]:
    """The thresholds of the tiers, none of which may be empty where it is drawn from."""
    cuts = cfg.thresholds or curriculum.quantile_thresholds(entropy, cfg.quantiles)
    counts = np.bincount(curriculum.assign_tiers(entropy, cuts) + 1, minlength=4)[1:]
    wanted = np.array(cfg.first_tiers) + np.array(cfg.last_tiers)
    wanted = wanted if cfg.positions == "curriculum" else np.array([0, 0, 1])
    for name, count, share in zip(curriculum.TIERS, counts, wanted, strict=True):
        if share and not count:
            raise ValueError(
                f"the tier {name} is empty: no entropy of this text falls to it by the thresholds "
                f"{tuple(round(float(cut), 3) for cut in cuts)}; lower "
                "reinforcement_midtraining.thresholds, or leave them out for quantiles"
            )
    return cuts


def _row_length(cfg: ReinforcementMidtrainingConfig, context: Context) -> int:
    return cfg.question_bits + 1 if cfg.task == "parity" else context.sequence_length


def _prefix_length(cfg: ReinforcementMidtrainingConfig, context: Context) -> int:
    """Tokens of the longest prefix; behind a question its row has room for the answer."""
    length = _row_length(cfg, context)
    if cfg.task == "questions":
        length += 1 - cfg.max_answer
    return min(cfg.prompt_length or length, length)


def _initial_model(setting: Setting, context: Context) -> Callable[[jax.Array], Any]:
    """Loads the frozen model that the run begins with, where something is measured by it."""
    cfg = setting.cfg
    by_entropy = cfg.task == "text" and cfg.has_tiers and cfg.entropy is None
    if not by_entropy and not cfg.kl_weight:
        return lambda key: ()
    source = context.init_from
    if source is None:
        raise ValueError(
            "reinforcement_midtraining measures entropy and divergence by the model that the run "
            "begins with; give --checkpoint.init_from, or positions=uniform and kl_weight=0"
        )

    def init(key: jax.Array) -> Any:
        del key
        found = context.load_pretrained(source, dtype=setting.model.compute_dtype)
        return {"initial": found.params}

    return init
