"""A run from its configuration to its last checkpoint; see `run`."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from etils import epath
from jax.sharding import Mesh

from jaxlib_methods.models import partitioning
from jaxlib_methods.train import checkpoint, data, distributed, lock, metrics, report, run_record
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train import step as train_step
from jaxlib_methods.train.checkpoint import Checkpoints
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.prepare import (
    Placed,
    Prepared,
    check_records,
    mesh_of,
    place,
    plan,
    prepare,
    start_of,
    train_step_of,
)
from jaxlib_methods.train.state import TrainState
from jaxlib_methods.train.watch import Starts, Stopwatch, Watchdog


def run(config: RunConfig) -> None:
    """Trains what the configuration says, with what it needs before and beside it.

    A value `preset:NAME` of the method (a teacher) is trained first, in WORKDIR/FIELD; with
    `compare` the plain baseline follows, in WORKDIR/baseline. All of them see the same data. A
    run that is finished is not trained again. Ends with a table and, with matplotlib, a picture.
    Raises SystemExit(0) after saving where it was told to stop (SIGTERM), and SystemExit(1) where
    a method saw its training go wrong and `train.on_failure=stop`.
    """
    started = time.perf_counter()
    planned = plan(config)
    prepared = {name: prepare(part, planned) for name, part in planned.items()}
    distributed.initialize()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"{jax.process_count()} processes share these devices but have not been joined; set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    for part in prepared.values():
        _place(part)  # where one does not fit the mesh, none has been announced or written yet
    runs = report.Runs()
    with contextlib.ExitStack() as alone, distributed.stop_signal() as stop:
        for part in prepared.values():
            if jax.process_index() == 0:
                alone.enter_context(lock.hold(part.config.workdir))
            check_records(part)  # again: another run may have been here while this one waited
        for name, part in prepared.items():
            kind = part.config.preset or part.config.method
            _say(f"training the {name} ({kind}) in {part.config.workdir}")
            train(part, stop=stop, started=started)
            started = time.perf_counter()
            if jax.process_index() == 0:
                runs[name] = _summary(part)
    if jax.process_index() == 0:
        report.finish(runs, config.workdir)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def train(prepared: Prepared, *, stop: threading.Event, started: float) -> None:
    """One run: restores or creates its state, trains to `train.num_steps`, saves.

    stop: set by whoever wants the run to save and raise SystemExit(0). started:
    `time.perf_counter()` at its start.
    """
    config = prepared.config
    mesh, placed = _place(prepared)
    keep = config.checkpoint.keep
    with (
        jax.set_mesh(mesh),
        Checkpoints(config.workdir, keep=keep, record=prepared.record) as checkpoints,
    ):
        if (checkpoints.latest_step or 0) < config.train.num_steps:
            state = _first_state(prepared, placed, checkpoints)
            if jax.process_index() == 0:
                run_record.write_config(config.workdir, prepared.record)
            _Loop(prepared, placed, mesh, checkpoints, stop).run(state, started)


def _place(prepared: Prepared) -> tuple[Mesh, Placed]:
    mesh = mesh_of(prepared.config.mesh)
    return mesh, place(prepared.config, prepared.method, prepared.dataset, mesh)


def _summary(prepared: Prepared) -> report.Summary:
    params = jax.eval_shape(lambda: prepared.method.init_params(jax.random.key(0)))
    return report.summarise(
        prepared.config.workdir,
        num_params=train_state.num_params(params),
        bytes_per_token=prepared.validation.bytes_per_token,
        stop_step=prepared.method.until,
    )


def _first_state(
    prepared: Prepared,
    placed: Placed,
    checkpoints: Checkpoints,
) -> TrainState:
    """Own run > given run > given weights > new."""
    config, method = prepared.config, prepared.method
    optimizer, abstract = placed
    given, weights = config.checkpoint.restore_from, start_of(config)
    key = jax.random.key(config.seed)
    if checkpoints.latest_step is not None:
        _say(f"continuing from step {checkpoints.latest_step}")
        return checkpoints.restore(abstract)
    if given is not None:
        state = checkpoint.restore_run(given, abstract, prepared.record)
        _say(f"continuing {given} from step {int(state.step)}")
        if int(state.step) >= config.train.num_steps:
            raise ValueError(
                f"checkpoint.restore_from={given} is at step {int(state.step)}, "
                f"train.num_steps={config.train.num_steps} leaves nothing to train; raise it"
            )
        return state
    if weights is not None:
        _say(f"starting from the weights in {weights}")
        found = checkpoint.load_pretrained(
            weights, mesh=mesh_of(config.mesh), dtype=config.model.param_dtype
        )
        return train_state.with_params(method, optimizer, abstract, found.params, key)
    return train_state.create_state(method, optimizer, abstract, key)


class _Loop:
    """The steps of one run, from its first state to its last checkpoint."""

    def __init__(
        self,
        prepared: Prepared,
        placed: Placed,
        mesh: Mesh,
        checkpoints: Checkpoints,
        stop: threading.Event,
    ) -> None:
        config = prepared.config
        self._prepared, self._config, self._method = prepared, config, prepared.method
        self._placed, self._mesh = placed, mesh
        self._checkpoints, self._stop = checkpoints, distributed.StopVote(mesh, stop)
        self._key = jax.random.fold_in(jax.random.key(config.seed), 1)
        self._pending = metrics.Accumulator()
        self._profiling = False
        self._warnings: set[str] = set()
        self._failure: str | None = None
        self._watchdog = Watchdog(config.train.stall_factor)
        self._throughput = metrics.Throughput(
            tokens_per_step=config.data.batch_size * prepared.dataset.sequence_length,
            flops_per_token=self._method.flops_per_token,
            device_kinds=[device.device_kind for device in mesh.devices.flat],
        )

    def run(self, state: TrainState, started: float) -> None:
        """Trains from `state` on. Raises SystemExit where it was told to stop, or stops itself."""
        config, step = self._config, int(state.step)
        process_0 = jax.process_index() == 0
        done_before = report.seconds_so_far(config.workdir) if process_0 else 0.0
        placed = {"mesh": self._mesh, "spec": partitioning.batch_spec()}
        size = config.data.batch_size
        saved = self._checkpoints.latest_step is not None
        if not saved and (epath.Path(config.workdir) / metrics.FILE_NAME).exists():
            _say(f"the run before this one in {config.workdir} saved nothing; its metrics go")
        self._held_out = data.validation_batches(
            self._prepared.validation,
            batch_size=size,
            max_batches=config.train.eval_batches,
            **placed,
        )
        with (
            metrics.MetricsWriter(
                config.workdir,
                num_steps=config.train.num_steps,
                tensorboard=config.train.tensorboard,
                start_step=step + 1 if saved else 0,
            ) as self._writer,
            contextlib.closing(
                data.device_batches(
                    self._prepared.dataset,
                    batch_size=size,
                    start_step=step,
                    num_threads=config.data.num_threads,
                    **placed,
                )
            ) as batches,
            self._watchdog,
        ):
            self._started, self._first_step = started, step
            kept = report.seconds_so_far(config.workdir) if process_0 else 0.0
            self._begun = time.perf_counter() - kept
            self._watch = Stopwatch(started)
            start_secs = time.perf_counter() - started
            self._watch.add("start", start_secs)
            self._writer.flush()  # in a bucket, too, what is counted as lost is now gone
            self._starts = Starts(
                config.workdir, step, start_secs=start_secs, again_secs=done_before - kept
            )
            self._enter_phase(step)
            try:
                self._steps(state, batches)
            finally:
                self._end_profile()  # a run that ends inside the window keeps what was seen

    def _enter_phase(self, step: int) -> None:
        """Builds the programs of the method that step `step` belongs to, and frees the last's."""
        while self._method.until is not None and step >= self._method.until:
            assert self._method.then is not None
            self._method = self._method.then
        self._extra: Any = None  # before the next one is made: both need not fit
        self._extra = self._method.init(jax.random.fold_in(self._key, 0))
        self._train_step = train_step_of(self._config, self._method, self._placed)
        self._eval_step = train_step.make_eval_step(
            self._method, num_microbatches=self._config.train.num_microbatches
        )
        self._throughput.read()  # what is left was another program's
        self._throughput.flops_per_token = self._method.flops_per_token
        self._compiled = self._evaluated = False
        self._pause()

    def _steps(self, state: TrainState, batches: Iterator[Any]) -> None:
        train, every = self._config.train, self._config.checkpoint.every
        for step in range(self._first_step, train.num_steps):
            if step == self._method.until:
                self._drain(step)
                self._enter_phase(step)
            self._profile(step, state)
            self._watchdog.step_begins(step + 1, compiles=not self._compiled)
            # The devices wait for a batch only once they have done the last one.
            with self._watch("input", hidden=lambda state=state: not state.step.is_ready()):
                batch = next(batches)
            with contextlib.nullcontext() if self._compiled else self._watch("compile"):
                state, step_metrics = self._train_step(state, self._extra, batch, self._key)
            self._compiled = True
            done = step + 1
            self._pending.add(done, step_metrics)
            if done == self._first_step + 1:
                self._announce(state)
            else:
                self._throughput.step_done()
                self._watchdog.step_done()
                self._log(done - 1)
            last = done == train.num_steps
            stopping = self._stop()
            if last or done % train.eval_every == 0:
                self._drain(done)
                self._evaluate(state, done)
            failure = self._failure  # of what every process has read: the same on all of them
            if last or stopping or failure or (every and done % every == 0):
                self._drain(done)
                self._writer.flush()
                with self._watch("checkpoint"), self._watchdog.saving():
                    self._checkpoints.save(state)
                self._pause()
            if last or stopping or failure:
                with self._watch("checkpoint"), self._watchdog.saving():
                    self._checkpoints.wait()
                lost = {"time/lost_secs": self._starts.lost_secs}
                self._writer.write(done, self._watch.read() | lost)
            if stopping or failure:
                self._end(done, failure)
        self._profile(train.num_steps, state)

    def _end(self, step: int, failure: str | None) -> NoReturn:
        """Says why the run has ended, which is saved."""
        if failure is None:
            _say(f"stopped by a signal at step {step}, saved; the same command goes on")
            raise SystemExit(0)
        _say(f"stopped at step {step}, saved: {failure}; --train.on_failure=warn goes on as it is")
        raise SystemExit(1)

    def _announce(self, state: TrainState) -> None:
        jax.block_until_ready(state.step)
        _say(f"first step done {time.perf_counter() - self._started:.1f} s after the start")
        self._starts.first_step_done(compile_secs=self._watch.read()["time/compile_secs"])
        self._pause()

    def _pause(self) -> None:
        """What follows is no step: neither its rate nor its length counts."""
        self._throughput.pause()
        self._watchdog.pause()

    def _log(self, step: int) -> None:
        """Writes the metrics up to `step`, whose successor is being computed."""
        train = self._config.train
        due = step % train.log_every == 0 or step == train.num_steps
        if due and step > self._first_step:
            values = self._pending.read()
            if values:
                values |= self._throughput.read() | self._elapsed() | self._judge(step, values)
                self._writer.write(step, values)

    def _judge(self, step: int, values: dict[str, float]) -> dict[str, int]:
        """What the method sees going wrong, as 1 or 0; says it once, or remembers it to stop."""
        monitor = self._method.monitor
        found = {} if monitor is None else monitor({"step": step, **values})
        for name, sentence in found.items():
            if sentence is None or name in self._warnings:
                continue
            self._warnings.add(name)
            if self._config.train.on_failure == "stop":
                self._failure = self._failure or sentence
            else:
                _say(f"warning at step {step}: {sentence}")
        return {name: int(sentence is not None) for name, sentence in found.items()}

    def _elapsed(self) -> dict[str, float]:
        return {"train/elapsed_secs": time.perf_counter() - self._begun}

    def _drain(self, step: int) -> None:
        """Waits for step `step`, so that nothing later is done with numbers that are not finite."""
        self._pending.drain()
        self._log(step)
        self._pause()

    def _evaluate(self, state: TrainState, step: int) -> None:
        total = metrics.Accumulator("validation")
        watched = self._watchdog.evaluating(len(self._held_out), compiles=not self._evaluated)
        with self._watch("evaluation"), watched:
            for batch in self._held_out:
                total.add(step, self._eval_step(state, self._extra, batch, self._key))
            total.drain()
        self._evaluated = True
        values = total.read()
        self._writer.write(step, values | self._elapsed() | self._judge(step, values))

    def _profile(self, step: int, state: TrainState) -> None:
        train = self._config.train
        first = max(train.profile_start, self._first_step)
        end = min(train.profile_start + train.profile_steps, train.num_steps)
        if step == first < end:
            jax.profiler.start_trace(str(epath.Path(self._config.workdir) / "profile"))
            self._profiling = True
        elif step == end:
            jax.block_until_ready(state)
            self._end_profile()

    def _end_profile(self) -> None:
        if self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False
