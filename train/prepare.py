"""From a configuration to the runs that it stands for, checked before a device is touched."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from jaxlib_methods import registry
from jaxlib_methods.method import (
    Context,
    Dataset,
    LoadPretrained,
    Method,
    OpenTiers,
    Pretrained,
)
from jaxlib_methods.models import partitioning
from jaxlib_methods.train import checkpoint, data, entropies, metrics, run_record
from jaxlib_methods.train.config import DataConfig, MeshConfig, RunConfig
from jaxlib_methods.train.corpus import Split
from jaxlib_methods.train.data import TextDataset
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState, abstract_state
from jaxlib_methods.train.step import TrainStep, make_train_step
from jaxlib_methods.train.tokenizer import Tokenizer, load_tokenizer

START = "start"  # folder of the run that `checkpoint.init_from=preset:NAME` stands for


def plan(config: RunConfig) -> dict[str, RunConfig]:
    """The runs that `run` trains, in order: field name, method or `baseline` -> configuration.

    Raises ValueError where the run would be its own baseline.
    """
    if config.compare:
        other = registry.baseline(config.method, config.model, config.method_config)
        if other == (config.method, config.model, config.method_config):
            raise ValueError(
                f"compare=true adds the baseline {other.method}, which this run is itself; leave "
                "it out"
            )
    runs = {**_before(config), config.method: config}
    return {**runs, "baseline": baseline_of(config)} if config.compare else runs


def _before(config: RunConfig, prefix: str = "") -> dict[str, RunConfig]:
    """The runs that must be finished before a run, each behind its own."""
    found: dict[str, RunConfig] = {}
    for name, run in prerequisites(config).items():
        found |= _before(run, f"{prefix}{name}/")
        found[prefix + name] = run
    return found


def prerequisites(config: RunConfig) -> dict[str, RunConfig]:
    """Field name -> configuration of the run that a value `preset:NAME` of the method stands for.

    `start` is that of `checkpoint.init_from`, which has this run's model. They read the same text
    in the same tokens, on the same mesh and seed. Raises ValueError for an unknown preset.
    """
    from jaxlib_methods.train import presets  # presets are built from configurations

    method = config.method_config
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    values[START] = config.checkpoint.init_from
    found: dict[str, RunConfig] = {}
    for name, value in values.items():
        if not (isinstance(value, str) and value.startswith("preset:")):
            continue
        base = presets.get(value.removeprefix("preset:"))
        length = max(base.model.max_length, config.data.sequence_length)
        model = dataclasses.replace(
            base.model, vocab_size=config.model.vocab_size, max_length=length
        )
        data = config.data
        if name == START:
            model = config.model
            data = dataclasses.replace(data, batch_size=base.data.batch_size)
        found[name] = dataclasses.replace(
            base,
            workdir=str(epath.Path(config.workdir) / name),
            model=model,
            data=data,
            mesh=config.mesh,
            seed=config.seed,
        )
    return found


def start_of(config: RunConfig) -> str | None:
    """The finished model whose weights a run begins with: `checkpoint.init_from`, as a folder."""
    planned = prerequisites(config).get(START)
    return config.checkpoint.init_from if planned is None else planned.workdir


def baseline_of(config: RunConfig) -> RunConfig:
    """The method's baseline on the same data, seed and budget; see `registry.baseline`."""
    baseline = registry.baseline(config.method, config.model, config.method_config)
    return dataclasses.replace(
        config,
        method=baseline.method,
        preset="",
        model=baseline.model,
        method_config=baseline.config,
        compare=False,
        checkpoint=dataclasses.replace(
            config.checkpoint, restore_from=None, init_from=start_of(config)
        ),
        workdir=str(epath.Path(config.workdir) / "baseline"),
    )


class Prepared(NamedTuple):
    """A run of which everything is known that can be known before a device is touched."""

    config: RunConfig
    record: Record
    method: Method
    dataset: Dataset
    validation: Dataset


def prepare(config: RunConfig, planned: Mapping[str, RunConfig] | None = None) -> Prepared:
    """Reads and checks what a run needs; touches no device and makes no more than the workdir.

    planned: the runs of a `plan`, which need not be there yet; None: the run's prerequisites.
    Raises ValueError or OSError for what would not work.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, separator_id=config.data.separator_id)
    folders = folders_before(config, prerequisites(config) if planned is None else planned)
    method, versions = _build(config, tokenizer, folders)
    if method.dataset is None:
        _check_vocabulary(config, tokenizer)
    _check_given_weights(config, tokenizer, folders)
    if config.train.tensorboard:
        metrics.require_tensorboard()
    if method.dataset is None:
        dataset, validation = _open_datasets(config.data)
    else:
        dataset, validation = method.dataset("train"), method.dataset("validation")
    record = Record(
        config, tokenizer.fingerprint, dataset.fingerprint, method.until, "; ".join(versions),
        validation.fingerprint,
    )  # fmt: skip
    prepared = Prepared(config, record, method, dataset, validation)
    check_records(prepared)
    _make_folder(config.workdir)
    return prepared


def folders_before(config: RunConfig, planned: Mapping[str, RunConfig]) -> dict[str, RunConfig]:
    """Workdir -> run, of the planned runs that are finished when this one begins."""
    before = itertools.takewhile(lambda run: run.workdir != config.workdir, planned.values())
    return {run.workdir: run for run in before}


@functools.lru_cache(maxsize=1)
def _open_datasets(config: DataConfig) -> tuple[TextDataset, TextDataset]:
    tokenizer = load_tokenizer(config.tokenizer, separator_id=config.separator_id)
    return (
        data.open_dataset(config, tokenizer, split="train"),
        data.open_dataset(config, tokenizer, split="validation"),
    )


def _open_tiers(
    config: DataConfig, tokenizer: str, path: str, cut: Callable[[np.ndarray], Sequence[float]]
) -> Callable[[Split], Dataset]:
    """The run's text by split, its targets in tiers; see `Context.open_tiers`."""
    train, validation = _open_datasets(config)
    found = entropies.Entropies(path)
    found.check(train, validation, tokenizer)
    sample = found.sample()
    thresholds = cut(sample[~np.isnan(sample)])
    parts = {"train": train, "validation": validation}
    return lambda split: entropies.TieredText(parts[split], found, split, thresholds)


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer} has ids up to {tokenizer.vocab_size - 1}, "
            f"model.vocab_size={config.model.vocab_size} ends below; give at least "
            f"--model.vocab_size={tokenizer.vocab_size}"
        )


def _build(
    config: RunConfig, tokenizer: Tokenizer, planned: Mapping[str, RunConfig]
) -> tuple[Method, list[str]]:
    """The method, and the versions of the finished models that it asked for.

    A planned run has none yet.
    """
    versions: list[str] = []

    def load_pretrained(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        if weights:
            mesh = mesh_of(config.mesh)
            return checkpoint.load_pretrained(source, mesh=mesh, dtype=dtype)
        found = _description(source, tokenizer, planned)
        if source not in planned:
            versions.append(found.version)
        return found

    open_tiers = functools.partial(_open_tiers, config.data, tokenizer.fingerprint)
    return build_method(config, tokenizer, load_pretrained, open_tiers), versions


def build_method(
    config: RunConfig, tokenizer: Tokenizer, load_pretrained: LoadPretrained, open_tiers: OpenTiers
) -> Method:
    """A run's method, its `preset:NAME` values replaced by the runs that they stand for."""
    folders = {name: run.workdir for name, run in prerequisites(config).items() if name != START}
    context = Context(
        model=config.model,
        num_steps=config.train.num_steps,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size // config.train.num_microbatches,
        tokenizer=tokenizer.fingerprint,
        load_pretrained=load_pretrained,
        num_microbatches=config.train.num_microbatches,
        tokens=tokenizer,
        init_from=start_of(config),
        open_tiers=open_tiers,
    )
    method_config = dataclasses.replace(config.method_config, **folders)
    return registry.build(config.method, method_config, context)


def _description(source: str, tokenizer: Tokenizer, planned: Mapping[str, RunConfig]) -> Pretrained:
    """A finished model without its parameters, or the one that a planned run will be."""
    if source not in planned:
        return checkpoint.load_pretrained(source, weights=False)
    checkpoint.require_language_model(planned[source], source)
    return Pretrained(planned[source].model, None, tokenizer.fingerprint)


def _check_given_weights(
    config: RunConfig, tokenizer: Tokenizer, planned: Mapping[str, RunConfig]
) -> None:
    weights = start_of(config)
    if weights is not None:
        if not checkpoint.is_language_model(config):
            raise ValueError(
                f"checkpoint.init_from={config.checkpoint.init_from} is for language models, and "
                f"the method {config.method} trains another model here; give "
                "checkpoint.restore_from, a run of its own"
            )
        found = _description(weights, tokenizer, planned)
        run_record.check_same_architecture(found.config, config.model, where=weights)
        if found.tokenizer not in (None, tokenizer.fingerprint):
            raise ValueError(
                f"the model in {weights} was trained with tokenizer {found.tokenizer}, this run "
                f"has {tokenizer.fingerprint}; set data.tokenizer to the model's"
            )


def _make_folder(workdir: str) -> None:
    folder = epath.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be made: {error}") from error
    if "://" not in workdir and not os.access(folder, os.W_OK):
        raise ValueError(f"workdir {workdir} cannot be written to; give another --workdir")


def check_records(prepared: Prepared) -> None:
    """Raises ValueError or OSError where the workdir, or a run given, is not this run's."""
    config, record = prepared.config, prepared.record
    stateful = prepared.method.init_state is not None
    saved = run_record.read_record(config.workdir)
    if saved is not None and run_record.has_checkpoint(config.workdir):  # else begun anew
        run_record.check_same_run(saved, record, where=config.workdir, stateful=stateful)
    given = config.checkpoint.restore_from
    if given is not None:
        other = run_record.read_record(given)
        if other is None or not run_record.has_checkpoint(given):
            raise FileNotFoundError(
                f"checkpoint.restore_from={given} holds no run with a checkpoint"
            )
        run_record.check_same_run(
            other, record, where=given, stateful=stateful, flag="--checkpoint.restore_from"
        )


class Placed(NamedTuple):
    """A method on a mesh: the optimiser and the abstract state of its runs."""

    optimizer: optax.GradientTransformation
    abstract: TrainState


def place(config: RunConfig, method: Method, dataset: Dataset, mesh: Mesh) -> Placed:
    """Cuts a run for a mesh. Raises ValueError where they do not fit."""
    data.check_divisible(
        config.data.batch_size,
        dataset.sequence_length,
        mesh=mesh,
        spec=partitioning.batch_spec(),
        num_microbatches=config.train.num_microbatches,
        rows_multiple=method.rows_multiple,
        length_flag=method.length_flag,
    )
    optimizer = make_optimizer(
        config.optimizer, config.train.num_steps, rate_factors=method.rate_factors
    )
    return Placed(optimizer, abstract_state(method, optimizer, mesh))


def train_step_of(config: RunConfig, method: Method, placed: Placed) -> TrainStep:
    """The program of a run's optimiser step."""
    return make_train_step(
        method.loss,
        placed.optimizer,
        make_schedule(config.optimizer, config.train.num_steps),
        placed.abstract,
        collect=method.collect,
        num_microbatches=config.train.num_microbatches,
    )


@functools.cache
def mesh_of(config: MeshConfig) -> Mesh:
    """The mesh over all devices of all processes; the first call touches the devices."""
    return partitioning.make_mesh(**dataclasses.asdict(config))
