"""With thoughts and without: a run of reinforcement mid-training on validation data."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxlib_methods.infer import evaluate, reason_scores, reasoning, report
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.reason_config import ReasonConfig
from jaxlib_methods.infer.reason_scores import Row
from jaxlib_methods.infer.restore import Restored


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    names = f"{'plain':>9}{'thought':>9}{'shuffled':>9}"
    yield f"{'':16}{'accuracy':^27}{'log-probability':^27}"
    yield f"{'':8}{'places':>8}{names}{names}{'length':>8}{'closed':>8}{'answers':>9}"
    for row in rows:
        yield (
            f"{row.tier:8}{row.places:8,}"
            f"{row.plain_accuracy:9.4f}{row.accuracy:9.4f}{row.shuffled_accuracy:9.4f}"
            f"{row.plain_log_prob:9.4f}{row.log_prob:9.4f}{row.shuffled_log_prob:9.4f}"
            f"{row.thought_length:8.2f}{row.closed:8.3f}{row.answers:9.4f}"
        )
    yield (
        "Of the next token: is it the likeliest, and how likely; without a thought, after one, and "
        "after\nthat of another prompt. closed: by the model, within the budget. answers: drawn, "
        "and right."
    )


def tiers_line(tiers_by: str | None) -> str:
    """Says whose entropy makes the tiers, where there are any."""
    made = f"Tiers are by the entropy of {tiers_by}; all has as many places of each.\n"
    return "" if tiers_by is None else made


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError or FileNotFoundError where there is no such budget or no such data."""
    reasoning.check(config, restored)


def run(config: InferConfig, restored: Restored) -> None:
    """Prints the comparison, and writes JSON where `output` is given."""
    data = reasoning.data_config(config, restored)
    reasoner = reasoning.make_reasoner(restored, ReasonConfig(**config.reason), data)
    name = report.name(config, restored)
    values: dict[str, Any] = {}
    if reasoner.is_text:
        text = evaluate.evaluate(restored, data, max_batches=config.eval_batches)
        print(evaluate.sentence(name, text))
        values = text._asdict()
    found = reason_scores.measure(
        restored, reasoner, data, [reasoner.budget],
        max_batches=reasoning.num_batches(config, reasoner), seed=config.seed,
    )  # fmt: skip
    rows = found.budgets[reasoner.budget]
    print(
        f"{name}: thoughts of up to {reasoner.budget} tokens at temperature "
        f"{reasoner.temperature:g}\n{table(rows)}"
    )
    print(tiers_line(found.tiers_by), end="")
    values |= {
        "budget": reasoner.budget,
        "temperature": reasoner.temperature,
        "tiers_by": found.tiers_by,
        "rows": [row._asdict() for row in rows],
    }
    report.write(config, restored, values)
