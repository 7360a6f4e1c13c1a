"""A run without its files: shapes, dtypes and shardings of all that its programs take."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxlib_methods.method import Batch, Dataset, Method, Pretrained, TieredBatch
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import PUBLISHED
from jaxlib_methods.train import checkpoint, data
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.prepare import (
    build_method,
    folders_before,
    place,
    plan,
    train_step_of,
)
from jaxlib_methods.train.step import EvalStep, TrainStep, make_eval_step
from jaxlib_methods.train.tokenizer import load_tokenizer


class Program(NamedTuple):
    """A run's programs and their arguments: `step` and `evaluate` of `(*arguments)`.

    arguments: state, extra, batch, key; trees of `jax.ShapeDtypeStruct`. length: targets of an
    example.
    """

    method: Method
    step: TrainStep
    evaluate: EvalStep
    arguments: tuple[Any, Any, Any, Any]
    length: int


def program_of(config: RunConfig, mesh: Mesh) -> Program:
    """The programs of a run's first step on a mesh, as `train.loop` makes them.

    Nothing is read but a finished model's configuration and a tokenizer, where they are given: a
    teacher may be a name of `models.config.PUBLISHED`, an empty `data.tokenizer` stands for
    bytes, and `data.source` for text. Raises ValueError where the run does not fit the mesh.
    """
    tokenizer = load_tokenizer(config.data.tokenizer or "bytes")
    planned = folders_before(config, plan(dataclasses.replace(config, compare=False)))

    def load_pretrained(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        if source in planned:
            run = planned[source]
            checkpoint.require_language_model(run, source)
            params = checkpoint.abstract_run_params(run, mesh) if weights else None
            return Pretrained(run.model, _cast(params, dtype), tokenizer.fingerprint)
        if source in PUBLISHED and not epath.Path(source).exists():
            model, fingerprint = PUBLISHED[source], None
        else:
            found = checkpoint.load_pretrained(source, weights=False)
            model, fingerprint = found.config, found.tokenizer
        params = checkpoint.abstract_params(model, mesh) if weights else None
        return Pretrained(model, _cast(params, dtype), fingerprint)

    def open_tiers(path: str, cut: Callable[[np.ndarray], Sequence[float]]) -> Any:
        del path, cut
        return lambda split: _Text(config.data.sequence_length, TieredBatch)

    method = build_method(config, tokenizer, load_pretrained, open_tiers)
    text = _Text(config.data.sequence_length, Batch)
    dataset = text if method.dataset is None else method.dataset("train")
    placed = place(config, method, dataset, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    extra = method.init(jax.random.key(0))  # what it loads is abstract here, and it makes nothing
    batch = _abstract_batch(dataset, config.data.batch_size, mesh)
    step = train_step_of(config, method, placed)
    arguments = (placed.abstract, extra, batch, key)
    evaluate = make_eval_step(method, num_microbatches=config.train.num_microbatches)
    return Program(method, step, evaluate, arguments, dataset.sequence_length)


class _Text:
    """Rows of text that has not been read: empty ones, for their shape."""

    num_examples, fingerprint = 1, ""
    bytes_per_token: float | None = None

    def __init__(self, sequence_length: int, kind: type[Batch] | type[TieredBatch]) -> None:
        self.sequence_length, self._kind = sequence_length, kind

    def rows(self, indices: Sequence[int] | np.ndarray) -> Any:
        shape = (len(indices), self.sequence_length)
        dtypes = {"where": np.bool_, "tier": np.int8}
        fields = self._kind._fields
        rows: Any = (np.zeros(shape, dtypes.get(name, np.int32)) for name in fields)
        return self._kind(*rows)


def _abstract_batch(dataset: Dataset, batch_size: int, mesh: Mesh) -> Any:
    """What `data.put_rows` gives."""
    row, spec = dataset.rows([0]), partitioning.batch_spec()

    def field(one: np.ndarray) -> jax.ShapeDtypeStruct:
        cut = data.field_spec(one, spec, length=dataset.sequence_length)
        return jax.ShapeDtypeStruct(
            (batch_size, *one.shape[1:]),
            jax.dtypes.canonicalize_dtype(one.dtype),
            sharding=jax.NamedSharding(mesh, cut),
        )

    return type(row)(*(field(np.asarray(one)) for one in row))


def _cast(params: Any, dtype: str | None) -> Any:
    return jax.tree.map(
        lambda leaf: leaf if dtype is None else leaf.update(dtype=jnp.dtype(dtype)), params
    )
