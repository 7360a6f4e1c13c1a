"""How a run of reinforcement mid-training thinks when it is used."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasonConfig:
    """How long it thinks, and about what.

    budget: tokens of a thought: the number that its prompt shows, and where it is closed if the
        model has not; none is the budget of the run at its checkpoint. Generation thinks where
        this is given, and otherwise continues plainly.
    temperature: of thoughts; 0 always takes the likeliest token, none is the run's. Answers and
        what follows them are drawn by --temperature and its like.
    every: tokens of text from one thought to the next, which does not see the last; 0 thinks once.
    show: whether generation prints thoughts.
    examples: places of the validation set to think about where no prompt is given.
    places: of each row of text that evaluation and thinking draw, evenly from the tiers; none is
        4. Of questions there is one, their answer.
    """

    budget: int | None = None
    temperature: float | None = None
    every: int = 0
    show: bool = True
    examples: int = 8
    places: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("budget", 1), ("every", 0), ("examples", 1), ("places", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"reason.{name}={value} must be at least {least}")
        t = self.temperature
        if t is not None and not (t >= 0 and math.isfinite(t)):
            raise ValueError(f"reason.temperature={t} must be finite and at least 0")
