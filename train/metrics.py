"""Metrics of a run: read one step late, divided once, written as JSON lines."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import IO, Any, Protocol, Self

import jax
from etils import epath

from jaxlib_methods.method import Metrics
from jaxlib_methods.train import console
from jaxlib_methods.train.devices import peak_flops

FILE_NAME = "metrics.jsonl"
_UPLOAD_SECS = 30.0  # object stores cannot append and limit how often one object is written


class NonFiniteError(FloatingPointError):
    """A metric became NaN or infinite."""

    def __init__(self, step: int, name: str, value: float) -> None:
        super().__init__(
            f"{name} is {value} at step {step}; lower optimizer.learning_rate or look at the data, "
            "the last good checkpoint is kept"
        )
        self.step = step
        self.name = name


class Accumulator:
    """Sums (sum, count) pairs over steps and divides once.

    A step is read when the next one has been added, so that the host waits for step n-1 while the
    device computes step n. Raises NonFiniteError at the first metric that is not finite.
    """

    def __init__(self, prefix: str = "train") -> None:
        self._prefix = prefix
        self._pending: deque[tuple[int, Metrics]] = deque()
        self._totals: dict[str, tuple[float, float]] = {}

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of `step`, still being computed, and waits for the step before."""
        self._pending.append((step, metrics))
        while len(self._pending) > 1:
            self._absorb(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for the newest step too: before a checkpoint, an evaluation, the end."""
        while self._pending:
            self._absorb(*self._pending.popleft())

    def read(self) -> dict[str, float]:
        """Means over the steps waited for since the last `read`, as `prefix/name`.

        After `add(n, ...)` these are the steps up to n-1. A metric without a count is left out.
        """
        totals, self._totals = self._totals, {}
        return {name: total / count for name, (total, count) in totals.items() if count}

    def _absorb(self, step: int, metrics: Metrics) -> None:
        for short_name, pair in jax.device_get(metrics).items():
            name = f"{self._prefix}/{short_name}"
            total, count = (float(part) for part in pair)
            for value in (total, count):
                if not math.isfinite(value):
                    raise NonFiniteError(step, name, value)
            old_total, old_count = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = old_total + total, old_count + count


class Throughput:
    """Rates over the steps since the last `read`, compilation and pauses left out.

    tokens_per_step: of the global batch, padding included. flops_per_token: model FLOPs, see
    `jaxlib_methods.flops`. device_kinds: of every device of the mesh, over all hosts.
    """

    def __init__(
        self, *, tokens_per_step: int, flops_per_token: float, device_kinds: Sequence[str]
    ) -> None:
        self.flops_per_token = flops_per_token
        self._tokens_per_step = tokens_per_step
        self._peak = peak_flops(device_kinds)
        self._last: float | None = None
        self._secs: list[float] = []
        if self._peak is None and jax.process_index() == 0:
            kinds = ", ".join(sorted(set(device_kinds)))
            print(f"train/mfu is not reported: no peak rate is known for {kinds}", file=sys.stderr)

    def step_done(self) -> None:
        """Marks the end of a step: call it when its metrics have been read."""
        now = time.perf_counter()
        if self._last is not None:
            self._secs.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Leaves out what follows, up to the next `step_done`: evaluation, another program."""
        self._last = None

    def read(self) -> dict[str, float]:
        """Rates of the steps since the last `read`; empty where no step was timed.

        step_secs is the median, the others are means. mfu: model FLOPs over the devices' dense
        bfloat16 peak.
        """
        secs, self._secs = self._secs, []
        if not secs:
            return {}
        tokens_per_sec = self._tokens_per_step * len(secs) / sum(secs)
        flops_per_sec = self.flops_per_token * tokens_per_sec
        rates = {
            "train/tokens_per_sec": tokens_per_sec,
            "train/step_secs": median(secs),
            "train/flops_per_sec": flops_per_sec,
        }
        if self._peak is not None:
            rates["train/mfu"] = flops_per_sec / self._peak
        return rates


class _Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """Writes WORKDIR/metrics.jsonl, the console and, where asked, TensorBoard; process 0 only.

        with MetricsWriter(workdir, num_steps=600, start_step=0) as writer:
            writer.write(100, {"train/loss": 2.31})

    start_step: the first step that this run will write. Lines of it and of later steps, left by
    a run that was interrupted, are dropped, so that the curve has one value per step.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        num_steps: int,
        tensorboard: bool = False,
        start_step: int = 0,
    ) -> None:
        self._sinks: list[_Sink] = []
        if jax.process_index() != 0:
            return
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", start_step))
        self._sinks.append(_JsonLines(folder / FILE_NAME, start_step))
        if sys.stderr.isatty():
            self._sinks.append(console.Bar(num_steps, start_step))
        else:
            self._sinks.append(console.Lines(num_steps))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step, named in full: `train/loss`, `validation/loss`."""
        for sink in self._sinks:
            sink.write(step, values)

    def flush(self) -> None:
        """Makes what was written last: call it before a checkpoint is saved."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Flushes and lets go of the console."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _JsonLines:
    """One JSON object a line. Local files are appended to, objects in a bucket written whole."""

    def __init__(self, path: epath.Path, start_step: int) -> None:
        self._path = path
        self._lines = _earlier_lines(path, start_step)
        self._uploaded = time.monotonic()
        self._file: IO[str] | None = None
        if _can_append(path):
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(self._lines))
            partial.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        record = {"step": step} | {name: _json_number(v) for name, v in values.items()}
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._uploaded >= _UPLOAD_SECS:
            self.flush()

    def flush(self) -> None:
        if self._file is None:
            self._path.write_text("".join(self._lines))
            self._uploaded = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _can_append(path: epath.Path) -> bool:
    return "://" not in str(path)


def _earlier_lines(path: epath.Path, start_step: int) -> list[str]:
    if not path.exists():
        return []
    earlier = [record for record in read_records(path) if record["step"] < start_step]
    return [json.dumps(record) + "\n" for record in earlier]


def read_records(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without what is no line of one.

    A killed run leaves half a line, a machine that goes down zeros or the text of another file.
    """
    records = []
    for line in epath.Path(path).read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def _json_number(value: float) -> float | None:
    """JSON has no NaN and no infinity: null."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def require_tensorboard() -> Any:
    """The class that writes TensorBoard's files. Raises ImportError without the extra."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "train.tensorboard=True needs tensorboardX: pip install jaxlib-methods[tensorboard]"
        ) from error
    return SummaryWriter


class _TensorBoard:
    def __init__(self, folder: epath.Path, start_step: int) -> None:
        self._writer = require_tensorboard()(str(folder), purge_step=start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
