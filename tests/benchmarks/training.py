"""Our training step as a candidate, for the scripts that time training."""

from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from shapes import PRESET

from jaxlib_methods.method import Batch, Context, LoadPretrained, Method
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train.config import OptimizerConfig
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.state import abstract_state, create_state
from jaxlib_methods.train.step import make_train_step

BATCH_SIZE = flags.DEFINE_integer("batch_size", PRESET.data.batch_size, "Sequences a step.")
LENGTH = flags.DEFINE_integer("sequence_length", PRESET.data.sequence_length, "Tokens of each.")

NUM_STEPS = PRESET.train.num_steps
# AdamW and clipping as in a run; without warm-up, so that the first losses move.
OPTIMIZER = OptimizerConfig(warmup_fraction=0.0)
CHECKED_STEPS = 3
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # nats, over the checked steps
MOVED = 1e-2  # nats; a loss that stands still would agree with anything


def _no_pretrained(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
    raise ValueError(f"plain training reads no pretrained model, asked for {source}")


def context(model: TransformerConfig, load_pretrained: LoadPretrained = _no_pretrained) -> Context:
    """What a method is built with."""
    return Context(
        model=model,
        num_steps=NUM_STEPS,
        sequence_length=model.max_length,
        batch_size=1,
        tokenizer="bytes",
        load_pretrained=load_pretrained,
    )


class OurStep:
    """The whole step of a run on one device: every call trains once more on the same batch."""

    def __init__(self, method: Method, batch: Batch) -> None:
        self._mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        optimizer = make_optimizer(OPTIMIZER, NUM_STEPS, rate_factors=method.rate_factors)
        abstract = abstract_state(method, optimizer, self._mesh)
        self._key = jax.random.key(1)
        placed = NamedSharding(self._mesh, partitioning.batch_spec())
        self._batch = jax.device_put(batch, placed)
        with jax.set_mesh(self._mesh):
            self.state = create_state(method, optimizer, abstract, jax.random.key(0))
            self._extra = method.init(self._key)
            schedule = make_schedule(OPTIMIZER, NUM_STEPS)
            self._step: Any = make_train_step(
                method.loss, optimizer, schedule, abstract, collect=method.collect
            )

    def __call__(self) -> Any:
        with jax.set_mesh(self._mesh):
            self.state, metrics = self._step(self.state, self._extra, self._batch, self._key)
        return self.state, metrics

    def temporaries(self) -> float:
        """MiB that the compiled step needs beside its arguments and results; once, before a call.

        It is compiled for this, and what is compiled here is what calls run.
        """
        with jax.set_mesh(self._mesh):
            arguments = self.state, self._extra, self._batch, self._key
            self._step = self._step.lower(*arguments).compile()
        return self._step.memory_analysis().temp_size_in_bytes / 2**20

    def loss(self) -> float:
        """Trains once. Returns the loss before it, nats per token."""
        total, count = self()[1]["loss"]
        return float(total / count)


def check_losses(ours: list[float], theirs: list[float], *, tolerance: float) -> None:
    """Raises AssertionError where two trainings differ, or did not train."""
    difference = np.abs(np.subtract(ours, theirs)).max()
    assert difference <= tolerance, f"losses {ours} and {theirs} differ by {difference:.2g}"
    assert abs(ours[0] - ours[-1]) > MOVED, f"losses {ours} do not move"
    print(f"losses of {len(ours)} steps agree to {difference:.1e}: {ours}")
