"""Token streams to batches. The whole position of the pipeline is one integer, the step.

    sources -> documents -> token streams -> examples -> batches of global arrays
       corpus.py          token_cache.py      (this file)

Example `i` of a stream is the window `tokens[i * L : i * L + L + 1]`, so that in one epoch every
token is a target once. Row `r` of step `s` is example `order[s * batch_size + r]`, whatever the
number of hosts.
"""

import collections
import hashlib
import itertools
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlib_methods.method import Batch, Dataset
from jaxlib_methods.train import corpus
from jaxlib_methods.train.config import DataConfig
from jaxlib_methods.train.token_cache import TokenStream, open_stream
from jaxlib_methods.train.tokenizer import Tokenizer


def pack(tokens: np.ndarray, starts: np.ndarray, begins: np.ndarray, *, length: int) -> Batch:
    """Windows of a token stream, `[R, length]`.

        inputs[r, t] = tokens[begins[r] + t]        targets[r, t] = tokens[begins[r] + t + 1]

    tokens: `[N]`. starts: sorted `[D]`, where documents begin. begins: `[R]`, where windows begin.
    A document cut by the window's start counts its positions from 0 there. Segments number the
    documents of a window from 1. Behind the stream's end `where` is False and segments are 0.
    """
    offsets = begins[:, None] + np.arange(length)
    where = offsets + 1 < len(tokens)
    document = np.searchsorted(starts, offsets, side="right")  # counted from 1
    begin_of_piece = np.maximum(starts[document - 1], begins[:, None])
    last = len(tokens) - 1
    return _batch(
        inputs=np.where(where, tokens[np.minimum(offsets, last)], 0).astype(np.int32),
        targets=np.where(where, tokens[np.minimum(offsets + 1, last)], 0).astype(np.int32),
        positions=np.where(where, offsets - begin_of_piece, 0).astype(np.int32),
        segments=np.where(where, document - document[:, :1] + 1, 0).astype(np.int32),
        where=where,
    )


def _batch(**fields: np.ndarray) -> Batch:
    """A batch of numpy arrays: it is typed by what it is once it has reached the devices."""
    return Batch(**cast(dict[str, jax.Array], fields))


class TextDataset:
    """Examples of one or several token streams, by global index.

    num_examples: of one epoch. bytes_per_token: UTF-8 bytes of the text per target token, so that
    bits per byte = nats per token / (ln 2 * bytes_per_token). fingerprint: hash of the corpus.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        *,
        sequence_length: int,
        order: Literal["shuffled", "sequential"],
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        """weights: of the streams in the shuffled order; None takes each example once an epoch."""
        self.sequence_length = sequence_length
        self._streams = tuple(streams)
        counts = [-(-stream.num_targets // sequence_length) for stream in streams]
        self._ends = np.cumsum(counts)
        self.num_examples = int(self._ends[-1])
        self.bytes_per_token: float | None = sum(stream.num_bytes for stream in streams) / sum(
            stream.num_targets for stream in streams
        )
        parts = "".join(stream.fingerprint for stream in streams)
        self.fingerprint = hashlib.sha256(parts.encode()).hexdigest()[:32]
        self._order = (
            _shuffled(self._ends, weights, seed)
            if order == "shuffled"
            else grain.MapDataset.range(self.num_examples)
        )

    def numbers(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which examples, counted in the order of the text, stand at `indices`; -1 for none."""
        limit = len(self._order)
        return np.array([self._order[int(i)] if i < limit else -1 for i in indices], np.int64)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples at `indices` as numpy arrays `[len(indices), L]`.

        The shuffled order is endless; behind the end of the sequential one rows are padding.
        """
        numbers = self.numbers(indices)
        shape = (len(numbers), self.sequence_length)
        fields = {name: np.zeros(shape, np.int32) for name in Batch._fields}
        fields["where"] = np.zeros(shape, bool)
        begin = 0
        for stream, end in zip(self._streams, self._ends, strict=True):
            chosen = (begin <= numbers) & (numbers < end)
            if chosen.any():
                begins = (numbers[chosen] - begin) * self.sequence_length
                part = pack(stream.tokens, stream.starts, begins, length=self.sequence_length)
                for name, values in part._asdict().items():
                    fields[name][chosen] = values
            begin = int(end)
        return _batch(**fields)


def _shuffled(ends: np.ndarray, weights: Sequence[float] | None, seed: int) -> grain.MapDataset:
    """Endless order of example numbers: shuffled anew each epoch, mixed by weight.

    grain rounds the weights to hundredths of the smallest one.
    """
    if weights is None:
        return grain.MapDataset.range(int(ends[-1])).seed(seed).shuffle().repeat()
    begins = [0, *ends[:-1].tolist()]
    parts = [
        (grain.MapDataset.range(begin, int(end)).seed(seed + i).shuffle().repeat(), weight)
        for i, (begin, end, weight) in enumerate(zip(begins, ends, weights, strict=True))
        if weight > 0  # grain refuses zero
    ]
    return grain.MapDataset.mix([part for part, _ in parts], [weight for _, weight in parts])


def open_dataset(
    cfg: DataConfig, tokenizer: Tokenizer, *, split: corpus.Split, in_order: bool = False
) -> TextDataset:
    """The training set (shuffled, endless) or the validation set (in order, each token once).

    in_order: the training set like the validation set.
    """
    source = cfg.source
    if split == "validation" and cfg.validation_source is not None:
        source = cfg.validation_source
        _check_disjoint(cfg)
    streams = [
        open_stream(
            name.strip(),
            tokenizer,
            split=split if cfg.validation_source is None else None,
            format=cfg.format,
            text_field=cfg.text_field,
            validation_fraction=cfg.validation_fraction,
            cache=cfg.cache,
            on_damaged=cfg.on_damaged,
        )
        for name in source.split(",")
    ]
    return TextDataset(
        streams,
        sequence_length=cfg.sequence_length,
        order="shuffled" if split == "train" and not in_order else "sequential",
        weights=cfg.weights if split == "train" else None,
        seed=cfg.shuffle_seed,
    )


def _files(sources: str, format: str) -> list[corpus.SourceFile]:
    found = [corpus.find_files(name.strip(), format=format) for name in sources.split(",")]
    return list(itertools.chain.from_iterable(found))


def check_sources(cfg: DataConfig) -> None:
    """Raises FileNotFoundError where a source has no files; opens none."""
    for sources in filter(None, (cfg.source, cfg.validation_source)):
        _files(sources, cfg.format)


def _check_disjoint(cfg: DataConfig) -> None:
    assert cfg.validation_source is not None
    train, validation = (
        {str(f.path) for f in _files(names, cfg.format)}
        for names in (cfg.source, cfg.validation_source)
    )
    if shared := sorted(train & validation):
        raise ValueError(
            f"{shared[0]} is in data.source and in data.validation_source; "
            "leave data.validation_source out to split the documents"
        )


def rows_on(devices: Iterable[Any], sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """The rows of a global array of which these devices hold a part, sorted."""
    held = sharding.devices_indices_map(shape)
    rows = np.arange(shape[0])
    return np.unique(np.concatenate([rows[held[device][0]] for device in devices]))


def field_spec(field: np.ndarray, spec: PartitionSpec, *, length: int) -> PartitionSpec:
    """Where a field of a batch is cut, given how tokens `[B, length]` are.

    The rows of any field; the second axis of token fields (integers and bools of it) alone.
    """
    tokens = field.ndim == 2 and field.dtype.kind in "iub" and field.shape[1] == length
    return spec if tokens else PartitionSpec(*spec[:1])


def put_rows(dataset: Dataset, indices: np.ndarray, *, mesh: Mesh, spec: PartitionSpec) -> Any:
    """The global batch of the examples at `indices`; a process builds only the rows it holds.

    spec: how token fields are cut. Returns the dataset's NamedTuple, of global arrays.
    """
    total = len(indices)
    by_rows = NamedSharding(mesh, PartitionSpec(*spec[:1]))
    local = rows_on(by_rows.addressable_devices, by_rows, (total,))
    built = dataset.rows(indices[local])

    def put(field: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:  # a slice per axis
            rows = np.searchsorted(local, np.arange(total)[index[0]])
            return field[rows][(slice(None), *index[1:])]

        sharding = NamedSharding(mesh, field_spec(field, spec, length=dataset.sequence_length))
        return jax.make_array_from_callback((total, *field.shape[1:]), sharding, shard)

    return type(built)(*(put(np.asarray(field)) for field in built))


def device_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    mesh: Mesh,
    spec: PartitionSpec,
    start_step: int = 0,
    num_threads: int = 2,
) -> Generator[Any, None, None]:
    """Batches of steps `start_step`, `start_step + 1`, ..., each made ahead by a thread.

    `start_step` is the whole position: it means the same data for the same `batch_size` on any
    mesh. `close()` ends the threads, as do `contextlib.closing` and the end of the last reference.
    """
    check_divisible(batch_size, dataset.sequence_length, mesh=mesh, spec=spec)
    steps = itertools.count(start_step)

    def batch(step: int) -> Any:
        indices = np.arange(step * batch_size, (step + 1) * batch_size)
        return put_rows(dataset, indices, mesh=mesh, spec=spec)

    def ahead() -> Generator[Any, None, None]:
        threads = ThreadPoolExecutor(num_threads, thread_name_prefix="data")
        try:
            waiting = collections.deque(
                threads.submit(batch, next(steps)) for _ in range(num_threads)
            )
            while True:
                ready = waiting.popleft().result()
                waiting.append(threads.submit(batch, next(steps)))
                yield ready
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    return ahead()


def check_divisible(
    batch_size: int,
    sequence_length: int,
    *,
    mesh: Mesh,
    spec: PartitionSpec,
    num_microbatches: int = 1,
    rows_multiple: int = 1,
    length_flag: str = "data.sequence_length",
) -> None:
    """Refuses sizes that the mesh cannot cut into equal parts.

    rows_multiple, length_flag: see `Method`; a device's rows must be a multiple of the first.
    """
    rows = "data.batch_size" + (" / train.num_microbatches" if num_microbatches > 1 else "")
    sizes = {rows: batch_size // num_microbatches, length_flag: sequence_length}
    multiples = (rows_multiple, 1)
    for (name, size), axes, each in zip(sizes.items(), spec, multiples, strict=False):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        cut = int(np.prod([mesh.shape[axis] for axis in names], dtype=np.int64))
        parts = cut * each
        if size % parts:
            shorter = name in (rows, "data.sequence_length")  # other examples must fit: longer
            near = max(parts, size // parts * parts) if shorter else -(-size // parts) * parts
            of_method = f", times {each} that the method needs on each device" if each > 1 else ""
            raise ValueError(
                f"{name}={size} is not a multiple of {parts}, the size of mesh axes "
                f"{' x '.join(names)}{of_method}; try {near}"
            )


def validation_batches(
    dataset: Dataset, *, batch_size: int, max_batches: int, mesh: Mesh, spec: PartitionSpec
) -> list[Any]:
    """At most `max_batches` batches of a sequential dataset, the last one padded with empty rows.

    Where they do not reach for the whole set, the examples taken are evenly spread over it.
    """
    check_divisible(batch_size, dataset.sequence_length, mesh=mesh, spec=spec)
    total = dataset.num_examples
    count = min(total, batch_size * max_batches)
    padded = -(-count // batch_size) * batch_size
    indices = np.concatenate(
        [np.arange(count) * total // count, np.full(padded - count, total, np.int64)]
    )
    return [
        put_rows(dataset, part, mesh=mesh, spec=spec) for part in indices.reshape(-1, batch_size)
    ]
