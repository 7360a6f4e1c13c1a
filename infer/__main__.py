"""Uses a finished model.

    python -m jaxlib_methods.infer --workdir=runs/late_to_early_tiny --prompt="def "
    python -m jaxlib_methods.infer --workdir=runs/late_to_early_tiny --mode=evaluate
    python -m jaxlib_methods.infer --workdir=runs/late_to_early_tiny --mode=export --output=OUT
    python -m jaxlib_methods.infer --workdir=runs/transformer_tiny --mode=entropy --output=FILE
    python -m jaxlib_methods.infer --workdir=runs/energy_image_tiny --mode=denoise --output=a.json
    python -m jaxlib_methods.infer --workdir=runs/energy_tiny --mode=think --output=think.json
    python -m jaxlib_methods.infer --workdir=runs/depth_recurrence_tiny --mode=think
    python -m jaxlib_methods.infer --workdir=runs/energy_tiny --mode=score --prompt="def f():"
    python -m jaxlib_methods.infer --workdir=runs/reinforcement_midtraining_parity --mode=evaluate

--workdir is a run or a Hugging Face folder. Generation takes --temperature, --top_k, --top_p,
--min_p, --stop, --num_samples and more prompts; an energy run takes --think.num_steps,
--think.num_candidates and more, in every mode, a model that is recurrent in depth
--depth.num_steps, --depth.exit and more, and a run that thinks before tokens --reason.budget and
more; --help describes all flags.
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
            denoise,
            entropy,
            evaluate,
            evaluate_thoughts,
            export,
            generate,
            generate_thoughts,
            report,
            restore,
            score,
            think,
        )  # wrong flags fail before

        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # app.run sets INFO, at which Orbax talks
        found = restore.describe(
            asked.workdir, step=asked.step, think=asked.think, depth=asked.depth
        )
        restore.check(found, asked.workdir, asked.mode, reason=asked.reason)
        modes = {
            "generate": generate,
            "evaluate": evaluate,
            "export": export,
            "think": think,
            "score": score,
            "denoise": denoise,
            "entropy": entropy,
        }
        if found.kind == "thoughts":
            modes["evaluate"] = evaluate_thoughts
        if asked.reason:
            modes["generate"] = generate_thoughts
        mode = modes[asked.mode]
        report.check_output(asked)
        mode.check(asked, found)
        mesh = partitioning.make_mesh(**dataclasses.asdict(asked.mesh))
        restored = restore.load(found, asked.workdir, mesh)
        mode.run(asked, restored._replace(seed=asked.seed))


if __name__ == "__main__":
    config.define()
    app.run(main, flags_parser=flags.parse_or_exit)
