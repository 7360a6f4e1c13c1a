import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxlib_methods.method import Batch
from jaxlib_methods.train.config import DataConfig
from jaxlib_methods.train.data import (
    TextDataset,
    check_divisible,
    device_batches,
    open_dataset,
    pack,
    rows_on,
    validation_batches,
)
from jaxlib_methods.train.token_cache import TokenStream
from jaxlib_methods.train.tokenizer import ByteTokenizer

SPEC = jax.P(("data", "fsdp"), "sequence")
AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(*sizes: int) -> Mesh:
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)


def make_stream(lengths: list[int], first: int = 1) -> TokenStream:
    """Documents of counted tokens first, first + 1, ... behind separators 0."""
    tokens, starts = [], []
    for length in lengths:
        starts.append(len(tokens))
        tokens += [0, *range(first, first + length)]
        first += length
    array = np.array([*tokens, 0], np.uint16)
    return TokenStream(array, np.array(starts, np.int64), sum(lengths), f"{lengths}{first}")


def make_dataset(order: str = "shuffled", length: int = 4, **options: Any) -> TextDataset:
    options = {"streams": [make_stream([3, 5, 1, 40])], "order": order, **options}
    return TextDataset(sequence_length=length, **options)


def assert_same(a: Batch, b: Batch) -> None:
    for name in Batch._fields:
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=name)


def map_fields(function: Callable[..., Any], *batches: Batch) -> Batch:
    return Batch(*map(function, *batches))


def test_pack_by_hand() -> None:
    # Documents "abc" and "de": | . a b c . | d e . with the separator written as a dot.
    tokens = np.array([0, 97, 98, 99, 0, 100, 101, 0], np.uint8)
    got = pack(tokens, np.array([0, 4]), np.array([0, 5, 2]), length=5)
    expected = {
        "inputs": [[0, 97, 98, 99, 0], [100, 101, 0, 0, 0], [98, 99, 0, 100, 101]],
        "targets": [[97, 98, 99, 0, 100], [101, 0, 0, 0, 0], [99, 0, 100, 101, 0]],
        "positions": [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0], [0, 1, 0, 1, 2]],
        "segments": [[1, 1, 1, 1, 2], [1, 1, 0, 0, 0], [1, 1, 2, 2, 2]],
        "where": [[True] * 5, [True, True, False, False, False], [True] * 5],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(got, name), values, err_msg=name)
        dtype = np.bool_ if name == "where" else np.int32
        assert getattr(got, name).dtype == dtype


def test_documents_are_told_apart_by_place_not_by_token() -> None:
    # A text may hold the separator's id (a tokenizer that emits it): no new document begins.
    got = pack(np.array([7, 7, 7, 7, 7]), np.array([0, 3]), np.array([0]), length=4)
    assert got.segments.tolist() == [[1, 1, 1, 2]]
    assert got.positions.tolist() == [[0, 1, 2, 0]]


def test_an_epoch_has_every_target_once() -> None:
    dataset = make_dataset()
    assert dataset.num_examples == 14  # 53 targets by 4
    first, second = (dataset.rows(range(start, start + 14)) for start in (0, 14))
    stream = make_stream([3, 5, 1, 40])
    for epoch in (first, second):
        assert sorted(epoch.targets[epoch.where]) == sorted(stream.tokens[1:])
    assert first.inputs.tolist() != second.inputs.tolist()
    assert first.inputs.tolist() != make_dataset("sequential").rows(range(14)).inputs.tolist()


def test_order_depends_on_the_seed() -> None:
    same, other = make_dataset(seed=0), make_dataset(seed=1)
    assert_same(make_dataset().rows(range(14)), same.rows(range(14)))
    assert same.rows(range(14)).inputs.tolist() != other.rows(range(14)).inputs.tolist()


def test_rows_are_a_pure_function_of_their_indices() -> None:
    dataset = make_dataset()
    whole = dataset.rows(range(40))
    for indices in ([39, 0, 17], [17], range(20, 30)):
        expected = map_fields(lambda field, at=list(indices): field[at], whole)
        assert_same(dataset.rows(indices), expected)


def test_sequential_order_ends_in_padding() -> None:
    batch = make_dataset("sequential").rows([13, 14, 1000])
    assert batch.where.tolist() == [[True, False, False, False], [False] * 4, [False] * 4]
    assert not batch.segments[~batch.where].any()


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 0.0)])
def test_mixture_keeps_its_weights_exactly(weights: tuple[float, float]) -> None:
    # 1000 and 4000 examples of 4; grain shuffles very small sets slowly.
    streams = [make_stream([3999]), make_stream([15999], first=5000)]
    dataset = make_dataset(streams=streams, weights=weights)
    for start in (0, 400, 40000):
        batch = dataset.rows(range(start, start + 400))
        from_first = (batch.targets.max(axis=1) < 5000).sum()
        assert from_first == 400 * weights[0] / sum(weights)


def test_mixture_of_the_configuration(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text((name * 9 + "\n") * 400)
    cfg = DataConfig(
        source=f"{tmp_path}/a.txt, {tmp_path}/b.txt", weights=(1.0, 4.0), sequence_length=10
    )
    train = open_dataset(cfg, ByteTokenizer(), split="train").rows(range(100))
    assert (train.inputs == ord("a")).any(axis=1).sum() == 20
    # Validation takes every token of both, whatever the weights.
    validation = open_dataset(cfg, ByteTokenizer(), split="validation").rows(range(100))
    assert (validation.inputs == ord("a")).sum() == (validation.inputs == ord("b")).sum() == 180


def test_mixture_without_weights_goes_by_size() -> None:
    streams = [make_stream([10]), make_stream([2000], first=2000)]
    dataset = make_dataset(streams=streams)
    assert dataset.num_examples == 3 + 501
    batch = dataset.rows(range(dataset.num_examples))
    everything = np.concatenate([stream.tokens[1:] for stream in streams])
    assert sorted(batch.targets[batch.where]) == sorted(everything)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} é" * (1 + i % 3))
    return tmp_path


def documents_of(dataset: TextDataset, num_rows: int) -> set[bytes]:
    batch = dataset.rows(range(num_rows))
    inputs, where = np.asarray(batch.inputs), np.asarray(batch.where)
    return {bytes(piece) for piece in bytes(inputs[where].astype(np.uint8)).split(b"\0")}


def test_training_and_validation_share_no_document(folder: Path) -> None:
    # One long window, in order, so that documents come out whole.
    cfg = DataConfig(source=str(folder), sequence_length=10**4, validation_fraction=0.3)
    train, validation = (
        documents_of(open_dataset(cfg, ByteTokenizer(), split=split), 1) - {b""}
        for split in ("train", "validation")
    )
    assert len(validation) > 5
    assert not train & validation
    assert len(train | validation) == 60


def test_validation_has_every_token_once_and_counts_bytes(folder: Path) -> None:
    cfg = DataConfig(source=str(folder), sequence_length=7, validation_fraction=0.3)
    dataset = open_dataset(cfg, ByteTokenizer(), split="validation")
    batches = validation_batches(
        dataset, batch_size=8, max_batches=1000, mesh=make_mesh(1, 1, 1, 1), spec=SPEC
    )
    targets = np.concatenate([np.asarray(b.targets)[np.asarray(b.where)] for b in batches])
    texts = open_dataset(
        dataclasses.replace(cfg, sequence_length=10**4), ByteTokenizer(), split="validation"
    ).rows([0])
    np.testing.assert_array_equal(targets, texts.targets[texts.where])
    separators = (targets == 0).sum()
    assert separators > 5
    assert dataset.bytes_per_token == (len(targets) - separators) / len(targets)


def test_few_validation_batches_are_spread_over_the_set() -> None:
    dataset = make_dataset("sequential")  # 14 examples
    batches = validation_batches(
        dataset, batch_size=2, max_batches=2, mesh=make_mesh(1, 1, 1, 1), spec=SPEC
    )
    assert len(batches) == 2
    got = np.concatenate([np.asarray(batch.inputs) for batch in batches])
    np.testing.assert_array_equal(got, dataset.rows([0, 3, 7, 10]).inputs)


def test_validation_source_is_taken_whole(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "held_out.txt"
    other.write_text("held out")
    cfg = DataConfig(source=str(folder), validation_source=str(other), sequence_length=10**4)
    validation = open_dataset(cfg, ByteTokenizer(), split="validation")
    assert documents_of(validation, 1) == {b"", b"held out"}
    train = open_dataset(cfg, ByteTokenizer(), split="train")
    assert len(documents_of(train, 1) - {b""}) == 60

    cfg = dataclasses.replace(cfg, validation_source=str(folder / "07.txt"))
    with pytest.raises(ValueError, match=r"07.txt is in data.source and in data.validation_source"):
        open_dataset(cfg, ByteTokenizer(), split="validation")


def test_stdlib_needs_no_setting() -> None:
    train, validation = (
        open_dataset(DataConfig(), ByteTokenizer(), split=split)
        for split in ("train", "validation")
    )
    assert train.num_examples > 10 * validation.num_examples > 1000
    assert train.fingerprint != validation.fingerprint
    assert train.rows(range(2)).inputs.shape == (2, 256)


@contextlib.contextmanager
def stepping(dataset: TextDataset, mesh: Mesh, start_step: int = 0) -> Iterator[Iterator[Batch]]:
    batches = device_batches(
        dataset, batch_size=8, mesh=mesh, spec=SPEC, start_step=start_step, num_threads=2
    )
    with contextlib.closing(batches):
        yield batches


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 4, 1), (2, 1, 1, 4)])
def test_sharded_batches_equal_the_rows(sizes: tuple[int, ...]) -> None:
    dataset, mesh = make_dataset(), make_mesh(*sizes)
    with stepping(dataset, mesh) as batches:
        for step in range(3):
            batch = next(batches)
            assert batch.inputs.sharding == NamedSharding(mesh, SPEC)
            assert_same(batch, dataset.rows(range(8 * step, 8 * step + 8)))


def test_position_is_the_step() -> None:
    dataset = make_dataset()
    with stepping(dataset, make_mesh(2, 2, 1, 2)) as batches:
        from_zero = [next(batches) for _ in range(6)]
    with stepping(dataset, make_mesh(1, 8, 1, 1), start_step=4) as batches:
        assert_same(next(batches), from_zero[4])
        assert_same(next(batches), from_zero[5])


def test_rows_of_two_hosts_make_the_whole() -> None:
    dataset, mesh = make_dataset(), make_mesh(2, 2, 1, 2)
    sharding, whole = NamedSharding(mesh, SPEC), dataset.rows(range(8))
    devices = mesh.devices.ravel()
    hosts = [rows_on(half, sharding, (8, 4)) for half in (devices[:4], devices[4:])]
    assert [rows.tolist() for rows in hosts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    parts = [dataset.rows(rows) for rows in hosts]
    assert_same(map_fields(lambda a, b: np.concatenate([a, b]), *parts), whole)
    # Hosts that share rows, as when a sequence is spread over both.
    assert rows_on(devices[1::2], sharding, (8, 4)).tolist() == list(range(8))
    # Rows that are not next to each other.
    assert rows_on(devices[[0, 4]], sharding, (8, 4)).tolist() == [0, 1, 4, 5]


TWO_PROCESSES = """
import contextlib, sys
import jax, numpy as np
from jaxlib_methods.train import config, data, tokenizer

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
cfg = config.DataConfig(source=sys.argv[3], sequence_length=16)
dataset = data.open_dataset(cfg, tokenizer.load_tokenizer("bytes"), split="train")
whole, rows, built = dataset.rows(range(40, 48)), dataset.rows, []
dataset.rows = lambda indices: built.append(len(indices)) or rows(indices)
for sizes in ((2, 1, 1, 2), (1, 1, 1, 4)):
    mesh = jax.make_mesh(
        sizes, ("data", "fsdp", "tensor", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 4
    )
    spec = jax.P(("data", "fsdp"), "sequence")
    steps = data.device_batches(
        dataset, batch_size=8, mesh=mesh, spec=spec, start_step=5, num_threads=1
    )
    with contextlib.closing(steps):
        batch = next(steps)
    for got, expected in zip(batch, whole):
        assert len(got.addressable_shards) == 2
        for shard in got.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
    print("built", built[0])
    built.clear()
"""


def test_two_processes_build_what_they_hold(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(process), str(folder)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for output in outputs:  # half of the rows, then half of every row
        lines = [line for line in output.splitlines() if line.startswith("built")]
        assert lines == ["built 4", "built 8"]


def test_closing_ends_the_threads_and_an_error_reaches_the_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def data_threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("data_")]

    dataset, mesh = make_dataset(), make_mesh(1, 1, 1, 1)
    with stepping(dataset, mesh) as batches:
        next(batches)
        assert data_threads()
    assert not data_threads()
    with stepping(dataset, mesh) as batches:
        monkeypatch.setattr(dataset, "rows", lambda indices: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(batches)
    assert not data_threads()


def test_sizes_that_the_mesh_cannot_cut_are_refused() -> None:
    dataset = make_dataset(length=6)
    options = {"mesh": make_mesh(2, 1, 1, 4), "spec": SPEC}
    with pytest.raises(ValueError, match=r"data.sequence_length=6 is not a multiple of 4.*try 4"):
        device_batches(dataset, batch_size=8, **options)
    with pytest.raises(ValueError, match=r"data.batch_size=7 .* of 2, .* data x fsdp; try 6"):
        validation_batches(dataset, batch_size=7, max_batches=1, **options)


def test_a_method_may_need_a_multiple_of_rows_on_each_device():
    sizes: dict[str, Any] = {"mesh": make_mesh(4, 2, 1, 1), "spec": SPEC, "num_microbatches": 2}
    check_divisible(64, 6, rows_multiple=2, **sizes)
    with pytest.raises(ValueError, match=r"=24 is not a multiple of 16.*times 2 that .*; try 16"):
        check_divisible(48, 6, rows_multiple=2, **sizes)
    check_divisible(48, 6, **sizes)
