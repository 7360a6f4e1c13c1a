"""Times candidates side by side and prints Markdown rows that say where the numbers come from.

For the scripts beside it, which are run by hand: `python tests/benchmarks/train_step.py`. The
candidates take turns, so that whatever else the machine does hits all of them: compare the ratios
of one run, not the milliseconds of two.
"""

import datetime
import functools
import importlib.metadata
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each candidate.", lower_bound=1)
CALLS = flags.DEFINE_integer("calls", 5, "Timed calls in a turn.", lower_bound=1)

Candidate = Callable[[], Any]  # one call; gives something to wait for
Times = dict[str, np.ndarray]  # candidate -> milliseconds per call, one number a round

_FLOPS, _BYTES = "its FLOPs alone", "its bytes alone"
_SIDE = 1024  # at most, of the weight in the product that is timed
_PIECE = 2**18  # numbers
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_HEADER = (
    "candidate",
    "ms a call (quartiles)",
    "tokens/s",
    "ratio (quartiles)",
    "device",
    "versions",
    "date",
    "commit",
    "command",
)


def measure(candidates: Mapping[str, Candidate]) -> Times:
    """Times the candidates in turns; every round starts with another one.

    A turn is one call that is not timed, so that the last candidate's threads and cached data are
    gone, and `--calls` calls timed together, from the first to the end of the last.
    """
    names = list(candidates)
    for candidate in candidates.values():
        jax.block_until_ready(candidate())  # compiles
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(ROUNDS.value):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_turn(candidates[name]))
    return {name: np.array(values) for name, values in times.items()}


def _turn(candidate: Candidate) -> float:
    jax.block_until_ready(candidate())
    started = time.perf_counter()
    for _ in range(CALLS.value):
        result = candidate()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / CALLS.value * 1e3


def bounds(flops: float, moved: float, dtype: Any) -> dict[str, Candidate]:
    """The sides of a roofline, to be measured beside what does that work.

    One is a matrix product in `dtype` of as many operations, if there are any, the other a scaling
    that reads and writes as many bytes; on a CPU in pieces, because large results are new pages of
    memory, which cost more than writing them.
    """
    numbers = moved / 8
    pieces = max(1, round(numbers / _PIECE)) if jax.default_backend() == "cpu" else 1
    lines = [jnp.ones(round(numbers / pieces), jnp.float32) for _ in range(pieces)]
    found = {_BYTES: functools.partial(jax.jit(lambda lines: [1.5 * x for x in lines]), lines)}
    if flops:
        side = min(_SIDE, round((flops / 2) ** (1 / 3)))  # no weight larger than what it multiplies
        left = jnp.ones((round(flops / (2 * side**2)), side), dtype)
        weight = jnp.ones((side, side), dtype)
        found[_FLOPS] = functools.partial(jax.jit(jnp.matmul), left, weight)
    return found


def report_roofline(times: Times) -> dict[str, float]:
    """Prints and returns which share of each candidate's time the slower of its `bounds` takes."""
    sides = {_FLOPS, _BYTES} & times.keys()
    least = np.max([times[side] for side in sides], axis=0)
    shares = {name: float(np.median(least / t)) for name, t in times.items() if name not in sides}
    print("\nOf the roofline: " + ", ".join(f"{name} {x:.2f}" for name, x in shares.items()))
    return shares


def fastest(times: Times, names: list[str]) -> str:
    """The one of `names` with the smallest median."""
    return min(names, key=lambda name: float(np.median(times[name])))


def ratios(times: Times, reference: str) -> dict[str, float]:
    """Median over the rounds of each candidate's time divided by the reference's."""
    return {name: float(np.median(values / times[reference])) for name, values in times.items()}


def report(title: str, times: Times, *, reference: str, tokens_per_call: int) -> dict[str, float]:
    """Prints a row per candidate and returns `ratios(times, reference)`."""
    source = provenance()
    header = [f"ratio to {reference} (quartiles)" if "ratio" in h else h for h in _HEADER]
    print(f"\n{title}\n\n{_row(header)}\n{_row(['---'] * len(header))}")
    for name, values in times.items():
        speed = f"{tokens_per_call / np.median(values) * 1e3:,.0f}"
        ratio = _spread(values / times[reference])
        print(_row([name, _spread(values), speed, ratio, *source]))
    if jax.default_backend() == "cpu":
        print("\nOn a CPU only the ratios mean anything.")
    return ratios(times, reference)


def provenance() -> tuple[str, ...]:
    """Device, versions, date, commit and command: the end of every row."""
    return _device(), _versions(), datetime.date.today().isoformat(), _commit(), _command()


def check_goal(what: str, value: float, *, limit: float) -> None:
    """Prints whether `value` is at most `limit`."""
    verdict = "met" if value <= limit else "missed"
    print(f"\nGoal: {what} at most {limit:g}. Measured {value:.4g}: {verdict}.")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: np.ndarray) -> str:
    low, median, high = (
        f"{x:.0f}" if x >= 1000 else f"{x:.4g}" for x in np.percentile(values, (25, 50, 75))
    )
    return f"{median} ({low} to {high})"


def _device() -> str:
    kind = jax.devices()[0].device_kind
    return f"{kind}, {os.cpu_count()} cores" if jax.default_backend() == "cpu" else kind


def _versions() -> str:
    used = ["jax"] + [
        name for name in ("torch", "transformers", "trl", "tokamax") if name in sys.modules
    ]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in used)


def _commit() -> str:
    """The checkout's commit, `-dirty` where tracked files differ from it."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return "not a git checkout"
    command = [git, "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _command() -> str:
    script = pathlib.Path(sys.argv[0]).resolve()
    path = script.relative_to(_ROOT) if script.is_relative_to(_ROOT) else script.name
    return f"`{shlex.join(['python', str(path), *sys.argv[1:]])}`"
