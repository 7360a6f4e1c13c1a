"""Trains a language model.

    python -m jaxlib_methods.train --preset=late_to_early_tiny
    python -m jaxlib_methods.train --method=next_token --model.num_layers=8 --mesh.fsdp=8

--list_presets lists ready runs. Flags change single values of a preset; a --flagfile counts where
it stands. --print_config prints the whole configuration as a flagfile. Without --workdir a run
writes to runs/PRESET or runs/METHOD, and continues there when it is started again.
"""

from absl import app, logging
from absl.flags import FLAGS

from jaxlib_methods.train import flags, presets
from jaxlib_methods.train.config import require_complete


def main(argv: list[str]) -> None:
    """From parsed flags to a finished run."""
    del argv
    with flags.one_line_errors():
        if FLAGS.list_presets:
            print(presets.table(), end="")
            return
        config = flags.run_config()
        if FLAGS.print_config:
            print(flags.to_flagfile(config), end="")
            return
        if FLAGS.compile_only:
            from jaxlib_methods.train import compile_only, compile_search

            if FLAGS.search:
                compile_search.run(config, FLAGS.topology, most=FLAGS.search)
            else:
                workdir = config.workdir if FLAGS["workdir"].present else None
                compile_only.run(config, FLAGS.topology, workdir=workdir)
            return
        require_complete(config)
        from jaxlib_methods.train import loop  # heavy: wrong flags fail before it is imported

        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # app.run sets INFO, at which Orbax talks
        loop.run(config)


if __name__ == "__main__":
    flags.define()
    app.run(main, flags_parser=flags.parse_or_exit)
