"""The one table of methods: name -> (configuration, maker, and what differs from the usual)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlib_methods import (
    depth_recurrence,
    diffusion_image,
    energy,
    energy_image,
    late_to_early,
    next_token,
    reinforcement_midtraining,
)
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.method import Context, Method
from jaxlib_methods.models import language_model
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig


class Baseline(NamedTuple):
    """What a method is compared with: a method, its model and its configuration."""

    method: str
    model: TransformerConfig
    config: Any


class Entry(NamedTuple):
    """A method of the table.

    config: its configuration, a frozen dataclass. make: builds it for a run. baseline: the method
    that `--compare` trains beside it on the same model, or (model, config) -> a `Baseline`.
    init_model: (model, config, key) -> the boxed parameters
    that inference needs; None: those of the language model that `model` describes. reads_text:
    configuration -> whether the run's examples are the text of `data.source`.
    """

    config: type
    make: Callable[[Any, Context], Method]
    baseline: str | Callable[[TransformerConfig, Any], Baseline] = "next_token"
    init_model: Callable[[TransformerConfig, Any, jax.Array], Any] | None = None
    reads_text: Callable[[Any], bool] = lambda config: True


def _without_recurrence(model: TransformerConfig, config: Any) -> Baseline:
    """The same parameters, each block once: the paper's non-recurrent twin (2502.05171).

    Of questions, a block for each step.
    """
    if config.task == "language":
        once = {"recurrence": 1, "recurrence_sampling": "fixed", "backprop_steps": None}
        twin = dataclasses.replace(model, **once)
        return Baseline("next_token", twin, next_token.NextTokenConfig())
    return Baseline("depth_recurrence", model, config.untied())


def _without_reasoning(model: TransformerConfig, config: Any) -> Baseline:
    """Next tokens alone, on the same data for as many steps."""
    return Baseline("reinforcement_midtraining", model, dataclasses.replace(config, rl_weight=0.0))


METHODS: dict[str, Entry] = {
    "next_token": Entry(next_token.NextTokenConfig, next_token.make),
    "late_to_early": Entry(late_to_early.LateToEarlyConfig, late_to_early.make),
    "depth_recurrence": Entry(
        DepthRecurrenceConfig,
        depth_recurrence.make,
        baseline=_without_recurrence,
        init_model=depth_recurrence.init_params,
        reads_text=lambda config: config.task == "language",
    ),
    "reinforcement_midtraining": Entry(
        ReinforcementMidtrainingConfig,
        reinforcement_midtraining.make,
        baseline=_without_reasoning,
        reads_text=lambda config: config.task != "parity",
    ),
    "energy": Entry(energy.EnergyConfig, energy.make, init_model=energy.init_params),
    "energy_image": Entry(
        energy_image.EnergyImageConfig,
        energy_image.make,
        baseline="diffusion_image",
        init_model=energy_image.init_params,
        reads_text=lambda config: False,
    ),
    "diffusion_image": Entry(
        diffusion_image.DiffusionImageConfig,
        diffusion_image.make,
        baseline="diffusion_image",
        init_model=diffusion_image.init_params,
        reads_text=lambda config: False,
    ),
}


def entry(name: str) -> Entry:
    """A method of the table. Raises ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {sorted(METHODS)}")
    return METHODS[name]


def baseline(name: str, model: TransformerConfig, config: Any) -> Baseline:
    """The baseline of a method on a model.

    Fields of the method's configuration that the baseline's has too keep their values.
    """
    found = entry(name).baseline
    if not isinstance(found, str):
        return found(model, config)
    fields = {field.name for field in dataclasses.fields(config_class(found))}
    mine = {field.name for field in dataclasses.fields(config)}
    shared = {field: getattr(config, field) for field in mine & fields}
    return Baseline(found, model, config_class(found)(**shared))


def config_class(name: str) -> type:
    """The configuration dataclass of a method. Raises ValueError for an unknown name."""
    return entry(name).config


def build(name: str, config: Any, context: Context) -> Method:
    """Makes the method `name` for a run. Raises ValueError for an unknown name."""
    return entry(name).make(config, context)


def init_model(name: str, model: TransformerConfig, config: Any, key: jax.Array) -> Any:
    """Boxed parameters of the model that the method `name` trains, without the method's own."""
    init = entry(name).init_model
    return language_model.init_params(model, key) if init is None else init(model, config, key)
