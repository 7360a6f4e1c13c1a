"""Accuracy against budget: what shorter and longer thoughts give before tokens and answers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from jaxlib_methods.infer import reason_scores, reasoning, report
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.evaluate_thoughts import tiers_line
from jaxlib_methods.infer.reason_config import ReasonConfig
from jaxlib_methods.infer.reason_scores import Measured
from jaxlib_methods.infer.reasoning import Reasoner
from jaxlib_methods.infer.restore import Restored

SHARES = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the budget that is asked for


class Budgets(NamedTuple):
    """What each budget gives. budget: the one that was asked for, or that of the run."""

    budget: int
    temperature: float
    found: Measured


def budgets_of(reasoner: Reasoner) -> list[int]:
    """A few budgets, from none to twice the asked one where that is possible.

    The prompt shows each, and the thought is closed there.
    """
    found = {int(share * reasoner.budget) for share in SHARES}
    return sorted(budget for budget in found if budget <= reasoner.setting.cfg.max_thought)


def table(result: Budgets) -> str:
    """The budgets as text."""
    return "\n".join(_lines(result))


def _lines(result: Budgets) -> Iterator[str]:
    of_budget = result.found.budgets
    tiers = [row.tier for row in of_budget[result.budget][:-1]]
    yield (
        f"{'budget':>8}{'length':>8}{'closed':>8}{'accuracy':>10}{'log-prob':>10}{'answers':>9}"
        + "".join(f"{tier:>9}" for tier in tiers)
    )
    plain = of_budget[result.budget]
    yield (
        f"{'plain':>8}{'-':>8}{'-':>8}{plain[-1].plain_accuracy:10.4f}"
        f"{plain[-1].plain_log_prob:10.4f}{'-':>9}"
        + "".join(f"{row.plain_accuracy:9.4f}" for row in plain[:-1])
    )
    for budget, rows in of_budget.items():
        name = f"{budget}{'*' * (budget == result.budget)}"
        row = rows[-1]
        yield (
            f"{name:>8}{row.thought_length:8.2f}{row.closed:8.3f}{row.accuracy:10.4f}"
            f"{row.log_prob:10.4f}{row.answers:9.4f}"
            + "".join(f"{row.accuracy:9.4f}" for row in rows[:-1])
        )
    yield "Of the next token, after a thought that its prompt gave the budget. * as asked for."


def draw(result: Budgets, path: epath.Path) -> bool:
    """Draws accuracy and log-probability by budget. False without matplotlib."""

    def fill(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for panel, name, label in (
            (left, "accuracy", "accuracy of the next token"),
            (right, "log_prob", "log-probability of the next token, nats"),
        ):
            _draw_lines(panel, result, name)
            panel.axvline(result.budget, color="0.4", lw=1, ls=":", label="as asked for")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.set_xlabel("budget, tokens")
            panel.set_ylabel(label)
        left.legend()

    return report.draw(path, (10, 4), fill)


def _draw_lines(panel: Any, result: Budgets, name: str) -> None:
    budgets = result.found.budgets
    for i, row in enumerate(budgets[result.budget]):
        values = [getattr(rows[i], name) for rows in budgets.values()]
        color = "k" if row.tier == "all" else f"C{i}"
        panel.plot(list(budgets), values, "o-", ms=4, color=color, label=row.tier)
        panel.axhline(getattr(row, f"plain_{name}"), color=color, lw=1, ls="--")
    panel.plot([], [], "--", color="0.4", lw=1, label="without a thought")


def run(config: InferConfig, restored: Restored) -> None:
    """Prints the table, draws it, and writes JSON where `output` is given."""
    data = reasoning.data_config(config, restored)
    asked = ReasonConfig(**config.reason)
    reasoner = reasoning.make_reasoner(restored, asked, data, times=2)
    found = reason_scores.measure(
        restored, reasoner, data, budgets_of(reasoner),
        max_batches=reasoning.num_batches(config, reasoner), seed=config.seed,
    )  # fmt: skip
    result = Budgets(reasoner.budget, reasoner.temperature, found)
    places = found.budgets[reasoner.budget][-1].places
    print(
        f"{report.name(config, restored)}: {places:,} places, thoughts at temperature "
        f"{reasoner.temperature:g}\n{table(result)}"
    )
    print(tiers_line(found.tiers_by), end="")
    values = {
        "budget": reasoner.budget,
        "temperature": reasoner.temperature,
        "tiers_by": found.tiers_by,
        "budgets": [
            {"budget": budget, "rows": [row._asdict() for row in rows]}
            for budget, rows in found.budgets.items()
        ],
    }
    report.write(config, restored, values, lambda path: draw(result, path))
