"""What is not used costs nothing: hidden taps, the teacher after its stop step, axes of size 1."""

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlib_methods import flops, late_to_early, next_token
from jaxlib_methods.method import Batch, Context, Method, Pretrained
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import forward, init_params
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train.config import OptimizerConfig
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.step import loss_and_gradients, make_train_step

B, L, NUM_STEPS = 4, 64, 10
MODEL = TransformerConfig(
    vocab_size=256,
    num_layers=2,
    embed_dim=64,
    num_heads=2,
    mlp_dim=96,
    max_length=L,
    compute_dtype="float32",
)
TEACHER = dataclasses.replace(MODEL, num_layers=1, embed_dim=32)
STREAM = B * L * MODEL.embed_dim * 4  # bytes of one residual stream
SCALAR, KEY = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))


def abstract_batch(rows: int = B) -> Batch:
    tokens, where = (jax.ShapeDtypeStruct((rows, L), dtype) for dtype in (jnp.int32, jnp.bool_))
    return Batch(tokens, tokens, tokens, tokens, where)  # pyright: ignore[reportArgumentType]


def abstract_params(cfg: TransformerConfig) -> Any:
    return partitioning.unbox(jax.eval_shape(lambda key: init_params(cfg, key), KEY))


def let_method(**values: Any) -> Method:
    def load_pretrained(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        del source, dtype
        return Pretrained(TEACHER, abstract_params(TEACHER) if weights else None, None)

    cfg = late_to_early.LateToEarlyConfig(teacher="teacher", stop_step=5, **values)
    return late_to_early.make(cfg, context(load_pretrained))


def context(load_pretrained: Any = None) -> Context:
    return Context(
        model=MODEL,
        num_steps=NUM_STEPS,
        sequence_length=L,
        batch_size=4,
        tokenizer="bytes",
        load_pretrained=load_pretrained,
    )


def plain_method() -> Method:
    return next_token.make(next_token.NextTokenConfig(), context())


def lowered(method: Method, extra: Any, mesh: Any = None) -> Any:
    """The lowered train step of a method."""
    cfg = OptimizerConfig()
    optimizer, schedule = make_optimizer(cfg, NUM_STEPS), make_schedule(cfg, NUM_STEPS)
    mesh = mesh or one_device()
    abstract = train_state.abstract_state(method, optimizer, mesh)
    step: Any = make_train_step(method.loss, optimizer, schedule, abstract)
    return step.lower(abstract, extra, abstract_batch(), KEY)


def one_device() -> jax.sharding.Mesh:
    return partitioning.make_mesh(data=1, devices=jax.devices()[:1])


# The teacher after the stop step.


@pytest.mark.parametrize("objective", ["alignment", "salt"])
def test_after_the_stop_step_the_program_is_the_plain_one(objective: str):
    method = let_method(objective=objective)
    assert (method.until, method.then.until) == (5, None)  # pyright: ignore[reportOptionalMemberAccess]
    assert method.then is not None
    assert method.then.init(jax.random.key(0)) == ()
    extra = jax.eval_shape(method.init, KEY)
    plain = lowered(plain_method(), ()).as_text()
    assert lowered(method.then, ()).as_text() == plain
    assert lowered(method, extra).as_text() != plain


def test_a_learned_resize_costs_nothing_after_the_stop_step():
    # Its kernel stays in the state, and no matmul reads it.
    method = let_method(resize="learned_linear")
    assert method.then is not None
    plain, after = lowered(plain_method(), ()), lowered(method.then, ())
    dots = [text.count("dot_general") for text in (plain.as_text(), after.as_text())]
    assert dots[0] == dots[1] > 0
    assert method.then.flops_per_token == plain_method().flops_per_token


# Axes of size 1.


def test_axes_of_size_one_cost_nothing():
    method = plain_method()

    def gradients(params: Any, batch: Batch, step: jax.Array, key: jax.Array) -> Any:
        return loss_and_gradients(method.loss, params, (), batch, step=step, key=key)

    arguments = abstract_params(MODEL), abstract_batch(), SCALAR, KEY
    bare = jax.jit(gradients).lower(*arguments).compile()
    with jax.set_mesh(one_device()):
        meshed = jax.jit(gradients).lower(*arguments).compile()
    texts = [program.as_text() or "" for program in (bare, meshed)]
    counts = [collections.Counter(re.findall(r"\} ([a-z][a-z-]*)\(", text)) for text in texts]
    assert counts[0] == counts[1]
    assert counts[0]["dot"] > 10
    assert not re.search(r"all-(gather|reduce|to-all)|reduce-scatter|collective", texts[1])
    sizes = [program.memory_analysis() for program in (bare, meshed)]
    assert sizes[0].temp_size_in_bytes == sizes[1].temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]


# Hidden taps.


def temporary_bytes(cfg: TransformerConfig, hidden_layer: Any, *, use: bool) -> int:
    """Of the gradient of a loss of the logits and, with `use`, of the hidden state."""

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        out = forward(cfg, params, tokens, hidden_layer=hidden_layer)
        total = jnp.sum(out.logits[..., 0] ** 2)
        return total + jnp.sum(out.hidden**2) if use and out.hidden is not None else total

    tokens = jax.ShapeDtypeStruct((B, L), jnp.int32)
    program = jax.jit(jax.grad(loss)).lower(abstract_params(cfg), tokens).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_hidden_tap_costs_two_streams_whatever_the_depth(remat: Any):
    costs = []
    for num_layers in (4, 12):
        cfg = dataclasses.replace(MODEL, num_layers=num_layers, remat=remat)
        plain = temporary_bytes(cfg, None, use=False)
        costs.append(temporary_bytes(cfg, 1, use=True) - plain)
        assert plain > num_layers * STREAM  # what a tap that keeps every layer would add
    assert max(costs) <= 2.1 * STREAM
    assert abs(costs[1] - costs[0]) <= 0.1 * STREAM


def test_a_tap_that_nobody_reads_costs_nothing():
    cost = temporary_bytes(MODEL, 1, use=False) - temporary_bytes(MODEL, None, use=False)
    assert abs(cost) <= 0.1 * STREAM


def test_flops_of_a_step_do_not_depend_on_micro_batches():
    method = plain_method()

    def gradients(parts: int) -> Any:
        def function(params: Any, batch: Batch, step: jax.Array, key: jax.Array) -> Any:
            return loss_and_gradients(
                method.loss, params, (), batch, step=step, key=key, num_microbatches=parts
            )

        return function

    arguments = abstract_params(MODEL), abstract_batch(), SCALAR, KEY
    counted = [flops.count_dot_flops(gradients(parts), *arguments) for parts in (1, 2, 4)]
    assert counted[0] == counted[1] == counted[2]
    assert counted[0] == pytest.approx(method.flops_per_token * B * L, rel=0.01)
