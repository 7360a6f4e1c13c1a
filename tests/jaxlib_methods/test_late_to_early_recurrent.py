"""Late-to-early training with models that are recurrent in depth: students and teachers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.late_to_early import LateToEarlyConfig, make_loss, student_block, teacher_layer
from jaxlib_methods.method import Batch
from jaxlib_methods.models import language_model, partitioning, recurrent_training, transformer
from jaxlib_methods.models.config import TransformerConfig

L, V, STOP = 6, 61, 8
STUDENT = TransformerConfig(
    vocab_size=V,
    num_layers=3,  # two, and one in the core
    prelude_layers=2,
    coda_layers=0,
    embed_dim=8,
    num_heads=2,
    mlp="gelu",
    mlp_dim=7,
    max_length=16,
    block="post_norm",
    recurrence=4,
    backprop_steps=2,
    compute_dtype="float32",
)
PLAIN = dataclasses.replace(STUDENT, recurrence=0, num_layers=1, block="pre_norm")
RECURRENT = dataclasses.replace(STUDENT, num_layers=2, prelude_layers=1, injection="add")
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 0]])
INPUTS = jnp.array([[3, 60, 17, 0, 5, 5], [9, 8, 59, 2, 30, 1]])
BATCH = Batch(
    inputs=INPUTS,
    targets=jnp.roll(INPUTS, -1, axis=1),
    positions=jnp.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0]]),
    segments=SEGMENTS,
    where=(SEGMENTS > 0).at[0, 3].set(False),
)
ALIGN = LateToEarlyConfig(teacher="small", weight=0.5, stop_step=STOP)


@functools.cache
def key_of(num_steps: int) -> jax.Array:
    """A key with which a student draws this number of iterations."""
    keys = jax.vmap(jax.random.key)(jnp.arange(99))
    drawn = jax.vmap(lambda k: recurrent_training.draw_steps(STUDENT, jax.random.split(k)[0]))
    return keys[np.flatnonzero(jax.jit(drawn)(keys) == num_steps)[0]]


def drawn(cfg: TransformerConfig) -> Any:
    init = functools.partial(language_model.init_params, cfg)
    tree = partitioning.unbox(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(cfg.num_layers)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype), tree)


PARAMS = {cfg: drawn(cfg) for cfg in (STUDENT, PLAIN, RECURRENT)}


def changed(**changes: Any) -> LateToEarlyConfig:
    return dataclasses.replace(ALIGN, **changes)


@functools.cache
def compiled(cfg: LateToEarlyConfig, *, gradient: bool = True) -> Any:
    loss = make_loss(cfg, STUDENT, PLAIN, stop=STOP)

    def total(params: Any, step: Any, key: Any) -> Any:
        return loss(params, {"teacher": PARAMS[PLAIN]}, BATCH, step=step, key=key)

    run = jax.value_and_grad(total, has_aux=True) if gradient else total
    return jax.jit(run)


def of_alignment(cfg: LateToEarlyConfig, num_steps: int) -> Any:
    """Which parameters the alignment moves, and which the whole loss."""
    key = key_of(num_steps)
    # The same program with weight 1/2 and 0: what differs is the gradient of the alignment.
    _, with_it = compiled(cfg)(PARAMS[STUDENT], np.int32(0), key)
    _, without = compiled(cfg)(PARAMS[STUDENT], np.int32(STOP), key)
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), with_it, without)
    return moved, jax.tree.map(lambda leaf: bool(np.any(np.asarray(leaf) != 0)), without)


def every(tree: Any) -> bool:
    return all(jax.tree.leaves(tree))


def none(tree: Any) -> bool:
    return not any(jax.tree.leaves(tree))


AFTER = ("final_norm", "head")


@pytest.mark.parametrize("num_steps", [1, 4])
def test_early_aligns_the_prelude_alone(num_steps):
    moved, trained = of_alignment(ALIGN, num_steps)
    assert every(moved["prelude"])
    assert every(moved["embedding"])
    assert none([moved[part] for part in ("adapter", "core", *AFTER)])
    assert every(trained)


def test_late_aligns_the_core_too():
    moved, _ = of_alignment(changed(student_layer="late"), 4)
    assert every([moved[part] for part in ("prelude", "embedding", "adapter", "core")])
    assert none([moved[part] for part in AFTER])


def cosine(student: jax.Array, teacher: jax.Array) -> np.ndarray:
    u, v = np.asarray(student), np.asarray(teacher)
    found = (u * v).sum(-1) / (np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1))
    return np.where(BATCH.where, found, 0).sum()


PLACES: Any = {"positions": BATCH.positions, "segments": BATCH.segments}


@functools.partial(jax.jit, static_argnums=0)
def states(cfg: TransformerConfig, num_steps: Any, key: Any) -> Any:
    """The last state, and the last hidden layer of all."""
    key = jax.random.split(key)[1]
    steps: dict[str, Any] = {"num_steps": num_steps, "hidden_layer": "final"}
    out = recurrent_training.forward(cfg, PARAMS[cfg], INPUTS, key=key, **steps, **PLACES)
    return out.state, out.hidden


@functools.cache
def hidden_of_teacher() -> jax.Array:
    run = jax.jit(
        lambda p: transformer.forward(PLAIN, p, INPUTS, hidden_layer="final", **PLACES).hidden
    )
    return run(PARAMS[PLAIN])


# Four iterations, two with gradient: after the third and after the fourth; one: after that.
@pytest.mark.parametrize(
    ("at", "num_steps", "seen"), [("middle", 4, 3), ("late", 4, 4), ("middle", 1, 1)]
)
def test_the_layers_are_states_of_the_iterations_with_gradient(at, num_steps, seen):
    key = key_of(num_steps)
    run = compiled(changed(student_layer=at), gradient=False)
    _, metrics = run(PARAMS[STUDENT], np.int32(0), key)
    want = cosine(states(STUDENT, np.int32(seen), key)[0], hidden_of_teacher())
    np.testing.assert_allclose(metrics["alignment"][0], want, rtol=1e-4)


def test_layers_by_name_and_number():
    deep = dataclasses.replace(STUDENT, recurrence=32, backprop_steps=8, num_layers=6)
    for name, k in [("early", 2), ("middle", 3), ("late", 10)]:
        assert student_block(changed(student_layer=name), deep) == k
    assert student_block(changed(student_block=7), deep) == 7
    for block in (0, 11):
        message = f"student_block={block} does not exist in a student of 10 layers; choose 1 to 10"
        with pytest.raises(ValueError, match=message):
            make_loss(changed(student_block=block), deep, PLAIN, stop=STOP)


def test_a_recurrent_teacher_takes_its_usual_number_of_iterations():
    loss = make_loss(ALIGN, PLAIN, RECURRENT, stop=STOP)
    extra = {"teacher": PARAMS[RECURRENT]}

    def total(params: Any, key: Any) -> Any:
        return loss(params, extra, BATCH, step=jnp.int32(0), key=key)

    run = jax.jit(total)
    student = jax.jit(
        lambda p: transformer.forward(PLAIN, p, INPUTS, hidden_layer=1, **PLACES).hidden
    )(PARAMS[PLAIN])  # fmt: skip
    for seed in (0, 1):  # whatever a student would draw
        key = jax.random.key(seed)
        of_teacher = jax.random.fold_in(key, 1)  # another first state than the student's
        want = cosine(student, states(RECURRENT, np.int32(4), of_teacher)[1])
        _, metrics = run(PARAMS[PLAIN], key)
        np.testing.assert_allclose(metrics["alignment"][0], want, rtol=1e-4)


def test_a_recurrent_teacher_has_its_last_layer_only():
    assert teacher_layer(ALIGN, RECURRENT) == "final"
    for layer in ("middle", "last_before_norm"):
        message = (
            f"late_to_early.teacher_layer={layer} does not exist in a teacher that is recurrent "
            "in depth; choose last"
        )
        with pytest.raises(ValueError, match=message):
            make_loss(changed(teacher_layer=layer), STUDENT, RECURRENT, stop=STOP)


def test_evaluation_takes_the_usual_number_of_iterations():
    cfg = changed(student_layer="late")
    loss = make_loss(cfg, STUDENT, PLAIN, stop=STOP, evaluate=True)
    frozen = {"teacher": PARAMS[PLAIN]}
    run = jax.jit(lambda p, key: loss(p, frozen, BATCH, step=jnp.int32(0), key=key))
    key = key_of(1)  # which training would take
    want = cosine(states(STUDENT, np.int32(4), key)[0], hidden_of_teacher())
    _, metrics = run(PARAMS[STUDENT], key)
    np.testing.assert_allclose(metrics["alignment"][0], want, rtol=1e-4)
