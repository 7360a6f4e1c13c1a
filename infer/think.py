"""What more computation at test time gives: `--mode=think`, for each kind of run that has it."""

from jaxlib_methods.infer import (
    evaluate,
    kinds,
    reasoning,
    think_budget,
    think_depth,
    think_energy,
    think_language,
)
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError or FileNotFoundError where there is no such data, or no such budget."""
    if restored.kind == "questions":
        think_depth.check(config)
    elif restored.kind == "thoughts":
        reasoning.check(config, restored)
    else:
        evaluate.check(config, restored)


def run(config: InferConfig, restored: Restored) -> None:
    """Prints a table, draws it, and writes JSON where `output` is given.

    Raises ValueError for a kind of run that cannot think.
    """
    kinds.check_mode(config.workdir, restored.kind, config.mode)
    runs = {
        "energy": think_energy,
        "questions": think_depth,
        "recurrent": think_language,
        "thoughts": think_budget,
    }
    runs[restored.kind].run(config, restored)
