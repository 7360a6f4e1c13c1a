"""The tables and the drawing of what depth gives a language model."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from jaxlib_methods.infer import report


class Step(NamedTuple):
    """After a number of iterations, means over tokens.

    nats_per_token: None where it was not measured. flops: analytic, forward, per token. change:
    ||s_i - s_(i-1)|| / ||s_i||. norm: root mean square of s_i. gap: ||a - b|| / ||a|| of two
    states that began from different noise; nan where none is drawn.
    """

    iterations: int
    nats_per_token: float | None
    flops: float
    change: float
    norm: float
    gap: float


class Exit(NamedTuple):
    """An early exit, over tokens.

    mean, p10, p50, p90: of the iterations taken. difference: of the loss to that of the most
    iterations. flops: with the coda and the head of each check. correlation: of the iterations
    with the entropy of the last prediction. shares: of the tokens that took 1, 2, ... iterations.
    """

    exit: str
    tolerance: float
    mean: float
    p10: int
    p50: int
    p90: int
    nats_per_token: float
    difference: float
    flops: float
    correlation: float
    shares: list[float]


class Thinking(NamedTuple):
    """What depth gives.

    recurrence: the usual number of iterations; trained_steps: the last of them, which have a
    gradient in training. gradients: |dL / ds_i|, i = 0, ..., recurrence, where L is the mean loss
    after so many iterations and s_i the states of all tokens.
    """

    num_tokens: int
    recurrence: int
    trained_steps: int
    steps: list[Step]
    exits: list[Exit]
    gradients: list[float]


def table(found: Thinking) -> str:
    """The numbers of iterations, then the exits, as text."""
    return "\n".join(_lines(found))


def _lines(found: Thinking) -> Iterator[str]:
    yield (
        f"{'iterations':>10}{'nats/token':>12}{'MFLOP/token':>13}{'change':>11}{'norm':>9}"
        f"{'gap':>11}"
    )
    for row in found.steps:
        if row.nats_per_token is not None:
            name = f"{row.iterations}{'*' * (row.iterations == found.recurrence)}"
            yield (
                f"{name:>10}{row.nats_per_token:12.4f}{row.flops / 1e6:13.3f}{row.change:11.2e}"
                f"{row.norm:9.4g}{row.gap:11.2e}"
            )
    yield (
        f"{'exit':>10}{'below':>10}{'mean':>8}{'p10/50/90':>12}{'nats/token':>12}"
        f"{'difference':>12}{'MFLOP/token':>13}{'entropy r':>11}"
    )
    for row in found.exits:
        parts = f"{row.p10}/{row.p50}/{row.p90}"
        yield (
            f"{row.exit:>10}{row.tolerance:10.3g}{row.mean:8.2f}{parts:>12}"
            f"{row.nats_per_token:12.4f}{row.difference:+12.5f}{row.flops / 1e6:13.3f}"
            f"{row.correlation:11.2f}"
        )
    most, size = found.steps[-1].iterations, found.gradients
    window = max(len(size) - 1 - found.trained_steps, 0)
    yield (
        "* as trained. change: of a step, relative. gap: of states that began from other noise.\n"
        f"difference: to {most} iterations. entropy r: correlation of the iterations with the "
        "entropy there."
    )
    yield (
        f"|dL/ds_i| {size[-1]:.3g} after {len(size) - 1} iterations, "
        f"{size[window]:.3g} where the trained window of {found.trained_steps} begins, "
        f"{size[0]:.3g} before the first."
    )


def draw(found: Thinking, path: epath.Path) -> bool:
    """Draws loss, change, exits and gradients by iteration. False without matplotlib."""

    def fill(figure: Any) -> None:
        (loss, change), (exits, gradients) = figure.subplots(2, 2)
        _draw_loss(loss, found)
        _draw_change(change, found)
        _draw_exits(exits, found)
        _draw_gradients(gradients, found)

    return report.draw(path, (10, 7), fill)


def _mark(panel: Any, found: Thinking) -> None:
    panel.axvline(found.recurrence, color="0.4", lw=1, ls=":", label="as trained")


def _draw_loss(panel: Any, found: Thinking) -> None:
    from matplotlib.ticker import NullLocator

    points = [(s.iterations, s.nats_per_token) for s in found.steps if s.nats_per_token is not None]
    counts, values = zip(*points, strict=True)
    panel.plot(counts, values, "o-", ms=4)
    for index, row in enumerate(found.exits):
        marker = "svD^P"[index % 5]
        label = f"{row.exit} below {row.tolerance:g}" if row.exit != "argmax" else "argmax"
        panel.plot(row.mean, row.nats_per_token, marker, ms=6, label=label, color=f"C{index + 1}")
    _mark(panel, found)
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("iterations (of an exit: mean)")
    panel.set_ylabel("nats per token")
    panel.legend()


def _draw_change(panel: Any, found: Thinking) -> None:
    counts = [row.iterations for row in found.steps]
    panel.plot(counts, [row.change for row in found.steps], "o-", ms=3, label="change of a step")
    gaps = [row.gap for row in found.steps]
    if any(gap > 0 for gap in gaps):
        panel.plot(counts, gaps, "s--", ms=3, label="gap of two beginnings")
    _mark(panel, found)
    panel.set_yscale("log")
    panel.set_xlabel("iterations")
    panel.set_ylabel("relative to the state")
    panel.legend()


def _draw_exits(panel: Any, found: Thinking) -> None:
    for index, row in enumerate(found.exits):
        label = f"{row.exit}, mean {row.mean:.1f}"
        panel.stairs(
            row.shares,
            [i + 0.5 for i in range(len(row.shares) + 1)],
            label=label,
            color=f"C{index + 1}",
            lw=1.5,
        )
    _mark(panel, found)
    panel.set_xlabel("iterations of a token")
    panel.set_ylabel("share of tokens")
    panel.legend()


def _draw_gradients(panel: Any, found: Thinking) -> None:
    panel.plot(range(len(found.gradients)), found.gradients, "o-", ms=3)
    last = len(found.gradients) - 1
    begin = max(last - found.trained_steps, 0)
    panel.axvspan(begin, last, color="C3", alpha=0.1, lw=0, label="trained window")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_yscale("log")
    panel.set_xlabel("i")
    panel.set_ylabel(r"$|\partial L / \partial s_i|$")
    panel.legend()
