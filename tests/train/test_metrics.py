"""Accumulation, throughput and the metrics file."""

import io
import json
import math
import re
import sys

import jax.numpy as jnp
import pytest
from etils import epath

from jaxlib_methods.train import console, metrics, plots


def pair(total, count):
    return jnp.float32(total), jnp.float32(count)


def read_lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """What was written, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())


def test_accumulator_divides_once():
    accumulator = metrics.Accumulator()
    accumulator.add(1, {"loss": pair(30, 10)})  # mean 3
    accumulator.add(2, {"loss": pair(2, 2)})  # mean 1; the mean of the means would be 2
    accumulator.drain()
    assert accumulator.read() == {"train/loss": pytest.approx(32 / 12)}
    assert accumulator.read() == {}


def test_accumulator_reads_one_step_late():
    accumulator = metrics.Accumulator("validation")
    accumulator.add(1, {"loss": pair(3, 1)})
    assert accumulator.read() == {}
    accumulator.add(2, {"loss": pair(5, 1)})
    assert accumulator.read() == {"validation/loss": 3.0}
    accumulator.drain()
    assert accumulator.read() == {"validation/loss": 5.0}


def test_metric_without_a_count_is_left_out():
    accumulator = metrics.Accumulator()
    accumulator.add(1, {"loss": pair(3, 1), "teacher_loss": pair(0, 0)})
    accumulator.drain()
    assert accumulator.read() == {"train/loss": 3.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_metric_is_named_with_its_step(bad):
    accumulator = metrics.Accumulator()
    accumulator.add(16, {"loss": pair(1, 1), "alignment": pair(1, 1)})
    accumulator.add(17, {"loss": pair(1, 1), "alignment": pair(bad, 1)})
    with pytest.raises(
        metrics.NonFiniteError, match=rf"train/alignment is {bad} at step 17"
    ) as error:
        accumulator.add(18, {"loss": pair(1, 1), "alignment": pair(1, 1)})
    assert (error.value.step, error.value.name) == (17, "train/alignment")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def advance(secs):
        now[0] += secs

    return advance


def test_throughput_by_hand(clock):
    throughput = metrics.Throughput(
        tokens_per_step=1000, flops_per_token=3e9, device_kinds=["TPU v4"] * 2
    )
    for secs in (60.0, 1.0, 2.0, 6.0):  # the first is compilation
        clock(secs)
        throughput.step_done()
    # 3 steps of 1000 tokens in 9 s; the chips can do 2 * 275e12.
    assert throughput.read() == {
        "train/tokens_per_sec": pytest.approx(3000 / 9),
        "train/step_secs": 2.0,
        "train/flops_per_sec": pytest.approx(1e12),
        "train/mfu": pytest.approx(1e12 / 550e12),
    }
    assert throughput.read() == {}


def test_throughput_leaves_out_pauses(clock):
    throughput = metrics.Throughput(
        tokens_per_step=10, flops_per_token=1.0, device_kinds=["TPU v4"]
    )
    throughput.step_done()
    clock(2.0)
    throughput.step_done()
    throughput.pause()
    clock(100.0)
    throughput.step_done()
    clock(3.0)
    throughput.step_done()
    assert throughput.read()["train/tokens_per_sec"] == pytest.approx(20 / 5)


def test_mfu_is_not_reported_for_unknown_devices_and_says_so(clock, capsys):
    throughput = metrics.Throughput(
        tokens_per_step=10, flops_per_token=1.0, device_kinds=["TPU v4", "cpu"]
    )
    throughput.step_done()
    clock(1.0)
    throughput.step_done()
    assert "train/mfu" not in throughput.read()
    assert capsys.readouterr().err == (
        "train/mfu is not reported: no peak rate is known for TPU v4, cpu\n"
    )


def test_json_lines(tmp_path):
    with metrics.MetricsWriter(tmp_path / "run", num_steps=600) as writer:
        writer.write(100, {"train/loss": 2.5, "train/tokens": 4096})
        assert read_lines(tmp_path / "run") == [
            '{"step": 100, "train/loss": 2.5, "train/tokens": 4096}'
        ]
        writer.write(200, {"train/loss": math.nan, "validation/loss": jnp.float32(0.25)})
    assert read_lines(tmp_path / "run")[1:] == [
        '{"step": 200, "train/loss": null, "validation/loss": 0.25}'
    ]


@pytest.mark.parametrize("appends", [True, False])
def test_a_resumed_run_writes_each_step_once(tmp_path, monkeypatch, appends):
    monkeypatch.setattr(metrics, "_can_append", lambda path: appends)
    with metrics.MetricsWriter(tmp_path, num_steps=40) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed while writing
    with metrics.MetricsWriter(tmp_path, num_steps=40, start_step=30) as writer:
        writer.write(30, {"train/loss": 0.0})
    records = [json.loads(line) for line in read_lines(tmp_path)]
    assert [(r["step"], r["train/loss"]) for r in records] == [(10, 10.0), (20, 20.0), (30, 0.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


GARBAGE = {
    "half": b'{"step": 9, "train/lo',
    "zeros": bytes(12) + b"\n",
    "other_bytes": b'{"step": 9, "\xff\xfe": 1}\n',
    "a_list": b"[9]\n",
    "no_step": b'{"train/loss": 1.0}\n{"step": "9"}\n{"step": true}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_line_is_dropped(tmp_path, name):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "train/loss": 0.1}\n', b'{"step": 2, "train/loss": null}\n']
    path.write_bytes(lines[0] + GARBAGE[name] + b"\n" + lines[1] + GARBAGE[name])
    assert plots.read_curves(path) == {"train/loss": ([1], [0.1])}
    with metrics.MetricsWriter(tmp_path, num_steps=40, start_step=3):
        assert path.read_bytes() == lines[0] + lines[1]


def test_a_bucket_is_written_at_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_can_append", lambda path: False)
    with metrics.MetricsWriter(tmp_path, num_steps=40) as writer:
        writer.write(10, {"train/loss": 1.0})
        assert not (tmp_path / "metrics.jsonl").exists()
        writer.flush()
        assert read_lines(tmp_path) == ['{"step": 10, "train/loss": 1.0}']


def test_only_local_files_are_appended_to(tmp_path):
    assert not metrics._can_append(epath.Path("gs://bucket/metrics.jsonl"))
    assert metrics._can_append(epath.Path(tmp_path))


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with metrics.MetricsWriter(tmp_path, num_steps=40) as writer:
        writer.write(10, {"train/loss": 1.0})
        writer.flush()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_plain_lines(tmp_path, capsys):
    with metrics.MetricsWriter(tmp_path, num_steps=600) as writer:
        writer.write(100, {"train/loss": 2.30961, "train/tokens_per_sec": 12345.6})
    assert capsys.readouterr().err == (
        "step 100/600  train/loss 2.31  train/tokens_per_sec 12,346\n"
    )


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with metrics.MetricsWriter(tmp_path, num_steps=600, start_step=100) as writer:
        writer.write(200, {"train/loss": 2.30961, "train/tokens_per_sec": 12345.6})
        writer.write(200, {"validation/loss": 2.5})
        writer.flush()
    assert "200/600 loss 2.31 12,346 tokens/s" in terminal.text()
    assert "validation/loss" in terminal.text()
    assert "train/loss" not in terminal.text()  # the bar shows it


def test_tensorboard_files_or_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install jaxlib-methods\[tensorboard\]"):
        metrics.MetricsWriter(tmp_path, num_steps=10, tensorboard=True)
    monkeypatch.undo()
    pytest.importorskip("tensorboardX", reason="extra `tensorboard` is not installed")
    with metrics.MetricsWriter(tmp_path, num_steps=10, tensorboard=True) as writer:
        writer.write(1, {"train/loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


ROWS = [
    {"model": "teacher", "validation nats per token": 1.9, "parameters": 1_000_000},
    {"model": "student", "validation nats per token": 1.37249, "alignment": 0.68},
]


def test_final_table_as_text(capsys):
    console.final_table(ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "model    validation nats per token  parameters  alignment",
        "teacher                        1.9   1,000,000          -",
        "student                      1.372           -       0.68",
    ]


def test_final_table_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    console.final_table(ROWS, file=terminal)
    assert "┃" in terminal.text()
    assert "1.372" in terminal.text()
