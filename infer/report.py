"""What a mode leaves beside the lines that it prints: JSON, and a drawing of the same name."""

import json
import math
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.train.plots import STYLE


def name(config: InferConfig, restored: Restored) -> str:
    """The model for a reader: its workdir, and its step where it has one."""
    return config.workdir if restored.step is None else f"{config.workdir}, step {restored.step}"


def check_output(config: InferConfig) -> None:
    """Makes the folder of `output`. Raises ValueError where it cannot be written, in any mode."""
    if not config.output:
        return
    flag, path = f"--output={config.output}", epath.Path(config.output).expanduser()
    if config.mode != "export" and path.is_dir():
        raise ValueError(f"{flag} is a folder; give the name of a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} cannot be written: {error}; give another") from error
    # What is written whole or not at all is written beside it first.
    beside = config.mode in ("export", "entropy") or not path.exists()
    if "://" not in config.output and not os.access(path.parent if beside else path, os.W_OK):
        raise ValueError(f"{flag} cannot be written: permission is denied; give another")


def write(
    config: InferConfig,
    restored: Restored,
    values: dict[str, Any],
    draw: Callable[[epath.Path], bool] | None = None,
) -> None:
    """Writes JSON where `output` is given, and draws beside it, else into the workdir.

    draw: draws into a path, and says whether it did; none draws nothing.
    """
    png = epath.Path(config.workdir).expanduser() / f"{config.mode}.png"
    if config.output:
        path = epath.Path(config.output).expanduser()
        values = {"workdir": config.workdir, "step": restored.step, **values}
        path.write_text(json.dumps(finite(values)) + "\n")
        png = path.with_suffix(".png")
    if draw is not None and draw(png):
        print(f"drawn in {png}")


def finite(value: Any) -> Any:
    """JSON has no infinity and no nan: null in their place."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(path: epath.Path, size: tuple[float, float], fill: Callable[[Any], None]) -> bool:
    """Draws a figure of `size` inches that `fill` fills. Says so, and is False, without matplotlib.

    fill: is given a `matplotlib.figure.Figure`.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        print("nothing is drawn without matplotlib: pip install jaxlib-methods[plot]")
        return False
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=150)
    return True
