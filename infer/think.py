"""What more computation at test time gives: `--mode=think`, for each kind of run that has it."""

from jaxlib_methods.infer import kinds, think_budget, think_depth, think_energy, think_language
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored


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
