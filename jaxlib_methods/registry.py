"""The one table of methods: name -> (configuration, maker)."""

from collections.abc import Callable
from typing import Any

from jaxlib_methods import late_to_early, next_token
from jaxlib_methods.method import Context, Method

METHODS: dict[str, tuple[type, Callable[[Any, Context], Method]]] = {
    "next_token": (next_token.NextTokenConfig, next_token.make),
    "late_to_early": (late_to_early.LateToEarlyConfig, late_to_early.make),
}


def config_class(name: str) -> type:
    """The configuration dataclass of a method. Raises ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {sorted(METHODS)}")
    return METHODS[name][0]


def build(name: str, config: Any, context: Context) -> Method:
    """Makes the method `name` for a run. Raises ValueError for an unknown name."""
    config_class(name)
    return METHODS[name][1](config, context)
