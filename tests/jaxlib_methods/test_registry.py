"""The table of methods, and a new method in ten lines."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlib_methods import energy, late_to_early, next_token, registry
from jaxlib_methods.method import Batch, Context, Method
from jaxlib_methods.models.config import TransformerConfig


def no_teacher(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
    raise AssertionError(f"read {source}")


CONTEXT = Context(
    model=TransformerConfig(vocab_size=5, num_layers=1, embed_dim=4, num_heads=1),
    num_steps=3,
    sequence_length=7,
    batch_size=4,
    tokenizer="bytes",
    load_pretrained=no_teacher,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A table of log-probabilities of the next token, nothing else."""

    scale: float = 1.0


def make_toy(cfg: ToyConfig, context: Context) -> Method:
    size = context.model.vocab_size

    def loss(params: Any, extra: Any, batch: Batch, *, step: Any, key: Any) -> Any:
        log_probs = jax.nn.log_softmax(cfg.scale * params[batch.inputs])
        nll = -jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1).sum()
        count = jnp.float32(batch.targets.size)
        return nll / count, {"loss": (nll, count)}

    return Method(
        init_params=lambda key: jnp.zeros((size, size)),
        init=lambda key: (),
        loss=loss,
        flops_per_token=0.0,
    )


def test_a_new_method_is_one_line_in_the_table(monkeypatch):
    monkeypatch.setitem(registry.METHODS, "toy", registry.Entry(ToyConfig, make_toy))
    assert registry.config_class("toy") is ToyConfig
    method = registry.build("toy", ToyConfig(scale=2.0), CONTEXT)
    tokens = jnp.array([[0, 1, 2]])
    batch = Batch(tokens, tokens, tokens, jnp.ones_like(tokens), tokens >= 0)
    params = method.init_params(jax.random.key(0))
    step: dict[str, Any] = {"step": jnp.int32(0), "key": jax.random.key(0)}
    scalar, metrics = method.loss(params, method.init(jax.random.key(0)), batch, **step)
    assert float(scalar) == pytest.approx(float(jnp.log(5.0)))
    assert float(metrics["loss"][1]) == 3.0


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("next_token", next_token.NextTokenConfig),
        ("late_to_early", late_to_early.LateToEarlyConfig),
    ],
)
def test_methods(name, config):
    assert registry.config_class(name) is config
    changes = {"weight": 0.0} if name == "late_to_early" else {}
    method = registry.build(name, config(**changes), CONTEXT)
    boxed = jax.eval_shape(method.init_params, jax.random.key(0))
    assert set(boxed) == {"embedding", "blocks", "final_norm", "head"}
    assert method.flops_per_token > 0


def test_energy_trains_another_model_whose_parameters_are_all_needed():
    config = registry.config_class("energy")()
    assert type(config) is energy.EnergyConfig
    method = registry.build("energy", config, CONTEXT)
    found, of_model = (
        jax.eval_shape(init, jax.random.key(0))
        for init in (
            method.init_params,
            lambda key: registry.init_model("energy", CONTEXT.model, config, key),
        )
    )
    assert jax.tree.structure(found) == jax.tree.structure(of_model)
    assert set(found) == {
        "embedding", "candidate_embedding", "landscapes", "blocks", "final_norm", "energy_head",
        "step_size", "step_unit",
    }  # fmt: skip
    assert method.flops_per_token > 0
    assert registry.baseline("energy", CONTEXT.model, config).method == "next_token"


def test_the_model_of_other_methods_is_the_transformer():
    found = jax.eval_shape(
        lambda key: registry.init_model("late_to_early", CONTEXT.model, None, key),
        jax.random.key(0),
    )
    assert set(found) == {"embedding", "blocks", "final_norm", "head"}


def test_every_configuration_is_frozen_keyword_only_and_has_defaults():
    for config in (entry.config for entry in registry.METHODS.values()):
        assert dataclasses.is_dataclass(config)
        config()
        assert config.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
        assert all(field.kw_only for field in dataclasses.fields(config))


@pytest.mark.parametrize("call", [registry.config_class, lambda n: registry.build(n, 0, CONTEXT)])
def test_an_unknown_method_is_refused_with_the_known_ones(call):
    known = r"choose one of \[.*'late_to_early', 'next_token'.*\]"
    with pytest.raises(ValueError, match=f"unknown method 'lte'; {known}"):
        call("lte")
