"""The kinds of models and what each can do: the one place that refuses a mode or a flag."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.tasks.restoration import RestorationConfig
from jaxlib_methods.train.config import RunConfig

Kind = Literal["plain", "recurrent", "energy", "questions", "images", "thoughts"]


class _About(NamedTuple):
    """what: the kind as a noun. modes: of `InferConfig`."""

    what: str
    modes: tuple[str, ...]


KINDS: dict[Kind, _About] = {
    "plain": _About("a plain language model", ("generate", "evaluate", "export", "entropy")),
    "recurrent": _About(
        "a language model that is recurrent in depth", ("generate", "evaluate", "export", "think")
    ),
    "energy": _About("an energy run", ("generate", "evaluate", "think", "score")),
    "questions": _About("a run on reasoning questions", ("think",)),
    "images": _About("a run on images", ("denoise",)),
    "thoughts": _About(
        "a run that thinks before tokens", ("generate", "evaluate", "export", "think", "entropy")
    ),
}
SECTIONS: dict[str, Kind] = {"think": "energy", "depth": "recurrent", "reason": "thoughts"}


def kind_of(config: RunConfig | None, model: TransformerConfig) -> Kind:
    """The kind of a run, or (None) of a Hugging Face folder with this model."""
    method = None if config is None else config.method_config
    if isinstance(method, RestorationConfig):
        return "images"
    if isinstance(method, DepthRecurrenceConfig) and method.task != "language":
        return "questions"
    if isinstance(method, EnergyConfig):
        return "energy"
    if isinstance(method, ReinforcementMidtrainingConfig):
        return "thoughts"
    return "recurrent" if model.recurrence else "plain"


def check_mode(workdir: str, kind: Kind, mode: str) -> None:
    """Raises ValueError where a kind cannot do what a mode asks for."""
    if mode in KINDS[kind].modes:
        return
    able = [about.what for about in KINDS.values() if mode in about.modes]
    raise ValueError(
        f"--mode={mode} is for {either(able)}; {workdir} is {KINDS[kind].what}: give "
        f"--mode={either(KINDS[kind].modes)}"
    )


def check_flags(workdir: object, kind: Kind, **sections: Mapping[str, Any]) -> None:
    """Raises ValueError where flags of a section, as `depth`, are given for another kind."""
    for section, fields in sections.items():
        wanted = SECTIONS[section]
        if fields and kind != wanted:
            raise ValueError(
                f"--{section}.{next(iter(fields))} is for {KINDS[wanted].what}; {workdir} is "
                f"{KINDS[kind].what}"
            )


def either(names: list[str] | tuple[str, ...]) -> str:
    """`a, b or c`."""
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else last
