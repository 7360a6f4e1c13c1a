"""Late-to-early training: its formula, what gets a gradient, when the teacher leaves."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import next_token
from jaxlib_methods.late_to_early import (
    LateToEarlyConfig,
    make,
    make_loss,
    student_block,
    teacher_layer,
)
from jaxlib_methods.method import Batch, Context, Method, Pretrained
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import forward, init_params

STUDENT = TransformerConfig(
    vocab_size=61,
    num_layers=3,
    embed_dim=8,
    num_heads=2,
    mlp_dim=7,
    max_length=16,
    compute_dtype="float32",
)
TEACHER = dataclasses.replace(STUDENT, num_layers=2, embed_dim=12, num_heads=3, mlp_dim=5)
# Two documents; one document and two tokens of padding. One target inside is deleted.
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
INPUTS = jnp.array([[3, 60, 17, 0, 5, 5, 41], [9, 8, 59, 2, 30, 1, 22]])
BATCH = Batch(
    inputs=INPUTS,
    targets=jnp.roll(INPUTS, -1, axis=1),
    positions=jnp.array([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 0]]),
    segments=SEGMENTS,
    where=(SEGMENTS > 0).at[0, 3].set(False),
)
KEY = jax.random.key(0)
STOP = 8
ALIGN = LateToEarlyConfig(teacher="small", weight=0.5, stop_step=STOP, student_block=2)


@functools.cache
def params_of(cfg: TransformerConfig) -> Any:
    tree = partitioning.unbox(jax.eval_shape(lambda key: init_params(cfg, key), KEY))
    rng = np.random.default_rng(cfg.num_layers)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype), tree)


EXTRA = {"teacher": params_of(TEACHER)}


class Loader:
    """Stands in for the trainer's reader of finished models, and counts."""

    def __init__(self, *, tokenizer: str | None = "bytes", **changes: Any) -> None:
        self.config = dataclasses.replace(TEACHER, **changes)
        self.tokenizer = tokenizer
        self.calls: list[tuple[str, bool, str | None]] = []

    def __call__(self, source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        self.calls.append((source, weights, dtype))
        return Pretrained(self.config, EXTRA["teacher"] if weights else None, self.tokenizer)


def context(loader: Loader | None = None, **changes: Any) -> Context:
    values: dict[str, Any] = {
        "model": STUDENT,
        "num_steps": 20,
        "sequence_length": 7,
        "batch_size": 4,
        "tokenizer": "bytes",
        "load_pretrained": loader or Loader(),
    }
    return Context(**(values | changes))


def program(method: Method, extra: Any) -> str:
    """The whole computation of a loss and its gradient, as text."""
    gradient = jax.value_and_grad(method.loss, has_aux=True)
    run = functools.partial(gradient, key=KEY)
    params = params_of(STUDENT)
    return str(jax.make_jaxpr(lambda s: run(params, extra, BATCH, step=s))(jnp.int32(0)))


@functools.cache
def compiled(cfg: LateToEarlyConfig) -> Any:
    """`(params, extra, batch, step) -> ((scalar, metrics), gradients of both)`."""
    loss = make_loss(cfg, STUDENT, TEACHER, stop=STOP)

    def total(params, extra, batch, step):
        return loss(params, extra, batch, step=step, key=KEY)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def run(batch: Batch = BATCH, *, step: int = 0) -> Any:
    return compiled(ALIGN)(params_of(STUDENT), EXTRA, batch, jnp.int32(step))


# The formula, written again: states from the trunk, everything else here.


WEIGHTS = BATCH.where / BATCH.where.sum()  # a mean over the targets that count


def nll_by_hand(logits: jax.Array) -> jax.Array:
    return (
        WEIGHTS * -(jax.nn.log_softmax(logits) * jax.nn.one_hot(BATCH.targets, 128)).sum(-1)
    ).sum()


def resized(x: jax.Array, size: int) -> jax.Array:
    return jax.image.resize(x, (*x.shape[:-1], size), "linear", antialias=False)


def outputs_of(cfg: TransformerConfig, params: Any, layer: Any) -> Any:
    inputs: dict[str, Any] = {"positions": BATCH.positions, "segments": BATCH.segments}
    return forward(cfg, params, BATCH.inputs, hidden_layer=layer, **inputs)


def by_hand(params: Any, cfg: LateToEarlyConfig, step: int, k: int, layer: Any) -> jax.Array:
    """NLL + lambda * -cos, or the share of the soft cross-entropy."""
    student = outputs_of(STUDENT, params, k)
    teacher = outputs_of(TEACHER, EXTRA["teacher"], layer)
    nll = nll_by_hand(student.logits)
    if cfg.objective != "alignment":
        share, log_probs = cfg.distillation_weight, jax.nn.log_softmax(student.logits[..., :61])
        target = jax.nn.softmax(teacher.logits[..., :61] / cfg.temperature)
        return (1 - share) * nll + share * (WEIGHTS * -(target * log_probs).sum(-1)).sum()
    u, v = student.hidden, teacher.hidden
    if cfg.resize == "teacher_to_student":
        v = resized(v, STUDENT.embed_dim)
    elif cfg.resize == "student_to_teacher":
        u = resized(u, TEACHER.embed_dim)
    else:
        v = v @ params["alignment"]["kernel"]
    cosine = (u * v).sum(-1) / (jnp.linalg.norm(u, axis=-1) * jnp.linalg.norm(v, axis=-1))
    return nll - cfg.weight * max(0, STOP - step) / STOP * (WEIGHTS * cosine).sum()


def changed(**changes: Any) -> LateToEarlyConfig:
    return dataclasses.replace(ALIGN, **changes)


@pytest.mark.parametrize(
    "cfg",
    [
        ALIGN,
        changed(resize="student_to_teacher"),
        changed(resize="learned_linear"),
        changed(objective="salt", distillation_weight=0.3, temperature=0.7),
        changed(objective="reverse_kd", distillation_weight=0.9),
    ],
    ids=["teacher_to_student", "student_to_teacher", "learned_linear", "salt", "reverse_kd"],
)
def test_value_and_gradient_are_the_formula(cfg):
    params = params_of(STUDENT)
    if cfg.resize == "learned_linear":
        kernel = np.random.default_rng(3).normal(size=(12, 8))
        params = {**params, "alignment": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    loss = make_loss(cfg, STUDENT, TEACHER, stop=STOP)
    with jax.disable_jit():
        (got, _), grads = jax.value_and_grad(loss, has_aux=True)(
            params, EXTRA, BATCH, step=jnp.int32(2), key=KEY
        )
        want, want_grads = jax.value_and_grad(by_hand)(params, cfg, 2, 2, "final")
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, want_grads
    )
    if cfg.resize == "learned_linear":
        assert bool(grads["alignment"]["kernel"].any())


# In a student of 8 layers `early` is block 1 and `middle` 4; here, of 3: 1, 2 and 3.
@pytest.mark.parametrize(("at", "k"), [("early", 1), ("middle", 2), ("late", 3)])
@pytest.mark.parametrize(
    ("late", "layer"), [("last", "final"), ("last_before_norm", 2), ("middle", 1)]
)
def test_layer_pairings(at, k, late, layer):
    cfg = changed(student_block=None, student_layer=at, teacher_layer=late)
    loss = make_loss(cfg, STUDENT, TEACHER, stop=STOP)
    with jax.disable_jit():
        got, _ = loss(params_of(STUDENT), EXTRA, BATCH, step=jnp.int32(0), key=KEY)
        want = by_hand(params_of(STUDENT), cfg, 0, k, layer)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "early", "middle"), [(24, 3, 12), (32, 4, 16), (6, 1, 3), (2, 1, 1), (1, 1, 1)]
)
def test_layers_by_name(layers, early, middle):
    model = dataclasses.replace(STUDENT, num_layers=layers)
    for name, k in [("early", early), ("middle", middle), ("late", layers)]:
        assert student_block(changed(student_block=None, student_layer=name), model) == k
    for name, k in [("last", "final"), ("last_before_norm", layers), ("middle", middle)]:
        assert teacher_layer(changed(teacher_layer=name), model) == k
    assert student_block(changed(student_block=1, student_layer="late"), model) == 1


@pytest.mark.parametrize("block", [0, 4])
def test_a_student_block_that_does_not_exist_is_refused(block):
    message = f"student_block={block} does not exist in a student of 3 layers; choose 1 to 3"
    with pytest.raises(ValueError, match=message):
        make(changed(student_block=block), context())


# What gets a gradient.


def test_the_teacher_gets_no_gradient():
    _, (to_student, to_teacher) = run()
    assert all(bool(leaf.any()) for leaf in jax.tree.leaves(to_student))
    assert not any(leaf.any() for leaf in jax.tree.leaves(to_teacher))


def test_alignment_reaches_the_embedding_and_the_blocks_up_to_k_only():
    # The same program with weight 1/2 and 0: what differs is the gradient of the alignment.
    _, (with_it, _) = run(step=0)
    _, (without, _) = run(step=STOP)
    moved = jax.tree.map(lambda a, b: a != b, with_it, without)
    assert bool(moved["embedding"]["table"][BATCH.inputs[0, 0]].all())
    for leaf in jax.tree.leaves(moved["blocks"]):
        assert bool(leaf[0].any())
        assert bool(leaf[1].any())
        assert not leaf[2].any()
    assert not any(leaf.any() for leaf in jax.tree.leaves((moved["final_norm"], moved["head"])))


def test_gradient_at_weight_zero_is_that_of_next_token_prediction():
    plain = next_token.make_loss(STUDENT)
    gradient = jax.jit(jax.grad(lambda p: plain(p, (), BATCH, step=jnp.int32(0), key=KEY)[0]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run(step=STOP)[1][0],
        gradient(params_of(STUDENT)),
    )


def test_fifty_steps_of_alignment_alone_raise_the_cosine():
    loss = make_loss(ALIGN, STUDENT, TEACHER, stop=STOP)
    optimizer = optax.adam(2e-2)

    def minus_cosine(params):
        _, metrics = loss(params, EXTRA, BATCH, step=jnp.int32(0), key=KEY)
        total, count = metrics["alignment"]
        return -total / count

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(minus_cosine)(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), -value

    @jax.jit
    def fifty(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), length=50)[1]

    cosine = fifty(params_of(STUDENT))
    assert abs(float(cosine[0])) < 0.3
    assert float(cosine[-1]) > 0.5


# What the loss reads.


def test_padding_may_hold_anything():
    real_token = BATCH.segments > 0
    junk = BATCH._replace(
        inputs=jnp.where(real_token, BATCH.inputs, 60),
        targets=jnp.where(BATCH.where, BATCH.targets, -1),
    )
    for one, other in zip(jax.tree.leaves(run()), jax.tree.leaves(run(junk)), strict=True):
        assert jnp.array_equal(one, other)
    # The opposite: a token of a document.
    assert float(run(BATCH._replace(inputs=BATCH.inputs.at[0, 0].add(1)))[0][0]) != run()[0][0]


@pytest.mark.parametrize("t", [2, 5])
def test_alignment_is_causal_and_of_the_same_token(t):
    def cosines(inputs, where):
        (_, metrics), _ = run(BATCH._replace(inputs=inputs, where=where))
        return metrics["alignment"][0]

    moved = BATCH.inputs.at[0, t].add(1)
    before = BATCH.where & (jnp.arange(7) < t)[None]
    at = BATCH.where & (jnp.arange(7) == t)[None]
    assert cosines(moved, before) == cosines(BATCH.inputs, before)
    assert cosines(moved, at) != cosines(BATCH.inputs, at)


def test_metrics():
    (scalar, metrics), _ = run(step=2)
    count = 11  # 14 tokens, 2 of padding, 1 deleted
    assert set(metrics) == {"loss", "teacher_loss", "alignment", "alignment_weight"}
    assert all(float(n) == count for _, n in metrics.values())
    mean = {name: float(total) / count for name, (total, _) in metrics.items()}
    # 2 of 8 steps are gone: 3/4 of 0.5.
    np.testing.assert_allclose(mean["alignment_weight"], 0.375, rtol=1e-6)
    np.testing.assert_allclose(scalar, mean["loss"] - 0.375 * mean["alignment"], rtol=1e-5)
    with jax.disable_jit():
        student = nll_by_hand(outputs_of(STUDENT, params_of(STUDENT), None).logits)
        teacher = nll_by_hand(outputs_of(TEACHER, EXTRA["teacher"], None).logits)
    np.testing.assert_allclose([mean["loss"], mean["teacher_loss"]], [student, teacher], rtol=1e-5)


def test_metrics_of_distillation_and_no_fading():
    loss = make_loss(changed(objective="salt"), STUDENT, TEACHER, stop=STOP)
    with jax.disable_jit():
        first, metrics = loss(params_of(STUDENT), EXTRA, BATCH, step=jnp.int32(0), key=KEY)
        later, _ = loss(params_of(STUDENT), EXTRA, BATCH, step=jnp.int32(7), key=KEY)
    assert set(metrics) == {"loss", "teacher_loss", "distillation"}
    assert first == later


# When the teacher is there.


@pytest.mark.parametrize(
    "cfg",
    [
        LateToEarlyConfig(weight=0.0),
        LateToEarlyConfig(stop_step=0),
        LateToEarlyConfig(stop_fraction=0.0),
        LateToEarlyConfig(objective="salt", stop_fraction=0.0),
    ],
    ids=["weight", "stop_step", "stop_fraction", "salt"],
)
def test_without_effect_it_is_next_token_prediction_and_needs_no_teacher(cfg):
    loader = Loader()
    method = make(cfg, context(loader))
    plain = next_token.make(next_token.NextTokenConfig(), context())
    assert (method.until, method.then, method.init(KEY)) == (None, None, ())
    assert program(method, ()) == program(plain, ())
    assert loader.calls == []


def test_from_the_stop_step_on_the_program_is_next_token_prediction():
    method = make(ALIGN, context())
    plain = next_token.make(next_token.NextTokenConfig(), context())
    assert method.until == STOP
    assert method.then is not None
    assert (method.then.until, method.then.then) == (None, None)
    assert program(method.then, ()) == program(plain, ())
    assert program(method, EXTRA) != program(plain, ())
    assert method.then.flops_per_token == plain.flops_per_token < method.flops_per_token


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({"stop_step": None}, 10),  # half of 20
        ({"stop_step": None, "stop_fraction": 0.23}, 5),  # 4.6
        ({"stop_step": 7, "stop_fraction": 0.5}, 7),
        ({"stop_step": 700}, 700),  # behind the end of the run
        ({"objective": "salt", "stop_step": 7}, 7),
        ({"objective": "reverse_kd", "stop_step": 7}, 20),
    ],
)
def test_stop_step(changes, stop):
    cfg = changed(**changes)
    assert cfg.stop(20) == stop
    assert make(cfg, context()).until == stop


def test_the_weight_fades_to_the_stop_step_of_the_run():
    for stop, weight in ((None, 0.25), (40, 0.4375)):  # of 0.5, at 5 of 10 and of 40
        method = make(changed(stop_step=stop), context())
        with jax.disable_jit():
            _, metrics = method.loss(params_of(STUDENT), EXTRA, BATCH, step=jnp.int32(5), key=KEY)
        total, count = metrics["alignment_weight"]
        np.testing.assert_allclose(total / count, weight, rtol=1e-6)


def test_the_teacher_is_read_once_in_the_dtype_of_the_run():
    loader = Loader()
    model = dataclasses.replace(STUDENT, compute_dtype="bfloat16")
    method = make(ALIGN, context(loader, model=model))
    assert loader.calls == [("small", False, None)]
    assert method.init(KEY) == {"teacher": EXTRA["teacher"]}
    assert loader.calls[1:] == [("small", True, "bfloat16")]


def test_trained_parameters_hold_no_teacher():
    method = make(ALIGN, context())
    ours = jax.eval_shape(method.init_params, KEY)
    plain = jax.eval_shape(lambda key: init_params(STUDENT, key), KEY)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, plain)


def test_learned_linear_is_one_more_parameter_until_the_end():
    method = make(changed(resize="learned_linear"), context())
    assert method.then is not None
    trees = [jax.eval_shape(m.init_params, KEY) for m in (method, method.then)]
    for tree in trees:
        assert tree["alignment"]["kernel"].names == ("norm", "embed")
        assert partitioning.unbox(tree)["alignment"]["kernel"].shape == (12, 8)
    kernel = jax.jit(lambda: partitioning.unbox(method.init_params(KEY)["alignment"]))()["kernel"]
    np.testing.assert_allclose(kernel.std(), 12**-0.5, rtol=0.2)
    params = {**params_of(STUDENT), "alignment": {"kernel": kernel}}
    with jax.disable_jit():
        after = method.then.loss(params, (), BATCH, step=jnp.int32(9), key=KEY)[0]
        want = nll_by_hand(outputs_of(STUDENT, params_of(STUDENT), None).logits)
    np.testing.assert_allclose(after, want, rtol=1e-5)


# Refusals.


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            {"vocab_size": 67},
            "the teacher's vocabulary has 67 tokens and the student's 61; .* model.vocab_size=67",
        ),
        ({"tokenizer": "other"}, "trained with tokenizer other and the data is cut with bytes; se"),
        ({"max_length": 6}, "sequence_length=7 is longer than the teacher's context of 6 tokens"),
    ],
)
def test_a_teacher_that_cannot_read_the_data_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        make(ALIGN, context(Loader(**loader)))


def test_a_teacher_of_unknown_tokenizer_and_just_enough_context_is_taken():
    assert make(ALIGN, context(Loader(tokenizer=None, max_length=7))).until == STOP


def test_a_missing_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher is empty; give a run's workdir"):
        make(changed(teacher=""), context())


@pytest.mark.parametrize("objective", ["salt", "reverse_kd"])
def test_distillation_refuses_a_loss_without_logits(objective):
    model = dataclasses.replace(STUDENT, loss_implementation="xla")
    make(ALIGN, context(model=model))
    with pytest.raises(ValueError, match=r"leave out model\.loss_implementation=xla"):
        make(changed(objective=objective), context(model=model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -0.1}, "weight=-0.1 must not be negative"),
        ({"weight": math.nan}, "weight=nan must not be negative"),
        ({"stop_fraction": 1.5}, "stop_fraction=1.5 must be between 0 and 1"),
        ({"stop_step": -1}, "stop_step=-1 must not be negative"),
        ({"distillation_weight": 2.0}, "distillation_weight=2.0 must be between 0 and 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"objective": "let"}, "objective 'let' is unknown; choose one of "),
        ({"student_layer": "last"}, "student_layer 'last' is unknown; choose one of "),
        ({"teacher_layer": "late"}, "teacher_layer 'late' is unknown; choose one of "),
        ({"resize": "none"}, "resize 'none' is unknown; choose one of "),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)
