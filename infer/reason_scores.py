"""What a thought gives: against none, and against the thought of another prompt."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import curriculum, rollouts
from jaxlib_methods import reinforcement_midtraining as rmt
from jaxlib_methods.infer import reasoning
from jaxlib_methods.infer.reasoning import Reasoner
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.losses import token_nll
from jaxlib_methods.models.decoding import Stream, stream_key
from jaxlib_methods.reinforcement_collect import EVENLY, think, tiers_of
from jaxlib_methods.train.config import DataConfig


class Row(NamedTuple):
    """What thoughts give at the places of a tier, or at all of them; means over places.

    Without a thought, after one, and after that of another prompt: accuracy, of the likeliest next
    token, and log_prob, nats, of the true one. thought_length: tokens. closed: share of the
    thoughts that the model ended before the budget was spent. answers: share of the drawn answers
    that are right by the run's rule.
    """

    tier: str
    places: int
    plain_accuracy: float
    accuracy: float
    shuffled_accuracy: float
    plain_log_prob: float
    log_prob: float
    shuffled_log_prob: float
    thought_length: float
    closed: float
    answers: float


class Measured(NamedTuple):
    """Budget -> rows, easy tier first and all places last. tiers_by: whose entropy makes them."""

    budgets: dict[int, list[Row]]
    tiers_by: str | None


@functools.partial(jax.jit, static_argnums=0)
def _measure(
    reasoner: Reasoner, params: Any, extra: Any, batch: Any, budget: jax.Array, key: jax.Array
) -> dict[str, jax.Array]:
    """Sums over places by tier, `[3]` each; `pairs` are the places of the shuffled ones."""
    setting = reasoner.setting
    thoughts = think(
        setting, params, batch, tiers_of(setting, extra, batch), jnp.asarray(EVENLY), budget,
        num_rollouts=1, temperature=reasoner.temperature, thought_limit=budget, key=key,
    )  # fmt: skip
    asked, responses, valid = thoughts.asked, thoughts.responses, thoughts.valid.reshape(-1)
    rows, per_row = thoughts.valid.shape
    of_another = functools.partial(jnp.roll, shift=per_row, axis=0)  # row: another prompt
    paired = valid & of_another(valid) & (rows > 1)

    def judge(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        target = asked.truths[:, 0]
        return jnp.argmax(logits, axis=-1) == target, -token_nll(logits, target)

    def judge_after(responses: rollouts.Rollouts) -> tuple[jax.Array, jax.Array]:
        logits = rollouts.thought_logits(
            setting.apply, params, thoughts.prompts, thoughts.lengths, responses,
            tokens=setting.tokens,
        )  # fmt: skip
        return judge(logits[:, 0])

    plain = judge(rollouts.prefix_logits(setting.apply, params, asked.prefixes, asked.lengths))
    own, other = judge_after(responses), judge_after(jax.tree.map(of_another, responses))
    one = jnp.ones(valid.shape)
    values = {
        "places": one,
        "plain_accuracy": plain[0],
        "plain_log_prob": plain[1],
        "accuracy": own[0],
        "log_prob": own[1],
        "thought_length": responses.thought_lengths[:, 0],
        "closed": responses.closed[:, 0],
        "answers": rmt.matches(setting, asked, responses)[:, 0],
    }
    pairs = {"pairs": one, "shuffled_accuracy": other[0], "shuffled_log_prob": other[1]}
    of_tier = thoughts.tiers.reshape(-1)[:, None] == jnp.arange(len(curriculum.TIERS))[None]

    def total(value: jax.Array, where: jax.Array) -> jax.Array:
        chosen = of_tier & where[:, None]
        return jnp.where(chosen, value[:, None].astype(jnp.float32), 0).sum(axis=0)

    sums = {name: total(value, valid) for name, value in values.items()}
    return sums | {name: total(value, paired) for name, value in pairs.items()}


def measure(
    restored: Restored,
    reasoner: Reasoner,
    data: DataConfig,
    budgets: Sequence[int],
    *,
    max_batches: int | None,
    seed: int = 0,
) -> Measured:
    """What a thought of each budget gives, at the same places of the validation set.

    max_batches: this many, evenly spread over it; none takes all of it. Budgets are data: all of
    them run one program. The draws of two budgets have the same keys.
    """
    totals: dict[int, Any] = dict.fromkeys(budgets)
    key = stream_key(seed, Stream.TOKENS)
    params = restored.params
    extra, tiers_by = reasoning.first_model(restored, reasoner)
    with jax.set_mesh(restored.mesh):
        for number, batch in enumerate(reasoning.batches(restored, reasoner, data, max_batches)):
            batch_key = jax.random.fold_in(key, number)
            found = {
                budget: _measure(reasoner, params, extra, batch, jnp.int32(budget), batch_key)
                for budget in budgets
            }
            for budget, sums in jax.device_get(found).items():
                sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
                last = totals[budget]
                totals[budget] = sums if last is None else jax.tree.map(np.add, last, sums)
    tiers = curriculum.TIERS if reasoner.is_text else ()
    return Measured({b: _rows(sums, tiers) for b, sums in totals.items()}, tiers_by)


def _rows(sums: dict[str, np.ndarray], tiers: Sequence[str]) -> list[Row]:
    groups = {name: slice(i, i + 1) for i, name in enumerate(tiers)} | {"all": slice(None)}
    rows = []
    for tier, group in groups.items():
        total = {name: float(values[group].sum()) for name, values in sums.items()}
        places, pairs = int(total.pop("places")), total.pop("pairs")
        means = {
            name: value / count if (count := pairs if "shuffled" in name else places) else math.nan
            for name, value in total.items()
        }
        rows.append(Row(tier=tier, places=places, **means))
    return rows
