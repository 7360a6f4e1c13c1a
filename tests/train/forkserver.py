"""Starts `python -m jaxlib_methods.train` quickly: imports everything once, forks for each run.

Reads one JSON object a line: {"arguments": [...], "stdout": path, "stderr": path, "config": {}}
starts a run (config: JAX options) and answers with its process id; {"wait": id} answers with its
exit code, negative for a signal.
"""

import json
import os
import runpy
import sys
import traceback

import jax

import jaxlib_methods.train.loop  # noqa: F401  (what a run imports)


def start(request: dict) -> int:
    """Forks a run and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = 1
    try:
        for name, value in request["config"].items():
            jax.config.update(name, value)
        sys.argv = ["jaxlib_methods.train", *request["arguments"]]
        runpy.run_module("jaxlib_methods.train", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serves until its input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = start(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
