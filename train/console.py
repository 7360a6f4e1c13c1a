"""What a run shows: a progress bar or plain lines while it trains, a table at its end."""

import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import progress
from rich.console import Console
from rich.table import Table


def show_number(value: object) -> str:
    """Four digits of a float, thousands separated, as text; anything else as it is.

    >>> [show_number(v) for v in (2.30961, 0.000123456, 12345.6, 3.2e15, 1000, "plain")]
    ['2.31', '0.0001235', '12,346', '3.2e+15', '1,000', 'plain']
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}"


class Lines:
    """`step 100/600  train/loss 2.31  ...` on stderr."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values of one step."""
        print(_line(step, self._num_steps, values), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Shows everything now."""
        sys.stderr.flush()

    def close(self) -> None:
        """Lets go of the terminal."""
        self.flush()


class Bar:
    """A progress bar with the loss, tokens per second and the time that remains, on stderr.

    What is not a `train/` metric is printed as a line above the bar.
    """

    def __init__(self, num_steps: int, start_step: int) -> None:
        self._num_steps = num_steps
        self._progress = progress.Progress(
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]}"),
            progress.TextColumn("{task.fields[rate]} tokens/s"),
            progress.TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            refresh_per_second=2,
        )
        self._task = self._progress.add_task(
            "train", total=num_steps, completed=start_step, loss="-", rate="-"
        )
        self._progress.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values of one step."""
        if "train/loss" in values:
            self._progress.update(self._task, loss=show_number(values["train/loss"]))
        if "train/tokens_per_sec" in values:
            self._progress.update(self._task, rate=show_number(values["train/tokens_per_sec"]))
        self._progress.update(self._task, completed=step)
        others = {name: v for name, v in values.items() if not name.startswith("train/")}
        if others:
            self._progress.console.print(_line(step, self._num_steps, others), markup=False)

    def flush(self) -> None:
        """Shows everything now."""
        self._progress.refresh()

    def close(self) -> None:
        """Lets go of the terminal."""
        self._progress.stop()


def _line(step: int, num_steps: int, values: Mapping[str, float]) -> str:
    pairs = [f"{name} {show_number(value)}" for name, value in values.items()]
    return "  ".join([f"step {step}/{num_steps}", *pairs])


def final_table(rows: Sequence[Mapping[str, object]], *, file: TextIO | None = None) -> None:
    """Prints one line per row: coloured on a terminal, aligned plain text elsewhere.

    Columns are the rows' keys in the order of their first appearance; what a row lacks is `-`.
    file: standard output by default.
    """
    out = sys.stdout if file is None else file
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[show_number(row.get(name, "-")) for name in columns] for row in rows]
    if out.isatty():
        table = Table()
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in cells:
            table.add_row(*row)
        Console(file=out).print(table)
        return
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    for first, *rest in [columns, *cells]:
        aligned = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *aligned]), file=out)
