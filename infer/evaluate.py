"""Validation loss of a finished model, in nats per token and bits per byte."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import depth_language, linear_losses, losses
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.infer import report
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import LanguageModel, Restored, Trunk
from jaxlib_methods.method import Batch, Dataset
from jaxlib_methods.models import partitioning
from jaxlib_methods.train import data
from jaxlib_methods.train.config import DataConfig


class Evaluation(NamedTuple):
    """nats_per_token: mean over the targets of the validation set, of which there are
    `num_tokens`. bits_per_byte: nats per token / (ln 2 * bytes per token), which compares models
    with different tokenizers. iterations: mean number that a token took; None without depth."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int
    iterations: float | None = None


def data_config(restored: Restored, overrides: dict[str, Any]) -> DataConfig:
    """The run's data with some fields replaced; for a Hugging Face folder, the defaults'."""
    if restored.config is not None:
        base = restored.config.data
    else:
        length = min(DataConfig().sequence_length, restored.model.max_length)
        base = DataConfig(sequence_length=length)
    return dataclasses.replace(base, **overrides)


def check_length(restored: Restored, cfg: DataConfig) -> None:
    """Raises ValueError where a sequence exceeds the model's context."""
    if cfg.sequence_length > restored.model.max_length:
        raise ValueError(
            f"data.sequence_length={cfg.sequence_length} is longer than the model's context of "
            f"{restored.model.max_length}; give at most that"
        )


def open_validation(restored: Restored, cfg: DataConfig) -> data.TextDataset:
    """The validation split. Raises ValueError where a sequence exceeds the model's context."""
    check_length(restored, cfg)
    return data.open_dataset(cfg, restored.tokenizer, split="validation")


def evaluate(restored: Restored, cfg: DataConfig, *, max_batches: int | None = None) -> Evaluation:
    """The next-token loss over the validation split, all of it or `max_batches` spread over it.

    A recurrent model thinks as its `depth` says, early exits included. Raises ValueError where a
    sequence is longer than the model's context.
    """
    if restored.thinker is not None:
        restored.thinker.check_memory(cfg.batch_size * cfg.sequence_length)
    dataset = open_validation(restored, cfg)
    model = restored.language_model

    with jax.set_mesh(restored.mesh):
        waiting, totals = [], np.zeros(3)
        for batch in batches(dataset, cfg.batch_size, max_batches, restored):
            waiting.append(_sums(model, restored.params, batch))
            if len(waiting) > 1:  # one behind: reading a sum waits for it, and its batch is freed
                totals += jax.device_get(waiting.pop(0))
        total, count, taken = totals + jax.device_get(waiting.pop())
    nats = float(total / count)
    assert dataset.bytes_per_token is not None  # it is text
    bits = nats / (math.log(2) * dataset.bytes_per_token)
    recurrent = isinstance(model, RecurrentModel)
    return Evaluation(nats, bits, int(count), float(taken / count) if recurrent else None)


@jax.jit
def _sums(model: LanguageModel, params: Any, batch: Batch) -> tuple[jax.Array, ...]:
    """The loss, its targets and the iterations, over a batch."""
    nll, steps = _predict(model, params, batch)
    taken, _ = losses.masked_sum(steps, where=batch.where)
    return *losses.masked_sum(nll, where=batch.where), taken


def _predict(model: LanguageModel, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss, and how many iterations each token took, `[B, L]`; 0 without depth."""
    labels, where = batch.targets, batch.where
    arguments: dict[str, Any] = {"positions": batch.positions, "segments": batch.segments}
    if isinstance(model, RecurrentModel):
        thought = depth_language.think_steps(model, params, batch.inputs, **arguments)
        nll = losses.token_nll(thought.logits, labels, where=where)
        return nll, thought.steps_used.astype(jnp.float32)
    out = model(params, batch.inputs, **arguments)
    if isinstance(model, Trunk):
        nll = linear_losses.token_nll(model.model, params, out, labels, where=where)
    else:
        nll = losses.token_nll(out.logits, labels, where=where)
    return nll, jnp.zeros(labels.shape)


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


def question_batches(
    dataset: Dataset, restored: Restored, max_batches: int | None
) -> Iterable[Any]:
    """Batches of the size of training, or as many more rows as these devices need to share them.

    Raises ValueError where the mesh does not divide a question.
    """
    assert restored.config is not None
    sizes = restored.mesh.shape
    if dataset.sequence_length % sizes["sequence"]:
        raise ValueError(
            f"mesh.sequence={sizes['sequence']} does not divide the {dataset.sequence_length} "
            "tokens of this run's questions; give --mesh.sequence=1, and another axis instead"
        )
    parts = sizes["data"] * sizes["fsdp"]
    batch_size = -(-restored.config.data.batch_size // parts) * parts
    return data.validation_batches(
        dataset,
        batch_size=batch_size,
        max_batches=max_batches or -(-dataset.num_examples // batch_size),
        mesh=restored.mesh,
        spec=partitioning.batch_spec(),
    )


def sentence(name: str, result: Evaluation) -> str:
    """The result for a reader."""
    thinking = "" if result.iterations is None else f", {result.iterations:.2f} iterations"
    return (
        f"{name}: {result.nats_per_token:.4f} nats per token, {result.bits_per_byte:.4f} bits per "
        f"byte{thinking}, over {result.num_tokens:,} tokens of validation text"
    )


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError or FileNotFoundError where there is no such text for the model."""
    cfg = data_config(restored, config.data)
    check_length(restored, cfg)
    data.check_sources(cfg)


def run(config: InferConfig, restored: Restored) -> None:
    """Evaluates what the flags ask for; prints it, and writes JSON where `output` is given."""
    result = evaluate(restored, data_config(restored, config.data), max_batches=config.eval_batches)
    print(sentence(report.name(config, restored), result))
    report.write(config, restored, result._asdict())
