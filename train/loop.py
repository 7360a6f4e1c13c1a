"""A run from its configuration to its last checkpoint; see `run`."""

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlib_methods import registry
from jaxlib_methods.method import Batch, Context, Method
from jaxlib_methods.models import partitioning
from jaxlib_methods.train import checkpoint, data, distributed, metrics, report
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train import step as train_step
from jaxlib_methods.train.checkpoint import Checkpoints, Record
from jaxlib_methods.train.config import MeshConfig, RunConfig
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.state import TrainState
from jaxlib_methods.train.tokenizer import Tokenizer, load_tokenizer


def run(config: RunConfig) -> None:
    """Trains what the configuration says, with what it needs before and beside it.

    A value `preset:NAME` of the method (a teacher) is trained first, in WORKDIR/FIELD; with
    `compare` the plain baseline follows, in WORKDIR/baseline. All of them see the same data. A
    run that is finished is not trained again. Ends with a table and, with matplotlib, a picture.
    """
    started = time.perf_counter()
    runs = report.Runs()
    config, before = resolve_prerequisites(config)
    for name, earlier in before.items():
        _say(f"training the {name} first: {earlier.preset}, in {earlier.workdir}")
        runs[name] = train(earlier, started=started)
    _say(f"training {config.preset or config.method} in {config.workdir}")
    runs[config.method] = train(config, started=started)
    if config.compare:
        plain = baseline_of(config)
        _say(f"training the baseline, in {plain.workdir}")
        runs["baseline"] = train(plain, started=started)
    if jax.process_index() == 0:
        report.finish(runs, config.workdir)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def resolve_prerequisites(config: RunConfig) -> tuple[RunConfig, dict[str, RunConfig]]:
    """Replaces every `preset:NAME` of the method by the workdir of a run still to be trained.

    Returns the new configuration, and field name -> configuration of that run, on the same data,
    mesh and seed. Raises ValueError for an unknown preset.
    """
    from jaxlib_methods.train import presets  # presets are built from configurations

    found: dict[str, RunConfig] = {}
    fields: dict[str, str] = {}
    for field in dataclasses.fields(config.method_config):
        value = getattr(config.method_config, field.name)
        if isinstance(value, str) and value.startswith("preset:"):
            fields[field.name] = str(epath.Path(config.workdir) / field.name)
            found[field.name] = dataclasses.replace(
                presets.get(value.removeprefix("preset:")),
                workdir=fields[field.name],
                data=config.data,
                mesh=config.mesh,
                seed=config.seed,
            )
    method_config = dataclasses.replace(config.method_config, **fields)
    return dataclasses.replace(config, method_config=method_config), found


def baseline_of(config: RunConfig) -> RunConfig:
    """Plain next-token prediction on the same model, data, seed and budget."""
    return dataclasses.replace(
        config,
        method="next_token",
        method_config=None,
        compare=False,
        workdir=str(epath.Path(config.workdir) / "baseline"),
    )


@functools.cache
def mesh_of(config: MeshConfig) -> Mesh:
    """The mesh over all devices of all processes; the first call touches the devices."""
    return partitioning.make_mesh(**dataclasses.asdict(config))


def train(config: RunConfig, *, started: float | None = None) -> report.Summary:
    """One run: restores or creates its state, trains to `train.num_steps`, saves.

    started: `time.perf_counter()` at the program's start. Returns its summary, read back from
    its metrics. Raises SystemExit(0) after saving where it was told to stop (SIGTERM).
    """
    started = time.perf_counter() if started is None else started
    workdir = epath.Path(config.workdir)
    tokenizer = load_tokenizer(config.data.tokenizer, separator_id=config.data.separator_id)
    _check_vocabulary(config, tokenizer)
    dataset = data.open_dataset(config.data, tokenizer, split="train")
    validation = data.open_dataset(config.data, tokenizer, split="validation")
    record = Record(config, tokenizer.fingerprint, dataset.fingerprint)
    method = _build(config, tokenizer)
    _claim_workdir(workdir, record)
    distributed.initialize()
    mesh = mesh_of(config.mesh)
    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir, keep=config.checkpoint.keep, record=record) as checkpoints,
    ):
        optimizer = make_optimizer(config.optimizer, config.train.num_steps)
        abstract = train_state.abstract_state(method, optimizer, mesh)
        state = _first_state(config, method, optimizer, abstract, checkpoints, record)
        if int(state.step) < config.train.num_steps:
            _Loop(config, method, optimizer, abstract, mesh, checkpoints).run(
                state, dataset, validation, started
            )
    return report.summarise(
        workdir,
        num_params=train_state.num_params(abstract.params),
        bytes_per_token=validation.bytes_per_token,
        stop_step=method.until,
    )


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer} has ids up to {tokenizer.vocab_size - 1}, "
            f"model.vocab_size={config.model.vocab_size} ends below; give at least "
            f"--model.vocab_size={tokenizer.vocab_size}"
        )


def _build(config: RunConfig, tokenizer: Tokenizer) -> Method:
    def load_pretrained(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        mesh = mesh_of(config.mesh) if weights else None
        return checkpoint.load_pretrained(source, mesh=mesh, weights=weights, dtype=dtype)

    context = Context(
        model=config.model,
        num_steps=config.train.num_steps,
        sequence_length=config.data.sequence_length,
        tokenizer=tokenizer.fingerprint,
        load_pretrained=load_pretrained,
    )
    return registry.build(config.method, config.method_config, context)


def _claim_workdir(workdir: epath.Path, record: Record) -> None:
    """Makes the folder, or refuses one that cannot be written or belongs to another run."""
    saved = checkpoint.read_record(workdir)
    if saved is not None:
        checkpoint.check_same_run(saved, record, where=workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_config(workdir, record)
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be written: {error}") from error


def _first_state(
    config: RunConfig,
    method: Method,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    checkpoints: Checkpoints,
    record: Record,
) -> TrainState:
    """Own run > given run > given weights > new."""
    given, weights = config.checkpoint.restore_from, config.checkpoint.init_from
    if checkpoints.latest_step is not None:
        _say(f"continuing from step {checkpoints.latest_step}")
        return checkpoints.restore(abstract)
    if given is not None:
        _say(f"continuing {given}")
        return checkpoint.restore_run(given, abstract, record)
    if weights is not None:
        _say(f"starting from the weights in {weights}")
        found = checkpoint.load_pretrained(
            weights, mesh=mesh_of(config.mesh), dtype=config.model.param_dtype
        )
        checkpoint.check_same_architecture(found.config, config.model, where=weights)
        return train_state.with_params(optimizer, abstract, found.params)
    return train_state.create_state(method, optimizer, abstract, jax.random.key(config.seed))


class _Loop:
    """The steps of one run, from its first state to its last checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        optimizer: optax.GradientTransformation,
        abstract: TrainState,
        mesh: Mesh,
        checkpoints: Checkpoints,
    ) -> None:
        self._config, self._method, self._mesh = config, method, mesh
        self._optimizer, self._abstract = optimizer, abstract
        self._schedule = make_schedule(config.optimizer, config.train.num_steps)
        self._checkpoints = checkpoints
        self._key = jax.random.fold_in(jax.random.key(config.seed), 1)
        self._pending = metrics.Accumulator()
        self._throughput = metrics.Throughput(
            tokens_per_step=config.data.batch_size * config.data.sequence_length,
            flops_per_token=method.flops_per_token,
            device_kinds=[device.device_kind for device in mesh.devices.flat],
        )

    def run(
        self,
        state: TrainState,
        dataset: data.TextDataset,
        validation: data.TextDataset,
        started: float,
    ) -> None:
        config, step = self._config, int(state.step)
        placed = {"mesh": self._mesh, "spec": partitioning.batch_spec()}
        size = config.data.batch_size
        self._held_out = data.validation_batches(
            validation, batch_size=size, max_batches=config.train.eval_batches, **placed
        )
        with (
            metrics.MetricsWriter(
                config.workdir,
                num_steps=config.train.num_steps,
                tensorboard=config.train.tensorboard,
                start_step=step + 1,
            ) as self._writer,
            contextlib.closing(
                data.device_batches(
                    dataset,
                    batch_size=size,
                    start_step=step,
                    num_threads=config.data.num_threads,
                    **placed,
                )
            ) as batches,
            _stop_signal() as stop,
        ):
            self._started, self._first_step = started, step
            self._begun = time.perf_counter() - report.seconds_so_far(config.workdir)
            self._enter_phase(step)
            self._steps(state, batches, stop)

    def _enter_phase(self, step: int) -> None:
        """Builds the programs of the method that step `step` belongs to, and frees the last's."""
        while self._method.until is not None and step >= self._method.until:
            assert self._method.then is not None
            self._method = self._method.then
        self._extra: Any = None  # before the next one is made: both need not fit
        self._extra = self._method.init(jax.random.fold_in(self._key, 0))
        self._train_step = train_step.make_train_step(
            self._method.loss,
            self._optimizer,
            self._schedule,
            self._abstract,
            num_microbatches=self._config.train.num_microbatches,
        )
        self._eval_step = train_step.make_eval_step(self._method.loss)
        self._throughput.flops_per_token = self._method.flops_per_token
        self._throughput.pause()

    def _steps(self, state: TrainState, batches: Iterator[Batch], stop: threading.Event) -> None:
        train, every = self._config.train, self._config.checkpoint.every
        for step in range(self._first_step, train.num_steps):
            if step == self._method.until:
                self._drain(step)
                self._enter_phase(step)
            self._profile(step, state)
            state, step_metrics = self._train_step(state, self._extra, next(batches), self._key)
            done = step + 1
            self._pending.add(done, step_metrics)
            if done == self._first_step + 1:
                self._announce(state)
            else:
                self._throughput.step_done()
                self._log(done - 1)
            last = done == train.num_steps
            stopping = _agreed_to_stop(stop, done)
            if last or done % train.eval_every == 0:
                self._drain(done)
                self._evaluate(state, done)
            if last or stopping or (every and done % every == 0):
                self._drain(done)
                self._writer.flush()
                self._checkpoints.save(state)
                self._throughput.pause()
            if stopping and not last:
                self._checkpoints.wait()
                _say(f"stopped by a signal at step {done}, saved; the same command goes on")
                raise SystemExit(0)
        self._profile(train.num_steps, state)
        self._checkpoints.wait()

    def _announce(self, state: TrainState) -> None:
        jax.block_until_ready(state.step)
        _say(f"first step done {time.perf_counter() - self._started:.1f} s after the start")
        self._throughput.pause()

    def _log(self, step: int) -> None:
        """Writes the metrics up to `step`, whose successor is being computed."""
        if step % self._config.train.log_every == 0 and step > self._first_step:
            values = self._pending.read()
            if values:
                self._writer.write(step, values | self._throughput.read() | self._elapsed())

    def _elapsed(self) -> dict[str, float]:
        return {"train/elapsed_secs": time.perf_counter() - self._begun}

    def _drain(self, step: int) -> None:
        """Waits for step `step`, so that nothing later is done with numbers that are not finite."""
        self._pending.drain()
        self._log(step)
        self._throughput.pause()

    def _evaluate(self, state: TrainState, step: int) -> None:
        total = metrics.Accumulator("validation")
        for batch in self._held_out:
            total.add(step, self._eval_step(state, self._extra, batch, self._key))
        total.drain()
        self._writer.write(step, total.read() | self._elapsed())

    def _profile(self, step: int, state: TrainState) -> None:
        train = self._config.train
        if not train.profile_steps:
            return
        if step == max(train.profile_start, self._first_step):
            jax.profiler.start_trace(str(epath.Path(self._config.workdir) / "profile"))
        elif step == min(train.profile_start + train.profile_steps, train.num_steps):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; with several processes JAX's own notice is used instead."""
    stop = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _agreed_to_stop(stop: threading.Event, step: int) -> bool:
    if jax.process_count() > 1:
        return bool(multihost_utils.reached_preemption_sync_point(step))
    return stop.is_set()
