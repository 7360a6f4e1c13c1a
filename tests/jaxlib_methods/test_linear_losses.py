"""A loss without logits is the loss with them, in every method and on every mesh."""

import dataclasses
import functools
import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_methods import depth_recurrence, late_to_early, linear_losses, next_token
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.method import Batch
from jaxlib_methods.models import language_model, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels import linear_cross_entropy as kernel

PLAIN = TransformerConfig(
    vocab_size=300,  # three tiles of 128, the last of them with padding
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=8,
    compute_dtype="float32",
)
RECURRENT = dataclasses.replace(PLAIN, num_layers=3, recurrence=2, tie_embeddings=True)
TEACHER = dataclasses.replace(PLAIN, embed_dim=8, tie_embeddings=True)
B, L = 4, 8


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "TILE", 128)


@functools.cache
def params_of(cfg: TransformerConfig) -> Any:
    plain = dataclasses.replace(cfg, loss_implementation="auto")
    init = functools.partial(language_model.init_params, plain)
    return jax.jit(lambda key: partitioning.unbox(init(key)))(jax.random.key(0))


def make_batch(cfg: TransformerConfig = PLAIN) -> Batch:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, cfg.vocab_size, (B, L + 1)), jnp.int32)
    where = jnp.asarray(rng.random((B, L)) < 0.7)
    targets = jnp.where(where, tokens[:, 1:], -1)
    positions = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
    return Batch(tokens[:, :-1], targets, positions, jnp.ones((B, L), jnp.int32), where)


def compiled(fn: Any, *arguments: Any) -> Any:
    return jax.jit(fn).lower(*arguments).compile()


def run(loss: Any, params: Any, extra: Any = (), *, gradient: bool = True) -> Any:
    """Value and metrics of a loss at `make_batch()`, and its gradient."""
    call = functools.partial(loss, step=jnp.int32(0), key=jax.random.key(1))
    call = jax.value_and_grad(call, has_aux=True) if gradient else call
    arguments = params, extra, make_batch()
    return compiled(call, *arguments)(*arguments)


def assert_close(found: Any, expected: Any) -> None:
    def compare(path: Any, x: Any, y: Any) -> None:
        x, y = np.asarray(x), np.asarray(y)
        error = float(np.abs(x - y).max() / np.maximum(np.abs(y).max(), 1e-3))
        assert error < 1e-5, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(compare, found, expected)


def plain(cfg: TransformerConfig) -> Any:
    return run(next_token.make_loss(cfg), params_of(cfg))


def taught(cfg: TransformerConfig) -> Any:
    its = dataclasses.replace(TEACHER, loss_implementation=cfg.loss_implementation)
    loss = late_to_early.make_loss(late_to_early.LateToEarlyConfig(), cfg, its, stop=2)
    return run(loss, params_of(cfg), {"teacher": params_of(TEACHER)})


def recurrent(cfg: TransformerConfig) -> Any:
    return run(next_token.make_loss(cfg, num_steps=2), params_of(cfg), gradient=False)


def evaluated(cfg: TransformerConfig) -> Any:
    """In float64: what depth gains is a small difference of losses."""
    with jax.enable_x64(True):
        cfg = dataclasses.replace(cfg, compute_dtype="float64", param_dtype="float64")
        evaluate = depth_recurrence.make_evaluate(DepthRecurrenceConfig(), cfg)
        return run(evaluate, params_of(cfg), gradient=False)


@pytest.mark.parametrize(
    ("make", "cfg"),
    [(plain, PLAIN), (taught, PLAIN), (recurrent, RECURRENT), (evaluated, RECURRENT)],
)
def test_a_method_gives_the_same_without_logits(make: Any, cfg: TransformerConfig):
    with_logits, without = (
        make(dataclasses.replace(cfg, loss_implementation=form)) for form in ("logits", "xla")
    )
    assert_close(without, with_logits)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(with_logits)) > 5


def test_entropies_are_the_same_without_logits():
    batch, params = make_batch(), params_of(PLAIN)

    def entropy(form: Any, params: Any) -> jax.Array:
        cfg = dataclasses.replace(PLAIN, loss_implementation=form)
        out = language_model.forward(cfg, params, batch.inputs, key=jax.random.key(0))
        return linear_losses.token_entropy(cfg, params, out, where=batch.where)

    found = [
        compiled(functools.partial(entropy, form), params)(params) for form in ("logits", "xla")
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert (found[0][batch.where] > 4).all()
    assert not found[0][~batch.where].any()


@pytest.mark.parametrize(
    ("tied", "sizes"),
    [
        (False, {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}),
        (True, {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}),
        (True, {"data": 8}),  # four rows stay whole
    ],
)
def test_one_device_and_eight_agree_without_logits(tied: bool, sizes: dict[str, Any]):
    cfg = dataclasses.replace(PLAIN, tie_embeddings=tied, loss_implementation="xla")
    params, batch = params_of(cfg), make_batch()
    loss = functools.partial(next_token.make_loss(cfg), step=jnp.int32(0), key=jax.random.key(1))
    slope = jax.value_and_grad(loss, has_aux=True)
    one = jax.device_get(compiled(slope, params, (), batch)(params, (), batch))
    mesh = partitioning.make_mesh(**sizes)
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(lambda: language_model.init_params(cfg, jax.random.key(0)))
        placed = partitioning.batch_spec() if "fsdp" in sizes else PartitionSpec()
        params = jax.device_put(params, partitioning.param_shardings(boxed, mesh))
        batch = jax.device_put(batch, NamedSharding(mesh, placed))
        program = compiled(slope, params, (), batch)
        eight = jax.device_get(program(params, (), batch))
    assert_close(eight, one)
    # Of the vocabulary each device gathers its own half of 384 rows.
    assert bool(re.search(r"= f32\[192,16\]\S* all-gather", program.as_text())) == ("fsdp" in sizes)


def test_no_array_of_tokens_times_vocabulary():
    cfg = dataclasses.replace(PLAIN, vocab_size=4096)
    batch, params = make_batch(cfg), params_of(cfg)
    largest = {}
    for form in ("logits", "xla"):
        loss = next_token.make_loss(dataclasses.replace(cfg, loss_implementation=form))
        call = functools.partial(loss, step=jnp.int32(0), key=jax.random.key(1))
        program = compiled(jax.grad(call, has_aux=True), params, (), batch)
        shapes = re.findall(rf"f32\[([\d,]*\b{L}\b[\d,]*)\]", program.as_text())
        sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
        largest[form] = max(sizes)
    assert largest["logits"] == B * L * 4096
    assert largest["xla"] <= B * L * 128


def test_auto_says_once_what_it_chose_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    dispatch.log_once.cache_clear()
    monkeypatch.setattr(linear_losses, "NO_SLOWER", {"cpu": (384, 16)})
    wide = dataclasses.replace(PLAIN, embed_dim=32)
    small = dataclasses.replace(PLAIN, vocab_size=200)
    with caplog.at_level(logging.INFO):
        makes = [linear_losses._makes_logits(cfg) for cfg in (PLAIN, PLAIN, wide, small)]
        with dispatch.lowering_for("tpu"):
            makes.append(linear_losses._makes_logits(PLAIN))
    assert makes == [False, False, True, True, True]
    said = [record.message for record in caplog.records]
    assert len(said) == 4
    assert "runs as tiles" in said[0]
    assert "no slower on cpu from a vocabulary of 384 and up to a width of 16" in said[1]
    assert "no slower on tpu nowhere" in said[3]


def test_a_kernel_that_does_not_run_here_is_refused():
    kernels = dataclasses.replace(PLAIN, loss_implementation="pallas")
    with pytest.raises(ValueError, match="pallas was asked for, but no kernel is written for cpu"):
        jax.eval_shape(lambda: run(next_token.make_loss(kernels), params_of(PLAIN)))
