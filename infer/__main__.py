"""Uses a finished model.

    python -m jaxlib_methods.infer --workdir=runs/late_to_early_tiny --prompt="def "
    python -m jaxlib_methods.infer --workdir=runs/late_to_early_tiny --mode=evaluate
    python -m jaxlib_methods.infer --workdir=runs/late_to_early_tiny --mode=export --output=OUT

--workdir is a run or a Hugging Face folder. Generation takes --temperature, --top_k, --top_p,
--min_p, --stop, --num_samples and more prompts; --help describes all flags.
"""

import dataclasses

from absl import app, logging
from absl.flags import FLAGS

from jaxlib_methods.infer import config
from jaxlib_methods.models import partitioning
from jaxlib_methods.train import flags


def main(argv: list[str]) -> None:
    """From parsed flags to text or numbers."""
    del argv
    with flags.one_line_errors():
        asked = config.from_flags()
        from jaxlib_methods.infer import (
            evaluate,
            export,
            generate,
            restore,
        )  # wrong flags fail before

        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # app.run sets INFO, at which Orbax talks
        mesh = partitioning.make_mesh(**dataclasses.asdict(asked.mesh))
        restored = restore.restore(asked.workdir, mesh=mesh, step=asked.step)
        modes = {"generate": generate, "evaluate": evaluate, "export": export}
        modes[asked.mode].run(asked, restored)


if __name__ == "__main__":
    config.define()
    app.run(main, flags_parser=flags.parse_or_exit)
