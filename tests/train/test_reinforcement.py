"""Reinforcement mid-training in the trainer: a whole run, resumed in the middle."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlib_methods.infer import entropy, restore
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.models import huggingface, partitioning
from jaxlib_methods.models.transformer import forward
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train import checkpoint, entropies, loop
from jaxlib_methods.train.config import RunConfig

pytestmark = pytest.mark.usefixtures("compile_once", "one_device")
STEPS = 6
SHAPE = {"max_length": 24, "vocab_size": 256}
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
    start = tiny(tmp_path / "start", num_steps=1, **SHAPE)
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
            num_steps=STEPS, eval_every=3, init_from=start.workdir, **SHAPE,
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


def test_a_hugging_face_folder_is_thought_with(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
):
    """The same steps as from the run whose weights it holds, and others from other weights."""
    start = tiny(tmp_path / "start", num_steps=1, **SHAPE)
    train(start)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    found = checkpoint.load_pretrained(start.workdir, mesh=mesh)
    huggingface.save_params(tmp_path / "folder", found.params, found.config)
    other = jax.tree.map(lambda leaf: 2 * leaf, found.params)
    huggingface.save_params(tmp_path / "other", other, found.config)
    lines = {}
    for name in ("start", "folder", "other"):
        config = tiny(
            tmp_path / f"from_{name}", method="reinforcement_midtraining", method_config=CONFIG,
            num_steps=2, eval_every=2, init_from=str(tmp_path / name), **SHAPE,
        )  # fmt: skip
        train(config)
        lines[name] = [x for x in read_metrics(Path(config.workdir)) if x.keys() & NEEDED]
    assert lines["folder"] == lines["start"]
    losses = [line["train/loss"] for line in lines["folder"] if "train/loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    for name in ("train/loss", "train/reward", "train/plain_log_prob"):
        assert abs(lines["other"][0][name] - lines["folder"][0][name]) > 1e-3


def test_tiers_of_an_entropy_file(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
):
    """From `--mode=entropy` of a run to mid-training by its file, and not on another text."""
    start = tiny(tmp_path / "start", num_steps=1, **SHAPE)
    train(start)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    path = str(tmp_path / "a.array_record")
    restored = restore.restore(start.workdir, mesh=mesh)
    entropy.run(InferConfig(workdir=start.workdir, mode="entropy", output=path), restored)
    config = tiny(
        tmp_path / "run", method="reinforcement_midtraining", num_steps=2, eval_every=2,
        method_config=dataclasses.replace(CONFIG, entropy=path, quantiles=(0.2, 0.5, 0.8)),
        init_from=start.workdir, **SHAPE,
    )  # fmt: skip
    prepared = loop.prepare(config)
    assert prepared.method.init(jax.random.key(0)) == ()  # no model measures tiers again
    rows: Any = prepared.dataset.rows(range(4))
    logits = forward(
        restored.model, restored.params, rows.inputs, positions=rows.positions,
        segments=rows.segments,
    ).logits  # fmt: skip
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    mine = -(np.exp(log_probs) * log_probs).sum(axis=-1)
    sample = entropies.Entropies(path).sample()
    cuts = np.quantile(sample[~np.isnan(sample)], (0.2, 0.5, 0.8))
    clear = rows.where & (np.abs(mine[..., None] - cuts) > 2e-3).all(axis=-1)
    assert clear.sum() > 0.8 * rows.where.sum()
    expected = np.searchsorted(cuts, mine, side="right") - 1
    np.testing.assert_array_equal(rows.tier[clear], expected[clear])
    assert (rows.tier[~rows.where] == -1).all()
    train(config)
    lines = [x for x in read_metrics(tmp_path / "run") if "train/loss" in x]
    assert len(lines) == 2
    for line in lines:
        assert sum(line[f"train/share_{name}"] for name in ("easy", "medium", "hard")) == 1
        assert np.isfinite(line["train/loss"])
    others = tmp_path / "others"
    others.mkdir()
    (others / "a.txt").write_text(json.dumps(list(range(300))))
    elsewhere = dataclasses.replace(
        config, workdir=str(tmp_path / "elsewhere"),
        data=dataclasses.replace(config.data, source=str(others)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="belong to another corpus: the training text is") as error:
        loop.prepare(elsewhere)
    assert "\n" not in str(error.value)
