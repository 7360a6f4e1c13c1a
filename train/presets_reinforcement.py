"""Presets of reinforcement mid-training, and of what its runs begin with."""

from typing import Any

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from jaxlib_methods.train.preset import Preset

_SMALL = TransformerConfig(
    num_layers=2, embed_dim=64, num_heads=4, max_length=96, compute_dtype="float32"
)
# The method files' toy: 8 bits, thoughts of up to 16 tokens that are ended for the model.
_PARITY: dict[str, Any] = {
    "task": "parity",
    "max_thought": 16,
    "budget": 16,
    "budget_decay": 0.5,
    "force_close": True,
    "temperature": 1.0,
}
_TEXT: dict[str, Any] = {
    "max_thought": 10,
    "budget": 8,
    "budget_decay": 0.4,
    "force_close": True,
    "temperature": 1.0,
    "prompt_length": 32,
}


def _run(
    fields: dict[str, Any],
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
    start: str | None,
    **optimizer: Any,
) -> RunConfig:
    return RunConfig(
        method="reinforcement_midtraining",
        model=_SMALL,
        data=DataConfig(sequence_length=64, batch_size=batch_size),
        train=TrainConfig(num_steps=num_steps, eval_every=num_steps // 5, eval_batches=8),
        optimizer=OptimizerConfig(learning_rate=learning_rate, **optimizer),
        checkpoint=CheckpointConfig(init_from=start),
        method_config=ReinforcementMidtrainingConfig(**fields),
    )


def _policy(fields: dict[str, Any], start: str, **run: Any) -> RunConfig:
    """A policy's run: constant rate, no decay of weights."""
    flat: dict[str, Any] = {"schedule": "constant", "beta2": 0.999, "weight_decay": 0.0}
    return _run(fields, start=f"preset:{start}", **flat, **run)


_RLP: dict[str, Any] = {
    "positions": "uniform",
    "reward": "information_gain",
    "advantage": "leave_one_out",
    "length_weight": 0.0,
    "ntp_weight": 0.0,
    "ema_decay": 0.99,
}

PRESETS: dict[str, Preset] = {
    "reinforcement_midtraining_tiny": Preset(
        config=_policy(
            _TEXT, "reinforcement_midtraining_tiny_warm_up",
            num_steps=120, learning_rate=3e-4, batch_size=16,
        ),
        hardware="2 CPU cores",
        time="4 min with the two runs that it begins with",
        result="thoughts shrink with the budget, 9 tokens to 3; at this size they cost accuracy",
    ),
    "reinforcement_midtraining_tiny_warm_up": Preset(
        config=_run(
            _TEXT | {"policy": "taught", "positions": "uniform", "ntp_weight": 1.0},
            num_steps=300, learning_rate=2e-3, batch_size=32,
            start="preset:reinforcement_midtraining_tiny_base",
        ),
        hardware="2 CPU cores",
        time="1 min behind its base",
        result="a model that ends its thoughts",
    ),
    "reinforcement_midtraining_tiny_base": Preset(
        config=RunConfig(
            method="next_token",
            model=_SMALL,
            data=DataConfig(sequence_length=64, batch_size=32),
            train=TrainConfig(num_steps=1000, eval_every=200, eval_batches=8),
            optimizer=OptimizerConfig(learning_rate=4e-3),
        ),
        hardware="2 CPU cores",
        time="2 min",
        result="1.47 nats per byte",
    ),
    "reinforcement_midtraining_parity": Preset(
        config=_policy(
            _PARITY, "reinforcement_midtraining_parity_warm_up",
            num_steps=150, learning_rate=5e-4, batch_size=16,
        ),
        hardware="2 CPU cores",
        time="1 min behind its warm-up",
        result="parity of 8 bits: accuracy 0.76 to 0.98, thoughts follow the budget, 14 to 9",
    ),
    "reinforcement_midtraining_parity_rlp": Preset(
        config=_policy(
            _PARITY | _RLP, "reinforcement_midtraining_parity_warm_up",
            num_steps=200, learning_rate=1e-4, batch_size=16,
        ),
        hardware="2 CPU cores",
        time="1 min behind its warm-up",
        result="parity of 8 bits: nats that a thought brings 0.24 to 0.68, of at most 0.69",
    ),
    "reinforcement_midtraining_parity_warm_up": Preset(
        config=_run(
            _PARITY | {"policy": "taught"},
            num_steps=1000, learning_rate=1e-3, batch_size=64, start=None,
        ),
        hardware="2 CPU cores",
        time="2 min",
        result="a model that thinks about parity, half of the time to the point",
    ),
}  # fmt: skip
