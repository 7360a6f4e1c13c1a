"""Reinforcement mid-training in the trainer: a whole run, resumed in the middle."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlib_methods.models import partitioning
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train import checkpoint, loop
from jaxlib_methods.train.config import RunConfig

pytestmark = pytest.mark.usefixtures("compile_once", "one_device")
STEPS = 6
NEEDED = {"train/loss", "validation/loss"}
# Tiers by the initial model, a curriculum, a falling budget, and RLP's moving average.
CONFIG = ReinforcementMidtrainingConfig(
    rollouts=2, max_thought=3, budget=3, budget_decay=0.3, force_close=True, prompt_length=6,
    quantiles=(0.0, 0.3, 0.6), ema_decay=0.5, reward="information_gain", length_weight=0.0,
    advantage="leave_one_out",
)  # fmt: skip


def train(config: RunConfig, *, stop_after: int | None = None) -> None:
    """A run, which goes on for `stop_after` steps or to its end."""
    stop = threading.Event()
    prepared = loop.prepare(config)
    if stop_after is None:
        loop.train(prepared, stop=stop, started=0.0)
        return
    asked = iter(range(stop_after))
    stop.is_set = lambda: next(asked, None) == stop_after - 1  # a signal during that step
    with pytest.raises(SystemExit) as stopped:
        loop.train(prepared, stop=stop, started=0.0)
    assert stopped.value.code == 0


def test_a_resumed_run_is_an_unbroken_one_and_compiled_once(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
):
    """Budgets, tiers, thoughts, rewards, running means, losses and weights."""
    shape = {"max_length": 24, "vocab_size": 256}
    start = tiny(tmp_path / "start", num_steps=1, **shape)
    train(start)
    sizes: list[list[int]] = []
    evaluate = loop._Loop._evaluate

    def counted(self: Any, *arguments: Any) -> None:
        evaluate(self, *arguments)
        sizes.append([step._cache_size() for step in (self._train_step, self._eval_step)])

    monkeypatch.setattr(loop._Loop, "_evaluate", counted)

    def config(name: str) -> RunConfig:
        return tiny(
            tmp_path / name, method="reinforcement_midtraining", method_config=CONFIG,
            num_steps=STEPS, eval_every=3, init_from=start.workdir, **shape,
        )  # fmt: skip

    train(config("whole"))
    train(config("broken"), stop_after=3)
    train(config("broken"))
    whole, lines = (
        [line for line in read_metrics(tmp_path / name) if line.keys() & NEEDED]
        for name in ("whole", "broken")
    )
    assert lines == whole
    drawn = [line for line in lines if "train/reward" in line]
    assert len(lines) == STEPS + 2
    assert [line["train/budget"] for line in drawn] == [3, 2, 2, 1, 1, 1]
    assert len({line["train/reward"] for line in drawn}) == STEPS
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    ends = [
        checkpoint.load_pretrained(str(tmp_path / name), mesh=mesh).params
        for name in ("whole", "broken")
    ]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert sizes == [[1, 1]] * 4  # after steps 3 and 6 of both, whatever the budgets were
