"""FLOPs of recurrent-depth models: by hand, and counted in the program of a training step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlib_methods import flops, next_token
from jaxlib_methods.method import Batch, Context, Method
from jaxlib_methods.models import partitioning, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.recurrent_training import forward, mean_steps

BATCH_SIZE, LENGTH = 3, 16
TOKENS = BATCH_SIZE * LENGTH
TINY = TransformerConfig(
    vocab_size=200,  # 256 padded
    num_layers=4,  # one, two in the core, one
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=12,
    max_length=32,
    block="sandwich",
    recurrence=8,
    compute_dtype="float32",
)


def test_by_hand():
    # A block: 480 weights (see test_flops.py) and 4 * 8 features * 16 keys of attention.
    block, head = 2 * 480 + 4 * 8 * 16, 2 * 8 * 256
    assert flops.iteration_flops(TINY, 16) == 2 * 16 * 8 + 2 * block
    for injection in ("add", "gate", "none"):
        free = dataclasses.replace(TINY, injection=injection)
        assert flops.iteration_flops(free, 16) == 2 * block
    iteration = flops.iteration_flops(TINY, 16)
    forward = functools.partial(flops.recurrent_forward_flops, TINY, 16)
    assert forward(num_steps=5) == 2 * block + head + 5 * iteration
    assert forward(num_steps=5, head=False) == 2 * block + 5 * iteration
    bare = dataclasses.replace(TINY, num_layers=2, prelude_layers=0, coda_layers=0)
    assert flops.recurrent_forward_flops(bare, 16, num_steps=5) == head + 5 * iteration
    train = flops.recurrent_train_flops(TINY, 16, forward_only=6, trained=2)
    assert train == 3 * (2 * block + head + 2 * iteration) + 6 * iteration
    # Causal: 8.5 keys on average.
    saved = 4 * 8 * 7.5
    assert iteration - flops.iteration_flops(TINY, 16, attention="causal") == 2 * saved
    less = flops.recurrent_train_flops(TINY, 16, forward_only=6, trained=2, attention="causal")
    assert train - less == (3 * (2 + 2 * 2) + 6 * 2) * saved


def counted(cfg: TransformerConfig, *, num_steps: int, trained: int, gradient: bool = True) -> int:
    init = functools.partial(recurrent_depth.init_params, cfg)
    params = partitioning.unbox(jax.eval_shape(init, jax.random.key(0)))
    tokens = jnp.ones((BATCH_SIZE, LENGTH), jnp.int32)

    def loss(params: Any) -> jax.Array:
        steps: Any = {"num_steps": num_steps, "trained_steps": trained}
        out = forward(cfg, params, tokens, key=jax.random.key(0), **steps)
        return jax.nn.log_softmax(out.logits)[..., 0].sum()

    return flops.count_dot_flops(jax.grad(loss) if gradient else loss, params)


VARIANTS = {
    "sandwich": TINY,
    "add_post_norm": dataclasses.replace(
        TINY, injection="add", block="post_norm", mlp="gelu", tie_embeddings=True, qk_bias=True
    ),
    "gate_alone": dataclasses.replace(
        TINY, injection="gate", block="pre_norm", prelude_layers=0, coda_layers=0, num_layers=1
    ),
    "none": dataclasses.replace(TINY, injection="none", prelude_layers=2, head_dim=6),
}


# Without injection, iterations without gradient cut the prelude off: none here.
@pytest.mark.parametrize(
    ("name", "free", "trained"),
    [
        ("sandwich", 0, 1),
        ("sandwich", 0, 4),
        ("sandwich", 56, 8),
        ("add_post_norm", 5, 3),
        ("gate_alone", 5, 3),
        ("none", 0, 3),
    ],
)
def test_a_training_step_has_the_analytic_flops(name, free, trained):
    cfg = VARIANTS[name]
    count = counted(cfg, num_steps=free + trained, trained=trained)
    want = flops.recurrent_train_flops(cfg, LENGTH, forward_only=free, trained=trained)
    assert count == TOKENS * want


def test_a_forward_pass_has_the_analytic_flops():
    count = counted(TINY, num_steps=7, trained=2, gradient=False)
    assert count == TOKENS * flops.recurrent_forward_flops(TINY, LENGTH, num_steps=7)


def no_teacher(source: str, **options: Any) -> Any:
    raise AssertionError(f"{source} {options}")


def make_method() -> Method:
    context = Context(
        model=TINY,
        num_steps=9,
        sequence_length=LENGTH,
        batch_size=1,
        tokenizer="bytes",
        load_pretrained=no_teacher,
    )
    return next_token.make(next_token.NextTokenConfig(), context)


def test_a_recurrent_model_is_charged_its_expected_iterations():
    free, trained = mean_steps(TINY)
    want = flops.recurrent_train_flops(TINY, LENGTH, forward_only=free, trained=trained)
    assert flops.train_flops(TINY, LENGTH) == want
    assert flops.forward_flops(TINY, LENGTH) == flops.recurrent_forward_flops(
        TINY, LENGTH, num_steps=8
    )
    plain = dataclasses.replace(TINY, recurrence=0)
    assert flops.train_flops(plain, LENGTH) == flops.transformer_train_flops(plain, LENGTH)
    assert flops.forward_flops(plain, LENGTH) == flops.transformer_forward_flops(plain, LENGTH)
    assert flops.late_to_early_flops(TINY, plain, LENGTH) == (
        want + flops.transformer_forward_flops(plain, LENGTH)
    )
    assert make_method().flops_per_token == want


def test_evaluation_takes_the_usual_number_of_iterations_and_one():
    method = make_method()
    params = partitioning.unbox(jax.eval_shape(method.init_params, jax.random.key(0)))
    tokens = jnp.ones((BATCH_SIZE, LENGTH), jnp.int32)
    batch = Batch(tokens, tokens, tokens, tokens, where=tokens > 0)
    assert method.evaluate is not None
    evaluate = functools.partial(method.evaluate, step=jnp.int32(0), key=jax.random.key(0))
    count = flops.count_dot_flops(evaluate, params, (), batch)
    once = flops.recurrent_forward_flops(TINY, LENGTH, num_steps=1)  # for what depth gains
    assert count == TOKENS * (flops.forward_flops(TINY, LENGTH) + once)
