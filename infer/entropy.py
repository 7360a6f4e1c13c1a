"""How uncertain a model is of every token of a corpus, kept in a file for mid-training."""

import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxlib_methods import linear_losses, losses
from jaxlib_methods.infer import evaluate
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored, Trunk
from jaxlib_methods.method import Batch
from jaxlib_methods.models import partitioning
from jaxlib_methods.train import checkpoint, data, entropies

LINE_EVERY = 10.0  # seconds between lines of progress


@functools.partial(jax.jit, static_argnames="top_k")
def _entropy(model: Any, params: Any, batch: Batch, *, top_k: int | None) -> jax.Array:
    """Entropies `[B, L]` in nats, NaN on padding."""
    out = model(params, batch.inputs, positions=batch.positions, segments=batch.segments)
    if top_k is None and isinstance(model, Trunk):
        found = linear_losses.token_entropy(model.model, params, out, where=batch.where)
    else:
        found = losses.token_entropy(out.logits, top_k=top_k, where=batch.where)
    return jax.numpy.where(batch.where, found, jax.numpy.nan)


def measure(
    restored: Restored, dataset: data.TextDataset, *, batch_size: int, top_k: int | None, label: str
) -> Iterator[np.ndarray]:
    """Entropies of a sequential dataset's examples in order, float32 `[n, L]`."""
    mesh, spec, total = restored.mesh, partitioning.batch_spec(), dataset.num_examples
    data.check_divisible(batch_size, dataset.sequence_length, mesh=mesh, spec=spec)
    begun = said = time.perf_counter()
    waiting: list[jax.Array] = []
    with jax.set_mesh(mesh):
        for begin in range(0, total, batch_size):
            indices = begin + np.arange(batch_size)
            batch = data.put_rows(dataset, indices, mesh=mesh, spec=spec)
            waiting.append(_entropy(restored.language_model, restored.params, batch, top_k=top_k))
            if len(waiting) > 1:  # one behind
                yield np.asarray(waiting.pop(0))
            now = time.perf_counter()
            if now - said > LINE_EVERY:
                said, done = now, min(begin + batch_size, total)
                rate = done * dataset.sequence_length / (now - begun)
                print(
                    f"{label}: {done:,} of {total:,} examples, {rate:,.0f} tokens/s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    rest = total % batch_size or batch_size
    yield np.asarray(waiting.pop())[:rest]


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError or FileNotFoundError where there is no such text for the model."""
    evaluate.check(config, restored)


def run(config: InferConfig, restored: Restored) -> None:
    """Measures both splits and writes `output`."""
    assert config.output is not None
    cfg = evaluate.data_config(restored, config.data)
    parts = {
        split: data.open_dataset(cfg, restored.tokenizer, split=split, in_order=True)
        for split in ("train", "validation")
    }
    train, validation = parts.values()

    def rows() -> Iterator[np.ndarray]:
        for split, dataset in parts.items():
            yield from measure(
                restored, dataset, batch_size=cfg.batch_size, top_k=config.entropy_top_k,
                label=split,
            )  # fmt: skip

    provenance = entropies.Provenance(
        model=checkpoint.load_pretrained(config.workdir, weights=False).version,
        tokenizer=restored.tokenizer.fingerprint,
        train=train.fingerprint,
        validation=validation.fingerprint,
        sequence_length=cfg.sequence_length,
        num_train=train.num_examples,
        num_validation=validation.num_examples,
        top_k=config.entropy_top_k,
    )
    path = str(epath.Path(config.output).expanduser())
    entropies.write(path, provenance, rows())
    sample = entropies.Entropies(path).sample()
    known = sample[~np.isnan(sample)]
    cuts = ", ".join(f"{q:.0%} below {np.quantile(known, q):.3f}" for q in (0.5, 0.7, 0.85))
    print(
        f"{path}: {train.num_examples + validation.num_examples:,} examples; mean entropy "
        f"{known.mean():.3f} nats; {cuts}"
    )
