"""FLOPs of energy-based training and thinking: the formulas against the matmuls of the jaxpr."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlib_methods import energy, energy_flops, energy_text, flops
from jaxlib_methods.descent import descend_freely
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.method import Batch, Context, Method
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig

# Blocks, attention and vocabulary have a like share, so that each one's factor matters.
TRUNK = TransformerConfig(
    vocab_size=100,
    num_layers=2,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=40,
    compute_dtype="float32",
)
B, L = 3, 20
ONES = jnp.ones((B, L), jnp.int32)
BATCH = Batch(ONES, ONES, ONES, ONES, ONES > 0)
SYSTEM_2 = EnergyConfig(
    num_steps=3, loss_steps="last", num_landscapes=0, learn_step_size=False, noise=3.0,
    random_step_size=2.0,
)  # fmt: skip
TRAINED = {
    "system_1": EnergyConfig(),
    "system_1_fixed_step": EnergyConfig(learn_step_size=False),
    "system_1_logits": EnergyConfig(space="logit", candidate_embedding="token"),
    "system_2": SYSTEM_2,
    "system_2_learned_step": dataclasses.replace(SYSTEM_2, learn_step_size=True),
    "chained": EnergyConfig(gradient="all_steps", num_steps=3),
    "chained_fixed_step": EnergyConfig(gradient="all_steps", num_steps=3, learn_step_size=False),
    "chained_one_step": EnergyConfig(gradient="all_steps", num_steps=1, num_landscapes=1),
    "saved": EnergyConfig(memory="save"),
    "saved_chained": EnergyConfig(memory="save", gradient="all_steps", num_steps=3),
}


def no_teacher(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
    raise AssertionError((source, weights, dtype))


def build(cfg: EnergyConfig, *, rows: int = B) -> Method:
    context = Context(
        model=TRUNK,
        num_steps=1,
        sequence_length=L,
        batch_size=rows,
        tokenizer="bytes",
        load_pretrained=no_teacher,
    )
    return energy.make(cfg, context)


def abstract_params(cfg: EnergyConfig) -> Any:
    return jax.eval_shape(
        lambda: partitioning.unbox(energy.init_params(TRUNK, cfg, jax.random.key(0)))
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_has_the_analytic_flops(name):
    cfg = TRAINED[name]
    method = build(cfg)

    def loss(params: Any) -> Any:
        return method.loss(params, (), BATCH, step=jnp.int32(0), key=jax.random.key(1))

    counted = flops.count_dot_flops(jax.value_and_grad(loss, has_aux=True), abstract_params(cfg))
    # What remains is the energy head.
    assert counted / (B * L) == pytest.approx(method.flops_per_token, rel=2e-3)


@pytest.mark.parametrize(("num_steps", "num_candidates"), [(1, 1), (5, 3)])
def test_thinking_has_the_analytic_flops(num_steps, num_candidates):
    cfg = EnergyConfig()
    model = energy.model_config(TRUNK, cfg)

    def think(params: Any) -> Any:
        context = energy_text.observe(model, params, BATCH)
        descent = energy_text.Descent(cfg, model, 0.0, jax.random.key(0))
        function, last = descent.energy(), jnp.int32(num_steps - 1)

        def one(initial: jax.Array) -> jax.Array:
            final = descend_freely(
                function, params, context, initial, step_size=2.0, num_steps=num_steps,
                start=descent.start, context_at=descent.context_at,
            )  # fmt: skip
            return function(params, descent.context_at(context, last), descent.start(final, last))

        shape = (num_candidates, *energy_text.candidate_shape(BATCH, model))
        return jax.lax.map(one, jax.random.normal(jax.random.key(1), shape))

    counted = flops.count_dot_flops(think, abstract_params(cfg))
    want = energy_flops.think_flops(
        model, L, num_steps=num_steps, num_candidates=num_candidates
    )  # fmt: skip
    assert counted / (B * L) == pytest.approx(want, rel=2e-3)


def test_a_pass_by_hand():
    # A layer: query and output 24 * 24 each, key and value 24 * 12 each, three of 24 * 40; the
    # vocabulary is padded to 128. 21 keys, each met by 24 query features and 24 of its value.
    layer = 2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40
    model = energy.model_config(TRUNK, EnergyConfig())
    assert energy_flops.candidate_pass(model, 21) == (
        2 * 2 * layer,
        2 * 2 * 2 * 24 * 21,
        2 * 128 * 24,
    )
    # Two landscapes, a token more than the sequence has, nothing of the vocabulary.
    assert energy_flops.observe_flops(model, 20) == pytest.approx(
        2 * 21 / 20 * (4 * layer + 8 * 24 * 21)
    )


def test_replay_and_a_drawn_number_of_steps_count_their_mean():
    two, three = (build(dataclasses.replace(SYSTEM_2, num_steps=n)).flops_per_token for n in (2, 3))
    drawn = dataclasses.replace(SYSTEM_2, num_steps=2, max_steps=3)
    assert build(drawn).flops_per_token == pytest.approx((two + three) / 2)
    replayed = dataclasses.replace(SYSTEM_2, replay_size=8, replay_every=2)
    assert build(replayed, rows=4).flops_per_token == pytest.approx(1.5 * three)


def test_the_unit_of_the_step_size_has_no_gradient():
    # It is not trained: a gradient would only count in the clipped norm.
    params = {"step_size": {"value": jnp.float32(2.0)}, "step_unit": {"value": jnp.float32(3.0)}}
    alpha, slope = jax.value_and_grad(energy_text.step_size)(params)
    assert alpha == 6
    assert (slope["step_size"]["value"], slope["step_unit"]["value"]) == (3, 0)
