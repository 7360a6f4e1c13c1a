"""Validation loss of a finished model, in nats per token and bits per byte."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxlib_methods import losses
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.method import Batch
from jaxlib_methods.models import partitioning
from jaxlib_methods.train import data
from jaxlib_methods.train.config import DataConfig


class Evaluation(NamedTuple):
    """nats_per_token: mean over the targets of the validation set, of which there are
    `num_tokens`. bits_per_byte: nats per token / (ln 2 * bytes per token), which compares models
    with different tokenizers."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int


def data_config(restored: Restored, overrides: dict[str, Any]) -> DataConfig:
    """The run's data with some fields replaced; for a Hugging Face folder, the defaults'."""
    if restored.config is not None:
        base = restored.config.data
    else:
        length = min(DataConfig().sequence_length, restored.model.max_length)
        base = DataConfig(sequence_length=length)
    return dataclasses.replace(base, **overrides)


def open_validation(restored: Restored, cfg: DataConfig) -> data.TextDataset:
    """The validation split. Raises ValueError where a sequence exceeds the model's context."""
    if cfg.sequence_length > restored.model.max_length:
        raise ValueError(
            f"data.sequence_length={cfg.sequence_length} is longer than the model's context of "
            f"{restored.model.max_length}; give at most that"
        )
    return data.open_dataset(cfg, restored.tokenizer, split="validation")


def evaluate(restored: Restored, cfg: DataConfig, *, max_batches: int | None = None) -> Evaluation:
    """The next-token loss over the validation split, all of it or `max_batches` spread over it.

    Raises ValueError where a sequence is longer than the model's context.
    """
    if restored.thinker is not None:
        restored.thinker.check_memory(cfg.batch_size * cfg.sequence_length)
    dataset = open_validation(restored, cfg)
    model = restored.language_model

    @jax.jit
    def sums(params: object, batch: Batch) -> tuple[jax.Array, jax.Array]:
        out = model(params, batch.inputs, positions=batch.positions, segments=batch.segments)
        nll = losses.token_nll(out.logits, batch.targets, where=batch.where)
        return losses.masked_sum(nll, where=batch.where)

    with jax.set_mesh(restored.mesh):
        waiting, totals = [], np.zeros(2)
        for batch in batches(dataset, cfg.batch_size, max_batches, restored):
            waiting.append(sums(restored.params, batch))
            if len(waiting) > 1:  # one behind: reading a sum waits for it, and its batch is freed
                totals += jax.device_get(waiting.pop(0))
        total, count = totals + jax.device_get(waiting.pop())
    nats = float(total / count)
    assert dataset.bytes_per_token is not None  # it is text
    return Evaluation(nats, nats / (math.log(2) * dataset.bytes_per_token), int(count))


def batches(
    dataset: data.TextDataset, batch_size: int, max_batches: int | None, restored: Restored
) -> Iterable[Batch]:
    """Global batches of a validation set: `max_batches` spread over it, or (None) all of it."""
    mesh, spec = restored.mesh, partitioning.batch_spec()
    if max_batches is not None:
        return data.validation_batches(
            dataset, batch_size=batch_size, max_batches=max_batches, mesh=mesh, spec=spec
        )
    data.check_divisible(batch_size, dataset.sequence_length, mesh=mesh, spec=spec)

    def one_by_one() -> Iterator[Batch]:  # the whole set need not fit into device memory
        for begin in range(0, dataset.num_examples, batch_size):
            yield data.put_rows(dataset, begin + np.arange(batch_size), mesh=mesh, spec=spec)

    return one_by_one()


def run(config: InferConfig, restored: Restored) -> None:
    """Evaluates what the flags ask for; prints it, and writes JSON where `output` is given."""
    result = evaluate(restored, data_config(restored, config.data), max_batches=config.eval_batches)
    where = config.workdir if restored.step is None else f"{config.workdir}, step {restored.step}"
    print(
        f"{where}: {result.nats_per_token:.4f} nats per token, {result.bits_per_byte:.4f} bits per "
        f"byte, over {result.num_tokens:,} tokens of validation text"
    )
    if config.output:
        values = {"workdir": config.workdir, "step": restored.step, **result._asdict()}
        epath.Path(config.output).expanduser().write_text(json.dumps(values) + "\n")
