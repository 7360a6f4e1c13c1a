"""Counted and analytic FLOPs."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from jaxlib_methods import flops, late_to_early, next_token
from jaxlib_methods.method import Batch
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import init_params

X = jax.ShapeDtypeStruct((3, 5), jnp.float32)
W = jax.ShapeDtypeStruct((5, 7), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((5, 5), jnp.float32)
MATMUL = 2 * 3 * 5 * 7
STEP = 2 * 3 * 5 * 5
ONES = jnp.ones((5, 5))


def chain(w, x):
    def step(x, _):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(step, x, length=11)[0].sum()


def test_matmul_and_batched_matmul():
    assert flops.count_dot_flops(jnp.matmul, X, W) == MATMUL
    a = jax.ShapeDtypeStruct((2, 13, 3, 5), jnp.float32)
    b = jax.ShapeDtypeStruct((2, 13, 7, 5), jnp.float32)
    assert flops.count_dot_flops(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), a, b) == (
        2 * 13 * MATMUL
    )


def test_convolution():
    # 1 output image of 4 x 4 x 7 (valid, kernel 3 x 3 over 5 features): 2 * 16 * 7 * 9 * 5.
    image = jax.ShapeDtypeStruct((1, 5, 6, 6), jnp.float32)
    kernel = jax.ShapeDtypeStruct((7, 5, 3, 3), jnp.float32)

    def convolve(image, kernel):
        return jax.lax.conv(image, kernel, window_strides=(1, 1), padding="VALID")

    assert flops.count_dot_flops(convolve, image, kernel) == 2 * 16 * 7 * 9 * 5


def test_scan_counts_every_trip():
    assert flops.count_dot_flops(chain, SQUARE, X) == 11 * STEP


def test_gradient_of_a_scan_is_three_times_the_forward():
    gradient = jax.grad(chain, argnums=(0, 1))
    assert flops.count_dot_flops(gradient, SQUARE, X) == 3 * 11 * STEP


def test_remat_counts_the_second_forward():
    def two_layers(w, x):
        return jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))(w, x).sum()

    # Forward 2, backward 4, and both forward matmuls again: the last tanh needs the second.
    gradient = jax.value_and_grad(two_layers, argnums=(0, 1))
    assert flops.count_dot_flops(gradient, SQUARE, X) == (2 + 4 + 2) * STEP


def test_calls_are_walked_into():
    @jax.custom_vjp
    def matmul(x, w):
        return x @ w

    matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert flops.count_dot_flops(matmul, X, W) == MATMUL
    assert flops.count_dot_flops(jax.jit(jnp.matmul), X, W) == MATMUL
    assert flops.count_dot_flops(jax.jit(jax.checkpoint(jnp.matmul)), X, W) == MATMUL
    value_and_grad = jax.value_and_grad(lambda x, w: matmul(x, w).sum(), argnums=(0, 1))
    assert flops.count_dot_flops(value_and_grad, X, W) == 3 * MATMUL


def test_what_no_result_depends_on_is_not_counted():
    def step(carry, _):
        x, unused = carry
        return (jnp.tanh(x @ ONES), unused @ ONES), x @ ONES

    def scanned(x):  # of the three products of a trip, the stacked one and one carry are unused
        return jax.lax.scan(step, (x, x), length=11)[0][0]

    def of_x(x, w):  # the cotangent of w is a second product that nothing asks for
        product, pull_back = jax.vjp(jnp.matmul, x, w)
        return pull_back(product)[0]

    assert flops.count_dot_flops(of_x, X, W) == 2 * MATMUL
    assert flops.count_dot_flops(scanned, X) == 11 * STEP
    assert flops.count_dot_flops(jax.jit(scanned), X) == 11 * STEP


def test_conditional_counts_its_most_expensive_branch():
    def choose(x, w):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert flops.count_dot_flops(choose, X, SQUARE) == 2 * STEP


def test_while_loop_is_refused_only_with_a_matmul():
    def loop(body):
        return lambda w, x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: body(x, w), x)

    assert flops.count_dot_flops(loop(lambda x, w: x * w.sum()), SQUARE, X) == 0
    with pytest.raises(ValueError, match="while loop of unknown length"):
        flops.count_dot_flops(loop(jnp.matmul), SQUARE, X)


def test_shard_map_counts_all_devices():
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"), axis_types=axis_types)
    P = jax.P
    by_rows = {"mesh": mesh, "in_specs": (P("data"), P()), "out_specs": P("data")}
    x = jax.ShapeDtypeStruct((12, 5), jnp.float32)
    over_data = jax.shard_map(jnp.matmul, axis_names={"data"}, **by_rows)
    assert flops.count_dot_flops(over_data, x, W) == 2 * 12 * 5 * 7
    # The two devices along `tensor` both do the same product.
    assert flops.count_dot_flops(jax.shard_map(jnp.matmul, **by_rows), x, W) == 2 * 2 * 12 * 5 * 7


def test_pallas_kernel_counts_every_grid_point():
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    matmul = pl.pallas_call(
        kernel,
        grid=(6,),
        in_specs=[pl.BlockSpec((2, 5), lambda i: (i, 0)), pl.BlockSpec((5, 7), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((2, 7), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((12, 7), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((12, 5), jnp.float32)
    assert flops.count_dot_flops(matmul, x, W) == 2 * 12 * 5 * 7


TINY = TransformerConfig(
    vocab_size=200,
    num_layers=2,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=12,
    max_length=32,
)


def test_forward_by_hand():
    # A layer: query and output 8*8 each, key and value 8*4 each, three 8*12 matrices: 480 weights.
    # Head: 8*256 (200 padded to 256). Attention: 2 layers, 2 * 2 * 8 features * 16 keys.
    assert flops.transformer_forward_flops(TINY, 16) == 2 * (2 * 480 + 2048) + 2 * 4 * 8 * 16
    assert flops.transformer_forward_flops(TINY, 16, head=False) == 2 * 2 * 480 + 2 * 4 * 8 * 16
    causal = flops.transformer_forward_flops(TINY, 16, attention="causal")
    assert causal == 2 * (2 * 480 + 2048) + 2 * 4 * 8 * 8.5
    gelu = dataclasses.replace(TINY, mlp="gelu")  # two matrices: 384 weights
    assert flops.transformer_forward_flops(gelu, 16) == 2 * (2 * 384 + 2048) + 2 * 4 * 8 * 16


def test_late_to_early_adds_the_teachers_forward():
    teacher = dataclasses.replace(TINY, num_layers=1)
    assert flops.late_to_early_flops(TINY, teacher, 16) == (
        3 * flops.transformer_forward_flops(TINY, 16) + flops.transformer_forward_flops(teacher, 16)
    )


VARIANTS = {
    "swiglu_grouped": TINY,
    "tied_gelu": dataclasses.replace(TINY, tie_embeddings=True, mlp="gelu", num_kv_heads=None),
    "learned_positions": dataclasses.replace(
        TINY, positions="learned", norm="layer_norm", mlp="relu", mlp_bias=True, qkv_bias=True
    ),
    "wide_heads": dataclasses.replace(TINY, head_dim=6, qk_norm=True, parallel_residual=True),
}


LENGTH = 16
TOKENS = 3 * LENGTH


def abstract_params(cfg):
    return jax.eval_shape(lambda key: nn.unbox(init_params(cfg, key)), jax.random.key(0))


def counted(loss, params, extra, *, with_gradient):
    def call(params, extra, batch):
        return loss(params, extra, batch, step=jnp.int32(0), key=jax.random.key(0))

    tokens = jnp.ones((3, LENGTH), jnp.int32)
    batch = Batch(tokens, tokens, tokens, tokens, where=tokens > 0)
    fn = jax.value_and_grad(call, has_aux=True) if with_gradient else call
    return flops.count_dot_flops(fn, params, extra, batch)


@pytest.mark.parametrize("name", VARIANTS)
def test_next_token_step_has_the_analytic_flops(name):
    cfg = VARIANTS[name]
    loss, params = next_token.make_loss(cfg), abstract_params(cfg)
    forward = counted(loss, params, (), with_gradient=False)
    train = counted(loss, params, (), with_gradient=True)
    assert forward == TOKENS * flops.transformer_forward_flops(cfg, LENGTH)
    assert train == TOKENS * flops.transformer_train_flops(cfg, LENGTH)


@pytest.mark.parametrize("resize", ["teacher_to_student", "student_to_teacher"])
@pytest.mark.parametrize("objective", ["alignment", "salt"])
def test_late_to_early_step_has_the_analytic_flops(objective, resize):
    teacher = dataclasses.replace(TINY, num_layers=1, embed_dim=16, num_kv_heads=4, mlp="gelu")
    cfg = late_to_early.LateToEarlyConfig(teacher="t", objective=objective, resize=resize)
    loss = late_to_early.make_loss(cfg, TINY, teacher, stop=10)
    extra = {"teacher": abstract_params(teacher)}
    train = counted(loss, abstract_params(TINY), extra, with_gradient=True)
    assert train == TOKENS * flops.late_to_early_flops(TINY, teacher, LENGTH)


def test_remat_is_executed_but_not_model_flops():
    # Full remat runs the blocks forward once more, but for the last matmul, which nothing needs.
    cfg = dataclasses.replace(TINY, remat="full")
    train = counted(next_token.make_loss(cfg), abstract_params(cfg), (), with_gradient=True)
    blocks = TOKENS * flops.transformer_forward_flops(cfg, LENGTH, head=False)
    down = TOKENS * cfg.num_layers * 2 * cfg.embed_dim * cfg.mlp_size
    assert train == TOKENS * flops.transformer_train_flops(cfg, LENGTH) + blocks - down
