"""Questions a second: drawing them alone, and through the two ways of streaming them.

    taskset -c 0 python tests/benchmarks/task_throughput.py

Measured: `QuestionDataset.rows` of batches of 64, always new ones and ones of a fixed set that is
in memory. Against: the same batches through `train/data.py`'s `device_batches`, which is what a
run does (two threads, arrays on the device), and through grain, mapping indices to questions and
batching these (two threads, numpy arrays). Same questions, asserted. The ratio is to the first.
Goal: 5000 new questions a second, whatever the task; a tenth of that time for one that is stored.
"""

import itertools
from typing import Any

import grain
import harness
import jax
import numpy as np
from absl import app, flags

from jaxlib_methods.models import partitioning
from jaxlib_methods.tasks.boolean_logic import BooleanLogic
from jaxlib_methods.tasks.kinship import Kinship
from jaxlib_methods.tasks.questions import QuestionDataset, Task
from jaxlib_methods.tasks.reachability import Reachability
from jaxlib_methods.train.data import device_batches

_BATCH = flags.DEFINE_integer("batch_size", 64, "Questions a batch.", lower_bound=1)
_STORED = flags.DEFINE_integer("num_train", 6400, "Questions of the fixed set.", lower_bound=64)
flags.set_default(harness.CALLS, 20)

GOAL = 5000  # new questions a second
TASKS: dict[str, tuple[Task, tuple[int, ...]]] = {
    "reachability": (Reachability(), (1, 2, 3, 4, 5)),
    "reachability, matched": (Reachability(variant="matched"), (1, 2, 3, 4, 5)),
    "boolean logic": (BooleanLogic(), (1, 2, 3, 4, 5, 6, 7, 8)),
    "boolean logic, balanced": (BooleanLogic(balanced=True), (1, 2, 3, 4, 5, 6, 7, 8)),
    "kinship": (Kinship(), (2, 3, 4, 5)),
}


class Rows:
    """The next batch of a dataset at every call."""

    def __init__(self, dataset: QuestionDataset) -> None:
        self._dataset, self._steps = dataset, itertools.count()

    def __call__(self) -> Any:
        begin = next(self._steps) * _BATCH.value
        return self._dataset.rows(np.arange(begin, begin + _BATCH.value))


def streamed(dataset: QuestionDataset) -> harness.Candidate:
    """The next batch as a run gets it, on one device."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    spec = partitioning.batch_spec()
    return device_batches(dataset, batch_size=_BATCH.value, mesh=mesh, spec=spec).__next__


def grained(dataset: QuestionDataset, task: Task) -> harness.Candidate:
    """The next batch of a grain pipeline over questions."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    examples = grain.MapDataset.range(2**31).map(dataset.example)
    batches = examples.batch(_BATCH.value, batch_fn=task.batch)
    return iter(batches.to_iter_dataset(read_options=options)).__next__


def compare(name: str, task: Task, difficulties: tuple[int, ...]) -> None:
    """Asserts that all give the same questions, times them and prints their rows."""

    def dataset(num_train: int = 0) -> QuestionDataset:
        return QuestionDataset("train", task, difficulties=difficulties, num_train=num_train)

    stored = dataset(_STORED.value)
    stored.rows(np.arange(_STORED.value))
    candidates: dict[str, harness.Candidate] = {
        "rows, new": Rows(dataset()),
        "train/data.py, new": streamed(dataset()),
        "grain, new": grained(dataset(), task),
        "rows, stored": Rows(stored),
        "train/data.py, stored": streamed(stored),
    }
    first, *others = (candidate() for candidate in candidates.values())
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
    times = harness.measure(candidates)
    tokens = _BATCH.value * task.sequence_length
    ratio = harness.report(name, times, reference="rows, new", tokens_per_call=tokens)
    speeds = {key: _BATCH.value / np.median(values) * 1e3 for key, values in times.items()}
    print(
        "\nQuestions a second:", ", ".join(f"{key} {speed:,.0f}" for key, speed in speeds.items())
    )
    harness.check_goal("seconds for 5000 new questions", GOAL / speeds["rows, new"], limit=1.0)
    harness.check_goal("stored / new", ratio["rows, stored"], limit=0.1)


def main(_: list[str]) -> None:
    """Compares for every task."""
    for name, (task, difficulties) in TASKS.items():
        compare(name, task, difficulties)


if __name__ == "__main__":
    app.run(main)
