"""Curves of one run or several, drawn from their metrics.jsonl."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from etils import epath

from jaxlib_methods.train.metrics import read_records

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.framealpha": 1.0,
    "legend.edgecolor": "none",
}
ALIGNMENT = {
    "train/alignment": ("cosine", "-"),
    "train/alignment_weight": ("weight in the loss", "--"),
}
_Curve = tuple[list[int], list[float]]
_Run = dict[str, _Curve]


def read_curves(path: epath.PathLike) -> _Run:
    """Every metric of a metrics.jsonl as (steps, values), null values left out."""
    curves: _Run = {}
    for record in read_records(path):
        step = record.pop("step")
        for name, value in record.items():
            if value is None:
                continue
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return curves


def draw_curves(
    runs: Mapping[str, epath.PathLike],
    output_png: epath.PathLike,
    *,
    stop_steps: Mapping[str, int] | None = None,
    unit: str | None = "nats per token",
) -> bool:
    """Draws the loss curves of the runs and, where they have one, the alignment below.

    runs: label -> metrics.jsonl. stop_steps: label -> the step at which its alignment ends, drawn
    as a vertical line. unit: of the loss, None where it has none. Returns False, and says what to
    install, without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves are drawn without matplotlib: pip install jaxlib-methods[plot]")
        return False
    curves = {label: read_curves(path) for label, path in runs.items()}
    aligned = any(name in run for run in curves.values() for name in ALIGNMENT)
    ratios = [2, 1] if aligned else [1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 6.5 if aligned else 4.5), layout="constrained")
        grid = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
        panels = list(grid[:, 0])
        _draw_losses(panels[0], curves, unit)
        if aligned:
            _draw_alignment(panels[1], curves)
        for index, label in enumerate(curves):
            if stop_steps and label in stop_steps:
                _mark_stop(panels, stop_steps[label], label, f"C{index}")
        panels[-1].set_xlabel("optimiser step")
        with epath.Path(output_png).open("wb") as file:
            figure.savefig(file, format="png", dpi=150)
    return True


def _draw_losses(panel: Any, curves: Mapping[str, _Run], unit: str | None) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    for index, (label, run) in enumerate(curves.items()):
        color = f"C{index}"
        if "train/loss" in run:
            text = f"{label}, training"
            panel.plot(*run["train/loss"], color=color, alpha=0.35, lw=1, label=text)
        if "validation/loss" in run:
            steps, values = run["validation/loss"]
            end = f"{values[-1]:.3f}" if unit else f"{values[-1]:.4g}"
            text = f"{label}, validation: {end} at the end"
            panel.plot(steps, values, color=color, lw=1.8, marker="o", ms=4, label=text)
        if "train/teacher_loss" in run:
            mean = fmean(run["train/teacher_loss"][1])
            text = f"teacher of {label}, same training text: {mean:.3f}"
            panel.axhline(mean, color="0.4", lw=1, ls="-.", label=text)
    panel.set_yscale("log")  # the end of the curves is what is compared
    panel.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.set_ylabel(f"loss ({unit}, log scale)" if unit else "loss (log scale)")
    panel.legend(loc="upper right")


def _draw_alignment(panel: Any, curves: Mapping[str, _Run]) -> None:
    for index, (label, run) in enumerate(curves.items()):
        for name, (text, line_style) in ALIGNMENT.items():
            if name in run:
                panel.plot(*run[name], f"C{index}{line_style}", lw=1.5, label=f"{label}, {text}")
    panel.set_ylabel("alignment with the teacher")
    panel.legend(loc="center right")


def _mark_stop(panels: list[Any], step: int, label: str, color: str) -> None:
    for panel in panels:
        panel.axvline(step, color=color, lw=1, ls=":")
    panels[0].annotate(
        f"{label}: alignment ends",
        (step, 0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 4),
        textcoords="offset points",
        color=color,
        fontsize=9,
    )
