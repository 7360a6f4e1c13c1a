"""What a preset is, and what the tiny ones share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlib_methods import registry
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

COMMAND = "python -m jaxlib_methods.train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A run and what it promises.

    needs: flags that the user must add. shapes: flags that replace those under `--compile_only`,
    published shapes instead of files. pods: TPU topology -> further flags with which the step
    was compiled for it and fits (`--compile_only`). hardware, time: where it runs and for how long;
    `computed` means 6 FLOPs per parameter and token at 40 % of the bfloat16 peak (for depth
    recurrence and reinforcement mid-training their analytic FLOPs; for energy, which is trained in
    float32, those at 40 % of TF32's), not a measurement.
    """

    config: RunConfig
    hardware: str
    time: str
    result: str
    needs: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    pods: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def command(self) -> str:
        """The whole command line."""
        return " ".join([COMMAND, f"--preset={self.config.preset}", *self.needs])


def tiny(
    method: str, model: TransformerConfig, *, num_steps: int = 500, **method_fields: Any
) -> RunConfig:
    """A run on the embedded text: bytes, 8 x 128 tokens a step, two CPU cores."""
    return RunConfig(
        method=method,
        model=model,
        data=DataConfig(sequence_length=128, batch_size=8),
        train=TrainConfig(num_steps=num_steps, eval_every=50, eval_batches=32),
        optimizer=OptimizerConfig(learning_rate=4e-3),  # the best of 2e-3, 4e-3 and 8e-3
        method_config=registry.config_class(method)(**method_fields),
    )
