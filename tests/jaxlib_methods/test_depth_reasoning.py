"""The objectives of depth-recurrent reasoning, its validation and its FLOPs, by hand."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import depth_reasoning, depth_recurrence, flops
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.method import Context, Method
from jaxlib_methods.models import depth_recurrent as dr
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.tasks.questions import Graphs, Sentences
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train.config import OptimizerConfig
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.step import make_train_step

MODEL = TransformerConfig(embed_dim=8, num_heads=2, mlp_dim=12, compute_dtype="float32")
SIZES: dict[str, Any] = {
    "reachability": {"max_nodes": 6, "fewest_nodes": 4, "most_nodes": 6, "test_most_nodes": 6},
    "logic": {"max_length": 16},
}
STEP = jnp.int32(0)


def config(task: Any = "reachability", **fields: Any) -> DepthRecurrenceConfig:
    usual: dict[str, Any] = {"min_steps": 1, "max_steps": 3, "most_steps": 4, "hardest": 2,
                             "eval_difficulties": (1, 2, 3), "num_train": 0, "per_bucket": 2,
                             "easiest": 1, "dropout": 0.0}  # fmt: skip
    return DepthRecurrenceConfig(task=task, **usual | SIZES[task] | fields)


@functools.cache
def build(cfg: DepthRecurrenceConfig, model: TransformerConfig = MODEL) -> Method:
    def no_teacher(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        raise AssertionError(f"read {source}")

    context = Context(
        model=model,
        num_steps=9,
        sequence_length=999,
        batch_size=4,
        tokenizer="bytes",
        load_pretrained=no_teacher,
    )
    return depth_recurrence.make(cfg, context)


@functools.cache
def moved_params(model: dr.DepthRecurrentConfig) -> Any:
    """Parameters of which none is where it starts."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(dr.init_params, model), jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), partitioning.unbox(shapes)
    )


def batch_of(task: str) -> Any:
    """Four questions of difficulties 1, 2, 3 and 3; the last counts nothing."""
    rng = np.random.default_rng(2)
    counted: dict[str, Any] = {
        "label": np.array([1, 0, 1, 0], np.int32),
        "difficulty": np.array([1, 2, 3, 3], np.int32),
        "where": np.array([True, True, True, False]),
    }
    if task == "logic":
        tokens = rng.integers(1, 9, (4, 7)).astype(np.int32)
        tokens[1, 4:] = 0
        return Sentences(tokens, **counted)
    tokens = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 0]] * 2, np.int32)
    edges = (rng.random((4, 6, 6)) < 0.3) | np.eye(6, dtype=bool)
    ends = np.array([[0, 3], [2, 1], [5, 0], [1, 2]], np.int32)
    return Graphs(tokens, edges, ends, **counted)


def of(cfg: DepthRecurrenceConfig) -> tuple[Method, dr.DepthRecurrentConfig, Any, Any]:
    model = cfg.resolved().model(MODEL)
    return build(cfg), model, moved_params(model), batch_of(cfg.task)


@functools.cache
def compiled(cfg: DepthRecurrenceConfig, name: str) -> Any:
    """`loss` or `evaluate` of (params, batch, key); of `slope` also the gradient."""
    method = build(cfg)
    fn: Any = method.evaluate if name == "evaluate" else method.loss

    def run(params: Any, batch: Any, key: jax.Array) -> Any:
        return fn(params, (), batch, step=STEP, key=key)

    return jax.jit(jax.value_and_grad(run, has_aux=True) if name == "slope" else run)


def call(cfg: DepthRecurrenceConfig, name: str, batch: Any = None, key: int = 0) -> Any:
    _, _, params, usual = of(cfg)
    return compiled(cfg, name)(params, usual if batch is None else batch, jax.random.key(key))


def means(metrics: Any) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in metrics.items() if count}


@functools.cache
def logits_after(task: str, num_steps: int) -> np.ndarray:
    """The logits of the questions that count after that many steps, float64."""
    _, model, params, batch = of(config(task))
    logits = forward(model, params, *depth_reasoning.inputs(batch), num_steps=jnp.int32(num_steps))
    return np.asarray(logits, np.float64)[:3]


forward = jax.jit(dr.forward, static_argnums=0)


def bce(logits: np.ndarray, targets: Any) -> np.ndarray:
    return np.logaddexp(0, logits) - np.asarray(targets) * logits


# The objectives.

LABELS = [1, 0, 1]
# After t = 1, 2, 3 steps, of the questions of difficulty 1, 2 and 3.
KNOWN = {
    "reachability": [[1, 0, 0], [1, 0, 0], [1, 0, 1]],
    "logic": [[1, 0.5, 0.5], [1, 0, 0.5], [1, 0, 1]],
}


@pytest.mark.parametrize("task", KNOWN)
def test_what_can_be_known_after_each_step(task: str):
    before = 0.0 if task == "reachability" else 0.5
    got = depth_reasoning.known_after(jnp.array(LABELS), jnp.array([1, 2, 3]), 3, before=before)
    assert got.tolist() == KNOWN[task]


@pytest.mark.parametrize(
    ("task", "objective", "share"),
    [
        ("reachability", "silent", 1.0),
        ("reachability", "intermediate", 1.0),
        ("reachability", "iterative", 1.0),
        ("logic", "intermediate", 0.3),
        ("logic", "iterative", 0.3),
    ],
)
def test_an_objective_is_its_formula(task: str, objective: Any, share: float):
    weight = None if objective == "silent" else share
    cfg = config(task, min_steps=3, objective=objective, step_weight=weight)
    each = np.stack([logits_after(task, t) for t in (1, 2, 3)])
    last = bce(each[2], LABELS).mean()
    targets = KNOWN[task] if objective == "iterative" else [LABELS] * 3
    share = 0.0 if objective == "silent" else share
    expected = (1 - share) * last + share * bce(each, targets).mean()
    scalar, metrics = call(cfg, "loss")
    assert float(scalar) == pytest.approx(expected, rel=1e-5)
    found = means(metrics)
    assert found["loss"] == pytest.approx(last, rel=1e-5)
    assert found["iterations"] == 3
    assert found["accuracy"] == pytest.approx(np.mean((each[2] > 0) == np.array(LABELS)))
    assert {float(count) for _, count in metrics.values()} == {3.0}


@pytest.mark.parametrize("objective", ["intermediate", "iterative"])
def test_a_shorter_training_step_supervises_the_steps_it_takes(objective: Any):
    cfg = config("logic", objective=objective)
    seen = set()
    for number in range(8):
        scalar, metrics = call(cfg, "loss", key=number)
        steps = round(means(metrics)["iterations"])
        each = np.stack([logits_after("logic", t) for t in range(1, steps + 1)])
        targets = KNOWN["logic"][:steps] if objective == "iterative" else [LABELS] * steps
        assert float(scalar) == pytest.approx(bce(each, targets).mean(), rel=1e-5)
        assert means(metrics)["loss"] == pytest.approx(bce(each[-1], LABELS).mean(), rel=1e-5)
        seen.add(steps)
    assert seen == {1, 2, 3}


@functools.cache
def path(task: str) -> tuple[jax.Array, jax.Array]:
    """The states after 0, ..., 4 steps, `[5, B, L, D]`, and the gates of the four steps."""
    _, model, params, batch = of(config(task))
    tokens, sees, ends = depth_reasoning.inputs(batch)

    def follow(params: Any) -> tuple[jax.Array, jax.Array]:
        def body(state: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            new, gate = dr.step(model, params, state, t, sees)
            return new, (new, gate)

        first = dr.embed(model, params, tokens, ends)
        states, gates = jax.lax.scan(body, first, jnp.arange(4))[1]
        return jnp.concatenate([first[None], states]), gates

    return jax.jit(follow)(params)


def readout_gradient(cfg: DepthRecurrenceConfig, steps: list[int]) -> Any:
    """Of the mean BCE of readouts after `steps`, the states being given."""
    _, model, params, batch = of(cfg)
    states = path(cfg.task)[0][jnp.array(steps)]
    where, label = jnp.asarray(batch.where), jnp.asarray(batch.label)
    ends = jnp.asarray(batch.endpoints)

    def mean_loss(params: Any) -> jax.Array:
        logits = jax.vmap(lambda state: dr.readout(model, params, state, ends))(states)
        nll = jnp.logaddexp(0, logits) - label[None] * logits
        return jnp.where(where[None], nll, 0).sum() / (3 * len(steps))

    return jax.jit(jax.grad(mean_loss))(params)


@pytest.mark.parametrize(("objective", "steps"), [("silent", [3]), ("intermediate", [1, 2, 3])])
def test_the_readout_learns_from_the_supervised_steps_alone(objective: Any, steps: Any):
    cfg = config(min_steps=3, objective=objective)
    slope = call(cfg, "slope")[1]
    expected = readout_gradient(cfg, steps)
    for name in ("readout_norm", "readout_hidden", "readout_logit"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            slope[name],
            expected[name],
        )
    assert float(jnp.abs(expected["readout_hidden"]["kernel"]).max()) > 1e-3
    assert float(jnp.abs(slope["block"]["attention"]["query"]["kernel"]).max()) > 1e-5


# The number of steps.


def drawn(method: Method, params: Any, batch: Any, keys: jax.Array) -> np.ndarray:
    def one(key: jax.Array) -> jax.Array:
        total, count = method.loss(params, (), batch, step=STEP, key=key)[1]["iterations"]
        return total / count

    return np.asarray(jax.jit(jax.vmap(one))(keys))


def test_steps_are_drawn_uniformly_from_the_key_alone():
    cfg = config(min_steps=2)
    method, _, params, batch = of(cfg)
    keys = jax.random.split(jax.random.key(3), 2000)
    found = drawn(method, params, batch, keys)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [2, 3]
    assert abs(counts[0] - 1000) < 5 * np.sqrt(2000 / 4)
    others = Graphs(*(np.roll(field[:2], 1, axis=0) for field in batch))
    zeros = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(drawn(method, zeros, others, keys), found)
    untied = config().untied()
    method, _, params, _ = of(untied)
    assert set(drawn(method, params, batch, keys[:50])) == {3.0}


def test_one_program_serves_every_depth():
    method, _, _, batch = of(config(objective="intermediate"))
    traced = []

    def loss(*args: Any, **kwargs: Any) -> Any:
        traced.append(1)
        return method.loss(*args, **kwargs)

    options = OptimizerConfig()
    optimizer, mesh = make_optimizer(options, 9), partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        abstract = train_state.abstract_state(method, optimizer, mesh)
        state = train_state.create_state(method, optimizer, abstract, jax.random.key(0))
        step: Any = make_train_step(loss, optimizer, make_schedule(options, 9), abstract)
        seen = []
        for _ in range(6):
            state, metrics = step(state, (), batch, jax.random.key(1))
            seen.append(means(metrics)["iterations"])
    assert set(seen) == {1.0, 2.0, 3.0}
    assert (len(traced), step._cache_size()) == (1, 1)


# Rows that count nothing.


@pytest.mark.parametrize(
    ("task", "objective"), [("reachability", "silent"), ("logic", "iterative")]
)
def test_masked_rows_may_hold_anything(task: str, objective: Any):
    cfg, batch = config(task, min_steps=3, objective=objective), batch_of(task)
    rubbish: dict[str, Any] = {"tokens": 0, "edges": False, "label": 7, "difficulty": -5}
    other = batch._replace(**{
        name: np.concatenate([getattr(batch, name)[:3], np.full_like(getattr(batch, name)[3:], x)])
        for name, x in rubbish.items() if hasattr(batch, name)
    })  # fmt: skip
    ((expected, metrics), wanted), ((got, found), slope) = (
        call(cfg, "slope", rows) for rows in (batch, other)
    )
    assert float(got) == float(expected)
    assert means(found) == means(metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), slope, wanted)
    judged = [means(call(cfg, "evaluate", rows)[1]) for rows in (batch, other)]
    assert judged[0] == judged[1]
    (empty, found), slope = call(cfg, "slope", other._replace(where=np.zeros(4, bool)))
    assert float(empty) == 0
    assert means(found) == {}
    assert not any(leaf.any() for leaf in jax.tree.leaves(slope))


# Validation.


@pytest.mark.parametrize("task", ["reachability", "logic"])
def test_validation_is_at_max_steps_and_at_most_steps(task: str):
    cfg = config(task)
    batch = batch_of(task)
    scalar, metrics = call(cfg, "evaluate")
    found = means(metrics)
    usual, most = logits_after(task, 3), logits_after(task, 4)
    right = (most > 0) == np.array(LABELS)
    assert found["loss"] == pytest.approx(bce(usual, LABELS).mean(), rel=1e-5)
    assert float(scalar) == pytest.approx(found["loss"], rel=1e-6)
    assert found["accuracy"] == pytest.approx(np.mean((usual > 0) == np.array(LABELS)))
    assert found["accuracy_at_most_steps"] == pytest.approx(right.mean())
    # One question that counts is harder than any of training, and it alone is here.
    assert float(metrics["accuracy_harder"][1]) == 1
    assert found["accuracy_harder"] == float(right[2])
    states, gates = path(task)
    before, after, gate = (np.asarray(x) for x in (states[3], states[4], gates[3]))
    real = batch.tokens > 0
    size = np.linalg.norm
    change = size(after - before, axis=-1) / size(before, axis=-1)
    for name, x in (("state_change", change), ("gate", gate.mean(axis=-1))):
        rows = np.where(real, x, 0).sum(axis=1) / real.sum(axis=1)
        assert found[name] == pytest.approx(float(rows[:3].mean()), rel=1e-4), name


def test_easy_validation_has_no_harder_questions():
    _, metrics = call(config(hardest=3), "evaluate")
    assert float(metrics["accuracy_harder"][1]) == 0
    assert all(np.isfinite(total) for total, _ in metrics.values())


def test_validation_has_no_dropout_and_training_has():
    cfg = config(min_steps=3, dropout=0.5)
    plain = bce(logits_after("reachability", 3), LABELS).mean()
    for key in (0, 1):
        assert float(call(cfg, "evaluate", key=key)[0]) == pytest.approx(plain, rel=1e-5)
    first, second = (float(call(cfg, "loss", key=key)[0]) for key in (0, 1))
    assert abs(first - second) > 1e-3


def test_a_question_is_answered_yes_above_0():
    logits = jnp.array([[-1.0, 0.0, 2.0], [3.0, -0.5, 1.0]])
    got = depth_reasoning.correct(logits, jnp.array([1, 0, 1]))
    assert got.tolist() == [[False, True, True], [True, True, True]]


# FLOPs.

WIDE = dataclasses.replace(MODEL, embed_dim=16, mlp_dim=40)


@pytest.mark.parametrize("task", ["reachability", "logic"])
@pytest.mark.parametrize("recurrence", ["gated", "tied", "untied"])
def test_flops_are_those_of_the_program(task: str, recurrence: Any):
    cfg = config(task, recurrence=recurrence, min_steps=3)
    cfg = cfg.untied() if recurrence == "untied" else cfg
    method, questions, batch = build(cfg, WIDE), cfg.resolved(), batch_of(task)
    model = questions.model(WIDE)
    params = jax.eval_shape(lambda: partitioning.unbox(dr.init_params(model, jax.random.key(0))))
    rows, length = batch.tokens.shape
    sees = depth_reasoning.inputs(batch)[1]
    state = jax.ShapeDtypeStruct((rows, length, 16), jnp.float32)
    step = flops.count_dot_flops(lambda p, x: dr.step(model, p, x, 0, sees)[0], params, state)
    analytic = depth_reasoning.step_flops(model, length)
    assert step == pytest.approx(analytic * rows * length, rel=0.01)
    ends = getattr(batch, "endpoints", None)
    readout = flops.count_dot_flops(lambda p, x: dr.readout(model, p, x, ends), params, state)
    assert readout == pytest.approx(depth_reasoning.readout_flops(model) * rows, rel=0.01)
    for objective in ("silent", "intermediate"):
        again = dataclasses.replace(cfg, objective=objective)
        loss = build(again, WIDE).loss

        def gradient(params: Any, key: jax.Array, loss: Any = loss) -> Any:
            return jax.grad(lambda p: loss(p, (), batch, step=STEP, key=key)[0])(params)

        counted = flops.count_dot_flops(gradient, params, jax.random.key(0))
        per_token = depth_reasoning.train_flops(again.resolved(), model, length)
        assert counted == pytest.approx(per_token * rows * length, rel=0.01)
    whole = questions.task().sequence_length
    assert method.flops_per_token == depth_reasoning.train_flops(questions, model, whole)


def test_flops_are_of_the_mean_number_of_steps():
    few, many, both = (
        depth_reasoning.train_flops(cfg.resolved(), cfg.resolved().model(MODEL), 6)
        for cfg in (config(max_steps=1), config(min_steps=3), config())
    )
    assert both == pytest.approx((few + many) / 2)
    assert many > 2 * few
