"""A step of reinforcement mid-training: what it collects, its gradient, RLP, validation."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import flops, next_token, registry, reinforcement_flops, reinforcement_state
from jaxlib_methods import reinforcement_midtraining as rmt
from jaxlib_methods.method import Batch, Context, Method, Pretrained, TieredBatch
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import forward, init_params
from jaxlib_methods.reinforcement_collect import Collected
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.tasks.questions import SPLITS
from jaxlib_methods.thought_prompts import Asked
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train.step import make_train_step
from jaxlib_methods.train.tokenizer import ByteTokenizer

D, L, G, T = 4, 12, 3, 5
MODEL = TransformerConfig(
    vocab_size=256, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, max_length=64,
    compute_dtype="float32",
)  # fmt: skip
TEXT = ReinforcementMidtrainingConfig(
    rollouts=G, max_thought=T, budget=4, positions_per_row=2, force_close=True, temperature=0.7,
    quantiles=(0.1, 0.4, 0.7),
)  # fmt: skip
RLP = dataclasses.replace(
    TEXT, reward="information_gain", advantage="leave_one_out", positions="uniform",
    length_weight=0.0, ntp_weight=0.0, prompt_after="<think>", ema_decay=0.75,
)  # fmt: skip
PARAMS = partitioning.unbox(init_params(MODEL, jax.random.key(0)))
KEY = jax.random.key(1)


def context(**fields: Any) -> Context:
    def load_pretrained(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        assert source == "start"
        return Pretrained(MODEL, PARAMS if weights else None, "bytes")

    given: dict[str, Any] = {
        "model": MODEL, "num_steps": 10, "sequence_length": L, "batch_size": D,
        "tokenizer": "bytes", "load_pretrained": load_pretrained, "tokens": ByteTokenizer(),
        "init_from": "start",
    }  # fmt: skip
    return Context(**given | fields)


def text_batch(lengths: tuple[int, ...] = (L, L, L, 7)) -> Batch:
    ids = np.random.default_rng(0).integers(97, 123, (len(lengths), L + 1), dtype=np.int32)
    where = np.arange(L) < np.array(lengths)[:, None]
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), where.shape)
    fields = (ids[:, :-1], ids[:, 1:], positions, where.astype(np.int32), where)
    return Batch(*map(jnp.asarray, fields))


class Program(NamedTuple):
    """A method and its two halves of a step, compiled once."""

    method: Method
    extra: Any
    state: Any
    collect: Any
    gradient: Any


@functools.cache
def program(cfg: ReinforcementMidtrainingConfig, **model: Any) -> Program:
    method = rmt.make(cfg, context(model=dataclasses.replace(MODEL, **model)))
    extra = method.init(KEY)
    state: Any = {}
    if method.init_state is not None:
        state = partitioning.unbox(method.init_state(KEY))

    @jax.jit
    def collect(params: Any, batch: Any, state: Any, step: Any, key: Any) -> Any:
        assert method.collect is not None
        return method.collect(params, extra, batch, state, step=step, key=key)

    @jax.jit
    def gradient(params: Any, collected: Any) -> Any:
        loss = functools.partial(method.loss, step=jnp.int32(0), key=KEY)
        return jax.grad(lambda params: loss(params, extra, collected), has_aux=True)(params)

    return Program(method, extra, state, collect, gradient)


def collected(cfg: ReinforcementMidtrainingConfig, step: int = 0, **given: Any) -> Any:
    run = program(cfg)
    arguments = {"batch": text_batch(), "state": run.state, "key": KEY, "params": PARAMS} | given
    return run.collect(
        arguments["params"], arguments["batch"], arguments["state"], jnp.int32(step),
        arguments["key"],
    )  # fmt: skip


def mean(pair: Any) -> float:
    return float(pair[0] / pair[1])


def largest(tree: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def differences(one: Any, other: Any) -> float:
    return largest(jax.tree.map(jnp.subtract, one, other))


def test_chosen_targets_are_no_next_tokens():
    found, _, metrics = collected(TEXT)
    batch = text_batch()
    left_out = np.asarray(batch.where & ~found.text.where)
    np.testing.assert_array_equal(left_out.sum(axis=1), [2, 2, 2, 2])
    np.testing.assert_array_equal(found.text.inputs, batch.inputs)
    np.testing.assert_array_equal(found.share, np.full(D, (batch.where.sum() - 8) / 8))
    # A prompt is the text up to a chosen place, the budget and what begins a thought.
    ends = [found.prompts[row, k, -4] for row in range(D) for k in range(2)]
    chosen = np.asarray(batch.inputs)[left_out]
    assert sorted(map(int, ends)) == sorted(chosen.tolist())
    np.testing.assert_array_equal(found.prompts[..., -3:], np.broadcast_to([1, ord("4"), 2],
                                                                         (D, 2, 3)))  # fmt: skip
    shares = [metrics[f"share_{name}"] for name in ("easy", "medium", "hard")]
    assert sum(mean(share) for share in shares) == pytest.approx(1)
    assert mean(metrics["budget"]) == 4


def test_a_row_without_tokens_teaches_nothing():
    batch = text_batch((L, L, L, 0))
    found, _, metrics = collected(TEXT, batch=batch)
    assert float(metrics["reward"][1]) == 6 * G
    np.testing.assert_array_equal(found.advantages[3], np.zeros((2, G)))
    np.testing.assert_array_equal(found.share, np.full(D, (batch.where.sum() - 6) / 6))
    found, _, _ = collected(RLP, batch=batch)  # whose thoughts all differ in worth
    assert float(jnp.abs(found.advantages[:3]).min()) > 0
    np.testing.assert_array_equal(found.advantages[3], np.zeros((2, G)))


def test_the_hard_positions_are_those_of_the_largest_entropy():
    hard = dataclasses.replace(TEXT, positions="hard", quantiles=(0.2, 0.4, 0.6))
    batch = text_batch()
    setting = rmt.make_setting(hard, context())
    with jax.numpy_rank_promotion("raise"):
        tiers = rmt.tiers_of(setting, {"initial": PARAMS}, batch)
    logits = np.asarray(setting.apply(PARAMS, batch.inputs, positions=batch.positions,
                                      segments=batch.segments).logits)  # fmt: skip
    log_probs = jax.nn.log_softmax(logits)
    entropy = np.asarray(-(np.exp(log_probs) * log_probs).sum(axis=-1))[np.asarray(batch.where)]
    cuts = np.quantile(entropy, hard.quantiles)
    found = np.asarray(tiers)[np.asarray(batch.where)]
    np.testing.assert_array_equal(found, np.searchsorted(cuts, entropy, side="right") - 1)
    assert (np.asarray(tiers)[~np.asarray(batch.where)] == -1).all()
    out, _, metrics = collected(hard)
    assert (np.asarray(tiers)[np.asarray(batch.where & ~out.text.where)] == 2).all()
    assert mean(metrics["share_hard"]) == 1
    by_nats = dataclasses.replace(hard, thresholds=tuple(float(cut) for cut in cuts))
    again = rmt.tiers_of(rmt.make_setting(by_nats, context()), {"initial": PARAMS}, batch)
    np.testing.assert_array_equal(tiers, again)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [("match", [1, 1, 0, 0]), ("exact", [1, 0, 0, 0]), ("prefix_match", [1, 1, 0, 0])],
)
def test_which_answers_are_right(reward: Any, expected: list[int]):
    """The text goes on with "ab"; answers are "ab", "a", "ba" and none."""
    cfg = dataclasses.replace(TEXT, reward=reward, max_answer=2)
    setting = rmt.make_setting(cfg, context())
    answers = jnp.array([[[97, 98], [97, 0], [98, 97], [0, 0]]])
    lengths = jnp.array([[2, 1, 2, 0]])
    unused = jnp.zeros((1, 4, 1))
    responses = rmt.rollouts.Rollouts(
        *[unused] * 6, answers=answers, answer_lengths=lengths
    )  # fmt: skip
    asked = Asked(unused, unused, jnp.array([[97, 98]]), jnp.array([2]))
    assert rmt.matches(setting, asked, responses)[0].tolist() == expected


@pytest.mark.parametrize(
    ("reward", "answers", "expected"),
    [
        ("same_text", [b"Ab", b"a  b", b" A\nb ", b"abc", b"a", b""], [1, 1, 1, 0, 0, 0]),
        ("boxed", [rb"\boxed{ A b}", rb"\boxed{a}", b"ab"], [1, 0, 0]),
    ],
)
def test_a_verifier_compares_texts_without_their_form(
    reward: Any, answers: list[bytes], expected: list[int]
):
    cfg = dataclasses.replace(TEXT, reward=reward, max_answer=12)
    setting = rmt.make_setting(cfg, context())
    ids = jnp.array([list(answer.ljust(12, b"\0")) for answer in answers])[None]
    lengths = jnp.array([[len(answer) for answer in answers]])
    unused = jnp.zeros((1, len(answers), 1))
    responses = rmt.rollouts.Rollouts(*[unused] * 6, answers=ids, answer_lengths=lengths)
    truth = jnp.array([list(b"a B".ljust(12, b"\0"))])
    asked = Asked(unused, unused, truth, jnp.array([3]))
    assert rmt.matches(setting, asked, responses)[0].tolist() == expected


def test_training_sees_the_log_probabilities_of_the_rollout():
    found, _, _ = collected(TEXT)
    _, metrics = program(TEXT).gradient(PARAMS, found)
    assert mean(metrics["mismatch"]) < 1e-6
    assert mean(metrics["clip_fraction"]) == 0
    _, metrics = program(TEXT, loss_implementation="xla").gradient(PARAMS, found)
    assert mean(metrics["mismatch"]) < 1e-5
    assert mean(metrics["clip_fraction"]) == 0
    other = jax.tree.map(lambda leaf: 1.5 * leaf, PARAMS)
    _, metrics = program(TEXT).gradient(other, found)
    assert mean(metrics["mismatch"]) > 0.01
    assert mean(metrics["clip_fraction"]) > 0


def test_a_rollout_of_another_precision_is_seen():
    found, _, _ = collected(TEXT)
    _, metrics = program(TEXT, compute_dtype="bfloat16").gradient(PARAMS, found)
    assert 1e-5 < mean(metrics["mismatch"]) < 0.05
    assert mean(metrics["clip_fraction"]) == 0


def with_advantages(found: Collected, values: Any) -> Collected:
    return found._replace(advantages=jnp.broadcast_to(values, found.advantages.shape))


def test_equal_rewards_leave_next_tokens_alone():
    found, _, _ = collected(TEXT)
    run = program(TEXT)
    none, _ = run.gradient(PARAMS, with_advantages(found, jnp.zeros((1, 1, 1))))
    loss = next_token.make_loss(MODEL)
    plain = jax.grad(lambda params: loss(params, (), found.text, step=jnp.int32(0), key=KEY)[0])(
        PARAMS
    )
    assert differences(none, jax.tree.map(lambda g: TEXT.ntp_weight * g, plain)) < 1e-6
    # And without next tokens there is nothing but the policy's gradient.
    alone = dataclasses.replace(TEXT, ntp_weight=0.0)
    both, _ = run.gradient(PARAMS, found)
    policy, metrics = program(alone).gradient(PARAMS, found)
    assert differences(both, jax.tree.map(jnp.add, none, policy)) < 1e-6
    assert largest(policy) > 1e-3
    assert float(metrics["loss"][1]) == found.text.where.sum()


def test_the_policy_gradient_is_advantages_times_scores():
    """-(1/prompts) sum_n mean_g A_ng mean_t grad log pi, by a sum over single responses."""
    alone = dataclasses.replace(TEXT, ntp_weight=0.0)
    found, _, _ = collected(alone)
    total, _ = program(alone).gradient(PARAMS, found)
    unit = jnp.eye(2 * G).reshape(2 * G, 1, 2, G)  # one response of each row
    parts = [
        program(alone).gradient(PARAMS, with_advantages(found, one * found.advantages))[0]
        for one in unit
    ]
    assert differences(total, jax.tree.map(lambda *leaves: sum(leaves), *parts)) < 1e-6
    responses = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found.responses)
    prompts, lengths = found.prompts.reshape(2 * D, -1), found.lengths.reshape(-1)

    def surrogate(params: Any) -> jax.Array:
        log_probs = rmt.rollouts.response_log_probs(
            functools.partial(forward, MODEL), params, prompts, lengths, responses,
            temperature=alone.temperature,
        )  # fmt: skip
        means = log_probs.sum(axis=-1) / responses.where.sum(axis=-1)
        return -(found.advantages.reshape(2 * D, G) * means).mean()

    assert differences(total, jax.grad(surrogate)(PARAMS)) < 1e-6


def test_microbatches_of_unequal_padding_are_one_batch():
    found, _, _ = collected(TEXT, batch=text_batch((L, 3, L, 0)))
    whole, metrics = program(TEXT).gradient(PARAMS, found)
    halves = partitioning.split_rows(found, 2)
    parts = [
        program(TEXT).gradient(PARAMS, jax.tree.map(lambda x, i=i: x[i], halves)) for i in range(2)
    ]
    counts = [float(part[1]["loss"][1]) for part in parts]
    assert sum(counts) == float(metrics["loss"][1])
    weighted = [
        jax.tree.map(lambda g, c=count: g * c / sum(counts), part[0])
        for part, count in zip(parts, counts, strict=True)
    ]
    assert differences(whole, jax.tree.map(jnp.add, *weighted)) < 1e-6


def test_a_step_that_is_done_again_draws_the_same():
    one, _, _ = collected(TEXT, 3)
    again, _, _ = collected(TEXT, 3)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    other, _, _ = collected(TEXT, 3, key=jax.random.key(2))
    assert (np.asarray(one.responses.tokens) != np.asarray(other.responses.tokens)).any()


def test_the_baseline_follows_the_model():
    """phi_0 = theta_0, phi_n = tau phi_(n - 1) + (1 - tau) theta_n."""
    run = program(RLP)
    assert largest(run.state["average"]) == 0
    _, first, metrics = collected(RLP)
    assert differences(first["average"], PARAMS) == 0
    moved = jax.tree.map(lambda leaf: leaf + 1.0, PARAMS)
    _, second, _ = collected(RLP, 1, state=first, params=moved)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, PARAMS, moved)
    assert differences(second["average"], expected) < 1e-6
    gain = mean(metrics["log_prob"]) - mean(metrics["plain_log_prob"])
    assert mean(metrics["reward"]) == pytest.approx(gain, abs=1e-5)


def test_the_baseline_moves_where_parameters_are_short():
    """In bfloat16 a decay of 0.999 is 1."""
    cfg = dataclasses.replace(RLP, ema_decay=0.999)
    theta = {"kernel": jnp.full(3, 2.0, jnp.bfloat16)}
    short = dataclasses.replace(MODEL, param_dtype="bfloat16")
    average = reinforcement_state.init_state(cfg, short, KEY)["average"]
    assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {jnp.dtype(jnp.float32)}
    state = {"average": {"kernel": jnp.ones(3)}}
    state = reinforcement_state.move(cfg, state, theta, jnp.int32(1))
    np.testing.assert_allclose(state["average"]["kernel"], 1.001, rtol=1e-6)


def test_the_baseline_is_not_trained():
    """phi has no state of the optimiser, and no gradient, even where it makes the advantages."""
    cfg = dataclasses.replace(RLP, advantage="absolute")
    run, optimizer = program(cfg), optax.adam(0.1)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    abstract = train_state.abstract_state(run.method, optimizer, mesh)
    number = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract.method_state["average"])) == number
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract.opt_state)) == 2 * number + 1

    def total(average: Any) -> Any:
        collect: Any = run.method.collect
        found, _, metrics = collect(
            PARAMS, run.extra, text_batch(), run.state | {"average": average},
            step=jnp.int32(1), key=KEY,
        )  # fmt: skip
        scalar, _ = run.method.loss(PARAMS, run.extra, found, step=jnp.int32(1), key=KEY)
        return scalar + metrics["reward"][0], metrics["reward"]

    of_average = jax.jit(jax.grad(total, has_aux=True))
    (gradient, one), (_, other) = map(
        of_average, (PARAMS, jax.tree.map(lambda leaf: 1.5 * leaf, PARAMS))
    )
    assert largest(gradient) == 0
    assert abs(mean(one) - mean(other)) > 1e-3  # and yet it is read


def test_the_baseline_cancels_within_a_group():
    run = program(RLP)
    found, state, metrics = collected(RLP)
    other = jax.tree.map(lambda leaf: 2 * leaf, state)
    elsewhere, _, changed = run.collect(PARAMS, text_batch(), other, jnp.int32(1), KEY)
    assert abs(mean(metrics["reward"]) - mean(changed["reward"])) > 1e-3
    np.testing.assert_allclose(found.advantages, elsewhere.advantages, atol=1e-5)
    np.testing.assert_allclose(found.advantages.sum(axis=-1), np.zeros((D, 2)), atol=1e-5)
    absolute = dataclasses.replace(RLP, advantage="absolute")
    found, _, metrics = collected(absolute)
    assert mean(metrics["reward"]) == pytest.approx(float(found.advantages.mean()), abs=1e-6)


def test_a_thought_that_is_no_token_of_the_policy_has_no_gradient():
    found, _, _ = collected(RLP)
    nothing = found._replace(
        responses=found.responses._replace(where=jnp.zeros_like(found.responses.where))
    )
    gradient, _ = program(RLP).gradient(PARAMS, nothing)
    assert largest(gradient) == 0


def test_the_guard_measures_the_fall_from_the_best():
    run = program(RLP)
    state = run.state | {"reward": jnp.float32(1.0), "best": jnp.float32(2.0)}
    _, after, metrics = run.collect(PARAMS, text_batch(), state, jnp.int32(1), KEY)
    running = 0.9 * 1.0 + 0.1 * mean(metrics["reward"])
    assert float(after["reward"]) == pytest.approx(running, abs=1e-5)
    assert mean(metrics["reward_fall"]) == pytest.approx(2.0 - running, abs=1e-5)
    monitor = rmt.make_monitor(0.5)
    assert monitor({"train/reward_fall": 0.4}) == {"train/reward_collapsed": None}
    found = monitor({"train/reward_fall": 0.6})["train/reward_collapsed"]
    assert found is not None
    assert "0.6 below its best, more than 0.5" in found
    assert monitor({"validation/loss": 1.0}) == {}


def test_a_tier_without_a_token_is_said():
    hard = dataclasses.replace(TEXT, positions="hard", thresholds=(0.0, 50.0, 60.0))
    state = program(hard).state | {"reward": jnp.float32(1.0), "best": jnp.float32(1.0)}
    found, after, metrics = collected(hard, 1, state=state)
    empty = {name: mean(metrics[f"empty_{name}"]) for name in ("easy", "medium", "hard")}
    assert empty == {"easy": 0, "medium": 0, "hard": 1}  # medium has none, and is not drawn from
    assert float(metrics["reward"][1]) == largest(found.advantages) == 0
    assert float(after["reward"]) == 1  # nothing was rewarded, which is not a reward of 0
    drawn = dataclasses.replace(hard, positions="curriculum")
    for cfg in (drawn, dataclasses.replace(drawn, policy="taught")):
        _, _, metrics = collected(cfg, 1)
        assert [mean(metrics[f"empty_{name}"]) for name in empty] == [0, 1, 1]
        assert program(cfg).method.monitor is not None
    assert not [name for name in collected(RLP)[2] if name.startswith("empty")]
    monitor = rmt.make_monitor(0.5)
    names = [f"train/empty_{name}" for name in empty]
    assert monitor(dict.fromkeys(names, 0.0)) == {"train/tier_empty": None}
    said = monitor(dict(zip(names, (0.0, 0.25, 0.0), strict=True)))["train/tier_empty"]
    assert said is not None
    assert said.startswith("the tier medium has no token in 25% of the batches")


def test_the_divergence_is_from_the_initial_model():
    cfg = dataclasses.replace(TEXT, kl_weight=0.5, ntp_weight=0.0)
    found, _, _ = collected(cfg)
    still = with_advantages(found, jnp.zeros((1, 1, 1)))
    gradient, metrics = program(cfg).gradient(PARAMS, still)
    assert mean(metrics["kl"]) == pytest.approx(0, abs=1e-6)
    assert largest(gradient) < 1e-4
    moved = jax.tree.map(lambda leaf: 1.3 * leaf, PARAMS)
    gradient, metrics = program(cfg).gradient(moved, still)
    assert mean(metrics["kl"]) > 1e-3
    assert largest(gradient) > 1e-3
    # Where no place was found there is nothing to stay near to.
    nothing, _, _ = collected(cfg, batch=text_batch((0, 0, 0, 0)))
    gradient, metrics = program(cfg).gradient(moved, nothing)
    assert largest(gradient) == float(metrics["kl"][1]) == 0


def test_a_taught_thought_is_learned_by_its_likelihood():
    cfg = dataclasses.replace(TEXT, policy="taught", ntp_weight=0.0)
    found, _, metrics = collected(cfg)
    assert "reward" not in metrics
    # The truths behind the prompts; as next tokens they count all the same.
    batch = text_batch()
    np.testing.assert_array_equal(found.text.where, batch.where)
    np.testing.assert_allclose(found.share, np.full(D, batch.where.sum() / 8))
    answers = np.asarray(found.responses.answers)[:, :, 0, 0]
    for row, (prompts, lengths) in enumerate(zip(found.prompts, found.lengths, strict=True)):
        for k, length in enumerate(np.asarray(lengths)):
            assert answers[row, k] == batch.targets[row, length - 4]
            assert prompts[k, -4] == batch.inputs[row, length - 4]
    run, params = program(cfg), PARAMS
    losses = []
    for _ in range(3):
        gradient, metrics = run.gradient(params, found)
        losses.append(mean(metrics["policy_loss"]))
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize("cfg", [TEXT, RLP])
def test_validation(cfg: ReinforcementMidtrainingConfig, monkeypatch: pytest.MonkeyPatch):
    run = program(cfg)
    assert run.method.evaluate is not None
    evaluate = functools.partial(run.method.evaluate, step=jnp.int32(10), key=KEY)
    batch = text_batch()
    scored: list[Any] = []
    score = rmt.score

    def watched(setting: Any, params: Any, baseline: Any, thoughts: Any, budget: Any) -> Any:
        scored.append(thoughts)
        return score(setting, params, baseline, thoughts, budget)

    monkeypatch.setattr(rmt, "score", watched)
    both = jax.jit(lambda params: (evaluate(params, run.extra, batch)[1], tuple(scored)))
    found, (thoughts, *others) = both(PARAMS)
    loss = next_token.make_loss(MODEL)
    _, plain = loss(PARAMS, (), batch, step=jnp.int32(0), key=KEY)
    np.testing.assert_allclose(found["loss"], plain["loss"], rtol=1e-5)
    if cfg is RLP:
        np.testing.assert_array_equal(others[0].prompts, thoughts.prompts)
        moved = np.asarray(others[0].responses.tokens)
        np.testing.assert_array_equal(moved, np.roll(thoughts.responses.tokens, 1, axis=0))
        assert abs(mean(found["information_gain"])) < 1
        difference = mean(found["information_gain"]) - mean(found["shuffled_gain"])
        assert 0 < abs(difference) < 1
        return
    assert not others
    names = ("accuracy_easy", "accuracy_medium", "accuracy_hard")
    assert sum(float(found[name][1]) for name in names) == float(found["accuracy"][1]) == 8
    assert sum(float(found[name][0]) for name in names) == float(found["accuracy"][0])
    assert 0 <= mean(found["plain_accuracy"]) <= 1


def test_places_drawn_anywhere_are_of_no_tier():
    anywhere = dataclasses.replace(TEXT, positions="uniform")
    method, batch = rmt.make(anywhere, context()), text_batch()
    assert method.evaluate is not None
    evaluate = functools.partial(method.evaluate, step=jnp.int32(0), key=KEY)
    _, found = jax.jit(evaluate)(PARAMS, method.init(KEY), batch)
    assert {name for name in found if "accuracy" in name} == {"accuracy", "plain_accuracy"}
    assert not [name for name in collected(anywhere)[2] if name.startswith(("share_", "empty_"))]


def test_a_whole_step_is_compiled_once():
    method = rmt.make(dataclasses.replace(TEXT, budget_decay=0.3), context())
    optimizer, mesh = optax.sgd(0.1), partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        abstract = train_state.abstract_state(method, optimizer, mesh)
        state = train_state.create_state(method, optimizer, abstract, KEY)
        step = make_train_step(
            method.loss, optimizer, lambda step: 0.0 * step, abstract, collect=method.collect
        )
        budgets = []
        for i in range(4):
            extra = method.init(KEY)
            state, metrics = step(state, extra, text_batch((L, L, L, 12 - i)), KEY)
            budgets.append(mean(metrics["budget"]))
        assert budgets == [4, 3, 3, 2]
        assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def after_a_step(cfg: ReinforcementMidtrainingConfig, form: Any, **axes: int) -> Any:
    """Parameters and metrics of one step on a mesh of these axes; form: of the losses."""
    devices = jax.devices()[: math.prod(axes.values())]
    model = dataclasses.replace(MODEL, loss_implementation=form)
    method = rmt.make(cfg, context(model=model))
    mesh = partitioning.make_mesh(**axes, devices=devices)
    optimizer = optax.sgd(1.0)
    with jax.set_mesh(mesh):
        abstract = train_state.abstract_state(method, optimizer, mesh)
        state = train_state.create_state(method, optimizer, abstract, KEY)
        step = make_train_step(
            method.loss, optimizer, lambda step: 0.0 * step, abstract, collect=method.collect
        )
        rows = jax.sharding.NamedSharding(mesh, partitioning.batch_spec())
        batch = jax.device_put(text_batch(), rows)
        whole = jax.sharding.NamedSharding(mesh, jax.P())
        extra, key = jax.device_put((method.init(KEY), KEY), whole)
        compiled: Any = step.lower(state, extra, batch, key).compile()  # pyright: ignore
        with jax.transfer_guard("disallow"):  # nothing comes from the host
            state, metrics = compiled(state, extra, batch, key)
        # and nothing goes to it.
        assert not re.findall("callback|outfeed|infeed|host", compiled.as_text())
        return jax.device_get((state.params, metrics))


@pytest.mark.parametrize(
    ("cfg", "gathered"), [(dataclasses.replace(TEXT, kl_weight=0.1), True), (RLP, False)]
)
def test_mesh_parts_and_form_of_the_loss_change_nothing(
    cfg: ReinforcementMidtrainingConfig, gathered: bool
):
    in_parts = dataclasses.replace(cfg, collect_parts=2, gather_weights=gathered)
    (params, metrics), (others, same) = (
        after_a_step(cfg, "logits", data=1),
        after_a_step(in_parts, "xla", data=2, fsdp=2, tensor=2),
    )
    assert mean(metrics["gradient_norm"]) > 1e-2
    assert differences(params, others) < 1e-5
    for name in metrics:
        np.testing.assert_allclose(metrics[name], same[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("gathered", [True, False])
def test_weights_are_gathered_before_the_loop_over_tokens(gathered: bool):
    """As bfloat16, by which they are told apart in the program before a compiler moves anything."""
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    cfg = dataclasses.replace(TEXT, gather_weights=gathered)
    run = rmt.make(cfg, context(model=model))
    assert run.collect is not None
    collect = functools.partial(run.collect, step=jnp.int32(0), key=KEY)
    state = rmt.init_state(cfg, model, KEY)
    program = jax.make_jaxpr(collect)(PARAMS, run.init(KEY), text_batch(), state)
    (loop,) = (eqn for eqn in program.eqns if eqn.primitive.name == "while")
    shape = PARAMS["blocks"]["mlp"]["up"]["kernel"].shape
    dtypes = {x.aval.dtype for x in loop.invars if x.aval.shape == shape}
    assert dtypes == {jnp.dtype(jnp.bfloat16 if gathered else jnp.float32)}


def test_flops_are_those_of_the_program():
    """Of what the loss does and what scores it; a loop of rollouts ends when it ends."""
    cfg = dataclasses.replace(TEXT, kl_weight=0.1)
    run = program(cfg)
    found, _, _ = collected(cfg)
    prompt_length = rmt.make_setting(cfg, context()).prompt_length
    parts = reinforcement_flops.parts(MODEL, L, cfg, prompt_length=prompt_length)
    loss = functools.partial(run.method.loss, step=jnp.int32(0), key=KEY)
    counted = flops.count_dot_flops(
        jax.grad(lambda params: loss(params, (), found)[0]), PARAMS
    )  # fmt: skip
    assert counted / D == pytest.approx(parts.policy + parts.text, rel=0.01)


def test_the_loss_without_logits_takes_less_memory():
    """Bytes that the compiler reserves for the gradient of a step's loss."""
    needed, (found, _, _) = {}, collected(TEXT)
    for form in ("logits", "xla"):
        model = dataclasses.replace(MODEL, vocab_size=50304, loss_implementation=form)
        method = rmt.make(TEXT, context(model=model))
        loss = functools.partial(method.loss, step=jnp.int32(0), key=KEY)
        params = jax.eval_shape(lambda: partitioning.unbox(init_params(model, KEY)))  # noqa: B023
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        stats: Any = gradient.lower(params, (), found).compile().memory_analysis()
        needed[form] = stats.temp_size_in_bytes
    logits = 2 * D * G * (TEXT.response_slots + 1) * 50304 * 4
    assert needed["logits"] > logits
    assert needed["xla"] < logits / 2  # most of it gradients of two tables of 50304 rows


def test_parity_is_a_task_of_its_own():
    cfg = ReinforcementMidtrainingConfig(
        task="parity", bits=4, rollouts=2, max_thought=4, budget=4, force_close=True
    )
    method = rmt.make(cfg, context(init_from=None, num_steps=5))
    assert method.dataset is not None
    rows = method.dataset("train").rows(range(6))
    assert isinstance(rows, TieredBatch)
    batch = jax.tree.map(jnp.asarray, rows)
    state = partitioning.unbox(method.init_state(KEY))  # pyright: ignore[reportOptionalCall]
    collect: Any = functools.partial(method.collect, step=jnp.int32(0), key=KEY)  # pyright: ignore
    found, _, metrics = jax.jit(collect)(PARAMS, (), batch, state)
    left_out = np.asarray(batch.where & ~found.text.where)
    np.testing.assert_array_equal(left_out, np.asarray(rows.tier) == 1)
    assert mean(metrics["share_medium"]) == 1


def test_questions_are_asked_whole_and_their_answers_left_out(tmp_path: Path):
    path = tmp_path / "questions.jsonl"
    lines = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, lines)))
    cfg = dataclasses.replace(
        TEXT, task="questions", questions=str(path), max_answer=3, reward="same_text",
        positions_per_row=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r":11 has a question of 6 tokens, which must be 2 to 5"):
        rmt.make(cfg, context(init_from=None, sequence_length=7))
    method = rmt.make(cfg, context(init_from=None))
    dataset: Any = method.dataset
    asked = {split: dataset(split) for split in SPLITS}
    assert 4 < asked["validation"].num_examples < 25
    assert sum(data.num_examples for data in asked.values()) == 100
    batch = jax.tree.map(jnp.asarray, asked["train"].rows(range(D)))
    state = partitioning.unbox(method.init_state(KEY))  # pyright: ignore[reportOptionalCall]
    collect: Any = functools.partial(method.collect, step=jnp.int32(0), key=KEY)  # pyright: ignore
    found, _, metrics = jax.jit(collect)(PARAMS, (), batch, state)
    for row, prompt in enumerate(np.asarray(found.prompts[:, 0])):
        text, length = bytes(prompt.tolist()), int(found.lengths[row, 0])
        number = int(text[-length:].split(b"+")[0])
        assert text[-length:] == f"{number}+{number}=\x014\x02".encode()
        left = np.asarray(batch.where & ~found.text.where)[row]
        assert bytes(np.asarray(batch.targets)[row][left].tolist()) == str(2 * number).encode()
    assert float(metrics["accuracy"][1]) == D * G
    other = dataclasses.replace(cfg, validation_questions="parity", max_answer=1)
    with pytest.raises(ValueError, match=r"questions.jsonl:6 has an answer of 2 tokens"):
        rmt.make(other, context(init_from=None))
    swapped = dataclasses.replace(cfg, questions="parity", validation_questions=str(path))
    method = rmt.make(swapped, context(init_from=None))
    dataset = method.dataset
    assert [dataset(split).num_examples for split in asked] == [480, 100]


def test_tiers_from_a_file_need_no_initial_model():
    cfg = dataclasses.replace(TEXT, entropy="file", positions="hard")
    asked = {}

    def open_tiers(path: str, cut: Any) -> Any:
        asked.update(path=path, cuts=cut(np.arange(101.0)))
        return lambda split: split

    method = rmt.make(cfg, context(init_from=None, open_tiers=open_tiers))
    assert method.dataset is not None
    assert method.dataset("train") == "train"
    assert asked == {"path": "file", "cuts": (10.0, 40.0, 70.0)}
    assert method.init(KEY) == ()
    plain = rmt.make(dataclasses.replace(cfg, entropy=None), context())
    assert method.flops_per_token == plain.flops_per_token - flops.forward_flops(MODEL, L)
    high = dataclasses.replace(cfg, thresholds=(1.0, 2.0, 200.0))
    with pytest.raises(ValueError, match=r"the tier hard is empty: .* thresholds \(1.0, 2.0, 200"):
        rmt.make(high, context(open_tiers=open_tiers))
    for fields, message in (
        ({"task": "parity"}, "entropy=file has no meaning with task=parity"),
        ({"positions": "uniform"}, "entropy=file has no meaning with positions=uniform"),
    ):
        with pytest.raises(ValueError, match=message):
            rmt.make(dataclasses.replace(cfg, **fields), context(open_tiers=open_tiers))


def test_the_baseline_is_next_tokens_on_the_same_data():
    found = registry.baseline("reinforcement_midtraining", MODEL, TEXT)
    assert found.method == "reinforcement_midtraining"
    assert found.config == dataclasses.replace(TEXT, rl_weight=0.0)
    method = rmt.make(found.config, context())
    assert method.collect is None
    assert method.init_state is None
    assert method.flops_per_token == flops.train_flops(MODEL, L)


@pytest.mark.parametrize(
    ("cfg", "fields", "message"),
    [
        (TEXT, {"init_from": None}, "give --checkpoint.init_from, or positions=uniform"),
        (dataclasses.replace(TEXT, bits=8), {}, "bits=8 has no meaning with task=text"),
        (
            dataclasses.replace(TEXT, validation_questions="f"),
            {},
            "validation_questions=f has no meaning with task=text; .* task=questions",
        ),
        (TEXT, {"tokens": None}, "needs a tokenizer with a token </think>"),
        (
            TEXT,
            {"model": dataclasses.replace(MODEL, max_length=16)},
            "do not fit model.max_length=16; lower reinforcement_midtraining.prompt_length or "
            "max_thought, or raise model.max_length to 22",
        ),
        (
            TEXT,
            {"model": dataclasses.replace(MODEL, num_layers=3, recurrence=2)},
            "model.recurrence=2 is recurrent in depth",
        ),
    ],
)
def test_runs_that_cannot_be(
    cfg: ReinforcementMidtrainingConfig, fields: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        rmt.make(cfg, context(**fields))


def test_every_device_has_a_share_of_every_part():
    for parts, places, rows in [(1, 2, 1), (4, 2, 2), (4, 3, 4), (2, 4, 1)]:
        cfg = dataclasses.replace(TEXT, collect_parts=parts, positions_per_row=places)
        assert rmt.make(cfg, context()).rows_multiple == rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollouts": 1}, "rollouts=1: advantage=group compares"),
        ({"collect_parts": 0}, "collect_parts=0 must be at least 1"),
        ({"thresholds": (1.0, 0.5, 2.0)}, "must be three rising numbers"),
        ({"quantiles": (0.5, 0.7)}, "must be three rising numbers"),
        ({"first_tiers": (1.0, 1.0, 1.0)}, "must be three proportions of 1"),
        ({"budget": 9, "max_thought": 8}, "budget=9 must be between least_budget=1 and"),
        ({"reward": "information_gain"}, "length_weight=0.3 has no meaning"),
        ({"rl_weight": 0.0, "ntp_weight": 0.0}, "leave nothing to train"),
        ({"curriculum_begin": 0.7}, "must be shares of the run, in this order"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"clip_low": 0.0}, "clip_low=0.0 must be above 0"),
        ({"task": "questions"}, "task=questions needs the file that holds them; give questions="),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ReinforcementMidtrainingConfig(**fields)


def test_a_length_that_outweighs_the_answer_is_warned_of():
    with pytest.warns(UserWarning, match="a wrong answer whose thought has the best length"):
        ReinforcementMidtrainingConfig(length_weight=0.5)
