"""The end of a run: a table of what was trained, and a picture of the curves."""

import math
from typing import NamedTuple

from etils import epath

from jaxlib_methods.train import console, plots
from jaxlib_methods.train.metrics import FILE_NAME

PICTURE = "curves.png"


class Summary(NamedTuple):
    """What a finished run came to. Losses on the validation split.

    They are nats per token of text, where there are bits per byte; of anything else, the method's.
    """

    workdir: str
    num_params: int
    num_steps: int
    validation_loss: float
    bits_per_byte: float | None
    alignment: float | None  # cosine, the last that was measured
    seconds: float
    stop_step: int | None


Runs = dict[str, Summary]


def summarise(
    workdir: epath.PathLike,
    *,
    num_params: int,
    bytes_per_token: float | None,
    stop_step: int | None,
) -> Summary:
    """Reads a run's metrics.jsonl. Raises ValueError where it holds no evaluation.

    bytes_per_token: None where the loss is not of text.
    """
    path = epath.Path(workdir) / FILE_NAME
    curves = plots.read_curves(path)
    if "validation/loss" not in curves:
        raise ValueError(f"{path} holds no validation/loss; the run has not been evaluated")
    steps, losses = curves["validation/loss"]
    _, alignment = curves.get("validation/alignment", ((), ()))
    return Summary(
        workdir=str(workdir),
        num_params=num_params,
        num_steps=steps[-1],
        validation_loss=losses[-1],
        bits_per_byte=bytes_per_token and losses[-1] / math.log(2) / bytes_per_token,
        alignment=alignment[-1] if alignment else None,
        seconds=curves["train/elapsed_secs"][1][-1],
        stop_step=stop_step,
    )


def seconds_so_far(workdir: epath.PathLike) -> float:
    """Training time that earlier starts of this run have recorded, in seconds."""
    path = epath.Path(workdir) / FILE_NAME
    recorded = plots.read_curves(path).get("train/elapsed_secs") if path.exists() else None
    return recorded[1][-1] if recorded else 0.0


def steps_to_reach(workdir: epath.PathLike, loss: float) -> float | None:
    """The step at which a run's validation loss first came down to `loss`, or None.

    Evaluations are joined by straight lines.
    """
    steps, losses = plots.read_curves(epath.Path(workdir) / FILE_NAME)["validation/loss"]
    for i, value in enumerate(losses):
        if value <= loss:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - loss) / (losses[i - 1] - value)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def finish(runs: Runs, workdir: epath.PathLike) -> None:
    """Prints the table, the steps to the baseline's loss, and draws WORKDIR/curves.png."""
    console.final_table([_row(name, summary) for name, summary in runs.items()])
    baseline = runs.get("baseline")
    for name, summary in runs.items():
        if baseline is not None and name not in ("baseline", "teacher"):
            print(compare(name, summary, baseline))
    folder = epath.Path(workdir)
    paths = {name: epath.Path(summary.workdir) / FILE_NAME for name, summary in runs.items()}
    stops = {
        name: s.stop_step
        for name, s in runs.items()
        if s.stop_step is not None and s.stop_step <= s.num_steps
    }
    text = all(_is_text(summary) for summary in runs.values())
    unit = "nats per token" if text else None
    if plots.draw_curves(paths, folder / PICTURE, stop_steps=stops, unit=unit):
        print(f"curves: {folder / PICTURE}")


def compare(name: str, summary: Summary, baseline: Summary) -> str:
    """One sentence: how many steps a run needed to the baseline's final validation loss."""
    total, unit = baseline.num_steps, " nats per token" if _is_text(summary) else ""
    goal = baseline.validation_loss
    reached = steps_to_reach(summary.workdir, goal)
    if reached is None:
        return (
            f"{name} did not reach the baseline's final validation loss of {goal:.4f}{unit} "
            f"within {summary.num_steps} steps; it ended at {summary.validation_loss:.4f}"
        )
    return (
        f"{name} reached the baseline's final validation loss of {goal:.4f}{unit} after "
        f"{reached:.0f} of the baseline's {total} steps ({total / max(reached, 1):.2f}x)"
    )


def _is_text(summary: Summary) -> bool:
    return summary.bits_per_byte is not None


def _row(name: str, summary: Summary) -> dict[str, object]:
    bits = summary.bits_per_byte
    return {
        "run": name,
        "parameters": summary.num_params,
        "steps": summary.num_steps,
        "nats per token" if bits is not None else "loss": round(summary.validation_loss, 4),
        "bits per byte": "-" if bits is None else round(bits, 4),
        "alignment cosine": "-" if summary.alignment is None else round(summary.alignment, 3),
        "time": f"{summary.seconds:.0f} s",
    }
