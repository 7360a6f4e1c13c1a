"""Where the time of a run goes: seconds of each part, and steps that take far too long."""

import contextlib
import json
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Self

import jax
from etils import epath

STARTS_FILE = "starts.jsonl"
LEAST_SECS = 60.0  # nothing shorter is too long for a step
SAVE_SECS = 300.0  # of the wait for a checkpoint, which no median tells
COMPILE_SECS = 1800.0  # what compiling a large model may take, which none tells either
_KEPT_STEPS = 100
_CHECK_SECS = 1.0


def _stacks() -> str:
    """Where every thread of Python stands, the main one first."""
    frames = sys._current_frames()  # faulthandler would leave out all but a hundred threads
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    return "\n".join(
        f"{names.get(ident, 'a thread')}:\n{''.join(traceback.format_stack(frames[ident]))}"
        for ident in sorted(frames, key=lambda ident: ident != main)
    )


def _say(what: str) -> None:
    print(
        f"process {jax.process_index()}: {what}; where its threads stand:\n{_stacks()}",
        file=sys.stderr,
        flush=True,
    )


class Stopwatch:
    """Seconds of the parts of a run's start-to-end, the rest of which are its steps.

        watch = Stopwatch(started)
        with watch("evaluation"):
            ...
        watch.read()  # {"time/evaluation_secs": 3.1, "time/steps_secs": 60.2, ...}

    started: `time.perf_counter()` where the run began.
    """

    def __init__(self, started: float, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._started = clock, started
        self._secs: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str, *, hidden: Callable[[], bool] | None = None) -> Iterator[None]:
        """Counts what happens inside to a part; parts do not contain each other.

        hidden: asked at the end; True where steps went on all the while: nothing is counted. What
        outlasts them counts whole, also the time in which they went on.
        """
        begin = self._clock()
        try:
            yield
        finally:
            if hidden is None or not hidden():
                self.add(part, self._clock() - begin)

    def add(self, part: str, secs: float) -> None:
        """Counts seconds to a part."""
        self._secs[part] = self._secs.get(part, 0.0) + secs

    def read(self) -> dict[str, float]:
        """`time/PART_secs`, the steps' and all of them, and `time/goodput`, the steps' share.

        All of it is of this start alone; what the ones before it have cost says `Starts`.
        """
        total = self._clock() - self._started
        parts = {**self._secs, "steps": total - sum(self._secs.values()), "total": total}
        named = {f"time/{part}_secs": secs for part, secs in parts.items()}
        return named | {"time/goodput": parts["steps"] / total}


class Starts:
    """WORKDIR/starts.jsonl: what the starts of a run cost, a line each; process 0 writes.

        starts = Starts(workdir, 120, start_secs=14.2, again_secs=11.0)
        starts.first_step_done(compile_secs=30.5)
        starts.lost_secs

    step: the one that a start goes on from. again_secs: of training behind it that the metrics had
    recorded, and have no longer.

    `lost_secs` is of all starts up to this one: training that is done again, and the start and the
    compilation of every earlier one, which an unbroken run would not have had. What a killed start
    did after its last record is known to nobody. A line that is damaged or missing does not count.
    """

    def __init__(
        self, workdir: epath.PathLike, step: int, *, start_secs: float, again_secs: float
    ) -> None:
        self._path = epath.Path(workdir) / STARTS_FILE
        self._earlier = _accounts(self._path)
        self.lost_secs = again_secs
        if self._earlier:
            last = self._earlier[-1]
            if step <= last["step"]:  # its compilation is among what is done again
                self.lost_secs = max(again_secs, last["compile_secs"])
            else:
                self.lost_secs += last["compile_secs"]
            self.lost_secs += last["lost_secs"] + last["start_secs"]
        self._account = {"step": step, "lost_secs": self.lost_secs, "start_secs": start_secs}
        self._write(compile_secs=0.0)

    def first_step_done(self, *, compile_secs: float) -> None:
        """Adds what is known once a start trains."""
        self._write(compile_secs=compile_secs)

    def _write(self, **more: float) -> None:
        if jax.process_index() == 0:
            lines = [
                json.dumps(account) + "\n" for account in [*self._earlier, self._account | more]
            ]
            partial = self._path.with_name(STARTS_FILE + ".partial")
            partial.write_text("".join(lines))
            partial.replace(self._path)


def _accounts(path: epath.Path) -> list[dict[str, float]]:
    """The lines of a starts.jsonl that are whole."""
    names = ("step", "lost_secs", "start_secs", "compile_secs")
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(KeyError, TypeError, ValueError):
                account = json.loads(line)
                found.append({name: account[name] + 0 for name in names})
    return found


class Watchdog:
    """Prints where every thread stands when a step takes far longer than the ones before it.

    It ends nothing: who waits for a lost process, or a slow disk, is seen in the log. factor: of
    the median of the last 100 steps, at least a minute; 0 does not watch. Where a program is
    compiled it has half an hour more, which holds for a first step too, and a save that holds up
    the run has five minutes.
    """

    def __init__(self, factor: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._factor, self._clock = factor, clock
        self._secs: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._last: float | None = None
        self._aside: tuple[str, float, float] | None = None  # what, since when, seconds it has
        self._step, self._compiles = 0, False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step_begins(self, step: int, *, compiles: bool = False) -> None:
        """Watches a step, from here or from the end of the one before it.

        compiles: it is the first one of its program, and does not count for the median.
        """
        self._step, self._compiles = step, compiles
        if self._last is None:
            self._last = self._clock()

    def step_done(self) -> None:
        """Marks the end of a step."""
        now = self._clock()
        if self._last is not None and not self._compiles:
            self._secs.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Leaves out what follows, up to the next step."""
        self._last = None

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Watches what happens inside, which waits for a checkpoint and is no step."""
        return self._watch_aside("a save", SAVE_SECS)

    def evaluating(
        self, batches: int, *, compiles: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Watches what happens inside, which evaluates batches and is no step."""
        return self._watch_aside("an evaluation", self._bound(batches, compiles=compiles))

    @contextlib.contextmanager
    def _watch_aside(self, what: str, secs: float) -> Iterator[None]:
        self._last, self._aside = None, (what, self._clock(), secs)
        try:
            yield
        finally:
            self._aside = None

    def _bound(self, steps: int = 1, *, compiles: bool) -> float:
        """Seconds that as much work as that of some steps has, before it is too long."""
        usual = median(self._secs) if self._secs else 0.0
        more = COMPILE_SECS if compiles or not self._secs else 0.0
        return max(LEAST_SECS, self._factor * usual * steps) + more

    def check(self) -> bool:
        """Whether what is under way takes too long; says so once."""
        now, last, aside = self._clock(), self._last, self._aside
        if aside is not None:
            what, since, most = aside
            if now - since <= most:
                return False
            self._aside = None
            _say(f"{what} has held up the run for {now - since:.0f} s")
            return True
        if last is None or now - last <= self._bound(compiles=self._compiles):
            return False
        self._last = None
        what = f"step {self._step}" + (" with its compilation" if self._compiles else "")
        usual = f", the last ones took {median(self._secs):.2f} s" if self._secs else ""
        _say(f"{what} has taken {now - last:.0f} s{usual}")
        return True

    def _watch(self) -> None:
        while not self._closed.wait(_CHECK_SECS):
            self.check()

    def __enter__(self) -> Self:
        if self._factor:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._factor:
            self._thread.join()
