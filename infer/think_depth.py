"""The computational frontier of a reasoning run: accuracy over difficulty and thinking steps.

One trajectory of each validation question gives every number of steps, and how its state moves.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlib_methods import depth_reasoning
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig, Questions
from jaxlib_methods.infer import evaluate, report
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models.depth_recurrent_config import DepthRecurrentConfig

SOLVED = 0.95  # the accuracy from which a difficulty counts as solved
COLUMNS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 28, 40)  # of the table, beside those of training
MOST_NUMBERS = 24  # steps up to which the heat map's cells have room for numbers


class Frontier(NamedTuple):
    """What each number of steps gives; step t is at index t - 1.

    difficulties, counts: of the validation questions. accuracy: `[difficulty][step]`, nan where
    there is no question. first_solved: the fewest steps that answer 0.95 of a difficulty, or None.
    trained_difficulties, trained_steps: least and most of training. norm, change, gate: `trained`
    and `other` difficulties -> `[step]`, means over questions; see `depth_recurrent.Trajectory`.
    """

    difficulties: tuple[int, ...]
    counts: list[int]
    accuracy: list[list[float]]
    first_solved: list[int | None]
    trained_difficulties: tuple[int, int]
    trained_steps: tuple[int, int]
    norm: dict[str, list[float]]
    change: dict[str, list[float]]
    gate: dict[str, list[float]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    questions: Questions, model: DepthRecurrentConfig, params: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """Sums by difficulty: of right answers, norm, change and gate `[4, steps, K]`; counts `[K]`."""
    path = depth_reasoning.trajectory(questions, model, params, batch)
    difficulties = jnp.array(questions.values.eval_difficulties)
    of = (batch.difficulty[:, None] == difficulties[None]) & batch.where[:, None]  # [B, K]
    right = depth_reasoning.correct(path.logits, batch.label)
    values = jnp.stack([right.astype(jnp.float32), path.norm, path.change, path.gate])
    values = jnp.where(batch.where[None, None], values, 0)
    return jnp.einsum("vtb,bk->vtk", values, of.astype(jnp.float32)), of.sum(axis=0)


def frontier(restored: Restored, *, max_batches: int | None = None) -> Frontier:
    """Every number of steps up to the most possible, over the validation questions.

    max_batches: this many, evenly spread over them; None takes all.
    """
    assert restored.config is not None
    config = restored.config.method_config
    assert isinstance(config, DepthRecurrenceConfig)
    questions = config.resolved()
    model = questions.model(restored.model)
    with jax.set_mesh(restored.mesh):
        found = [
            _measure(questions, model, restored.params, batch)
            for batch in evaluate.question_batches(
                questions.dataset("validation"), restored, max_batches
            )
        ]
    sums, counts = (
        np.asarray(jax.device_get(parts), np.float64).sum(axis=0)
        for parts in zip(*found, strict=True)
    )
    return _summarise(questions, sums, counts)


def _summarise(questions: Questions, sums: np.ndarray, counts: np.ndarray) -> Frontier:
    v = questions.values
    accuracy = _ratio(sums[0], counts).T
    solved = accuracy >= SOLVED
    first = [int(row.argmax()) + 1 if row.any() else None for row in solved]
    is_trained = np.array([v.easiest <= k <= v.hardest for k in v.eval_difficulties])
    groups = {"trained": is_trained, "other": ~is_trained}
    norm, change, gate = (
        {
            name: _ratio(total[:, group].sum(axis=1), counts[group].sum()).tolist()
            for name, group in groups.items()
        }
        for total in sums[1:]
    )
    return Frontier(
        v.eval_difficulties,
        counts.astype(int).tolist(),
        accuracy.tolist(),
        first,
        (v.easiest, v.hardest),
        questions.train_steps,
        norm,
        change,
        gate,
    )


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def columns(found: Frontier) -> list[int]:
    """The numbers of steps that the table shows: a few, and those of training."""
    most = len(found.accuracy[0])
    return [t for t in sorted({*COLUMNS, *found.trained_steps, most}) if t <= most]


def table(found: Frontier) -> str:
    """Accuracy as text: a row for each difficulty, a column for each of some numbers of steps."""
    return "\n".join(_lines(found))


def _lines(found: Frontier) -> Iterator[str]:
    (easiest, hardest), (fewest, most) = found.trained_difficulties, found.trained_steps
    shown = columns(found)
    titles = [f"{t}{'*' * (fewest <= t <= most)}" for t in shown]
    yield f"{'difficulty':>10}{'questions':>11}{'solved at':>11} " + "".join(
        f"{title:>7}" for title in titles
    )
    rows = zip(found.difficulties, found.counts, found.first_solved, found.accuracy, strict=True)
    for difficulty, count, first, accuracy in rows:
        name = f"{difficulty}{'*' * (easiest <= difficulty <= hardest)}"
        cells = "".join(f"{accuracy[t - 1]:7.3f}" if count else f"{'-':>7}" for t in shown)
        yield f"{name:>10}{count:11}{'-' if first is None else first:>11} {cells}"
    yield (
        f"Accuracy by difficulty (rows) and thinking steps (columns); * as in training. Solved is "
        f"{SOLVED:g}."
    )


def draw(found: Frontier, path: epath.Path) -> bool:
    """Draws the heat map, and below it the movement of the state. False without matplotlib."""

    def fill(figure: Any) -> None:
        top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
        _draw_map(top.subplots(), top, found)
        _draw_movement(bottom.subplots(1, 3), found)

    steps = len(found.accuracy[0])
    return report.draw(path, (max(8, 0.45 * steps), 7), fill)


def _draw_map(panel: Any, figure: Any, found: Frontier) -> None:
    from matplotlib.patches import Rectangle

    accuracy = np.array(found.accuracy)
    rows, steps = accuracy.shape
    panel.grid(visible=False)
    options: dict[str, Any] = {"origin": "lower", "aspect": "auto", "vmin": 0.5, "vmax": 1.0}
    image = panel.imshow(accuracy, cmap="viridis", extent=(0.5, steps + 0.5, -0.5, rows - 0.5),
                         **options)  # fmt: skip
    if steps <= MOST_NUMBERS:
        for (row, step), value in np.ndenumerate(accuracy):
            text = "" if np.isnan(value) else f"{value:.2f}".removeprefix("0")
            color = "k" if value > 0.8 else "w"
            panel.text(step + 1, row, text, ha="center", va="center", fontsize=8, color=color)
    easiest, hardest = found.trained_difficulties
    inside = [i for i, k in enumerate(found.difficulties) if easiest <= k <= hardest]
    fewest, most = found.trained_steps
    if inside:
        corner = (fewest - 0.5, inside[0] - 0.5)
        size = (most - fewest + 1, inside[-1] - inside[0] + 1)
        panel.add_patch(Rectangle(corner, *size, fill=False, ec="C3", lw=2, clip_on=False))
        panel.set_title("within the line: as in training", color="C3", fontsize=10, loc="left")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_yticks(range(rows), [str(k) for k in found.difficulties])
    panel.set_xlabel("thinking steps")
    panel.set_ylabel("difficulty")
    figure.colorbar(image, ax=panel, label="accuracy", extend="min")


def _draw_movement(panels: Any, found: Frontier) -> None:
    named = {
        "norm of the state": found.norm,
        "relative change of a step": found.change,
        "mean gate": found.gate,
    }
    for panel, (label, groups) in zip(panels, named.items(), strict=True):
        for name, marker in (("trained", "o-"), ("other", "s--")):
            values = groups[name]
            if not np.isnan(values).all():
                panel.plot(range(1, len(values) + 1), values, marker, ms=3, label=name)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.axvspan(*found.trained_steps, color="C3", alpha=0.1, lw=0)
        panel.set_xlabel("thinking steps")
        panel.set_ylabel(label)
    panels[1].set_yscale("log")
    panels[0].legend(title="difficulties", loc="best")


def check(config: InferConfig) -> None:
    """Raises ValueError where other data is asked for."""
    if config.data:
        raise ValueError(
            f"--data.{next(iter(config.data))} is for text; {config.workdir} draws its questions"
        )


def run(config: InferConfig, restored: Restored) -> None:
    """Prints the table, draws it, and writes JSON where `output` is given."""
    found = frontier(restored, max_batches=config.eval_batches)
    total = sum(found.counts)
    print(f"{report.name(config, restored)}: {total:,} validation questions\n{table(found)}")
    report.write(config, restored, found._asdict(), lambda path: draw(found, path))
