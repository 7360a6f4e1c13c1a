"""The configuration of a run: frozen dataclasses are the truth, flags are made from them."""

import dataclasses
import math
import os
from typing import Any, Literal, get_type_hints

from jaxlib_methods import registry
from jaxlib_methods.models.config import TransformerConfig, check_choices


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 (one axis at most) takes what the others leave.

    data: replicas. fsdp: parameters and optimiser state. tensor: heads and hidden features.
    sequence: context parallelism. dcn_data: slices of a multi-slice pod, a factor of `data`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    dcn_data: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size >= 1 or size == -1, f"mesh.{name}={size} must be at least 1, or -1")
        _require(self.dcn_data >= 1, f"mesh.dcn_data={self.dcn_data} must be at least 1")
        free = [name for name, size in sizes.items() if size == -1]
        _require(len(free) <= 1, f"mesh axes {free} are all -1; one at most can be derived")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, cut how.

    source: `stdlib` (the Python standard library's own source), or files, folders or globs,
        local or in a bucket, comma-separated for a mixture.
    weights: mixture weights, one per source; None weights by size.
    format: `auto` goes by the ending (.txt .md .py: text; .jsonl; .parquet; .arrayrecord).
    tokenizer: `bytes`, or the path of a Hugging Face `tokenizer.json` or of its folder.
    separator_id: the token between documents; None takes the tokenizer's end-of-text token.
    validation_source: None splits `validation_fraction` of the documents off the training text.
    on_damaged: a file that cannot be read to its end stops the run before it begins (`stop`), or is
        read up to the fault, named and counted (`skip`).
    cache: local folder for memory-mapped tokens; None tokenises into memory at every start.
    num_threads: batches made ahead, each by a thread.
    batch_size: sequences of the global batch, one optimiser step.
    """

    source: str = "stdlib"
    weights: tuple[float, ...] | None = None
    format: Literal["auto", "text", "jsonl", "parquet", "arrayrecord"] = "auto"
    text_field: str = "text"
    tokenizer: str = "bytes"
    separator_id: int | None = None
    validation_source: str | None = None
    validation_fraction: float = 0.05
    sequence_length: int = 256
    batch_size: int = 16
    shuffle_seed: int = 0
    on_damaged: Literal["stop", "skip"] = "stop"
    cache: str | None = None
    num_threads: int = 2

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("sequence_length", "batch_size", "num_threads"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name}={value} must be at least 1")
        _require(
            0.0 < self.validation_fraction < 1.0,
            f"data.validation_fraction={self.validation_fraction} must be between 0 and 1",
        )
        sources = self.source.split(",")
        _require(
            not self.source or all(name.strip() for name in sources),
            f"data.source={self.source} has an empty name between its commas",
        )
        _require(self.shuffle_seed >= 0, f"data.shuffle_seed={self.shuffle_seed} is negative")
        _require(
            self.weights is None or len(self.weights) == len(sources),
            f"data.weights has {len(self.weights or ())} numbers for {len(sources)} sources",
        )
        _require(
            self.weights is None or (min(self.weights) >= 0 and sum(self.weights) > 0),
            f"data.weights={self.weights} must be non-negative with a positive sum",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser and learning-rate schedule.

    name: `adamw`, or `muon` (matrices by Muon, the rest by AdamW).
    schedule: `cosine` to `final_fraction` of the peak; `wsd` (warm-up, stable, linear decay over
        the last `decay_fraction`); `constant`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global norm; 0 does not clip

    def __post_init__(self) -> None:
        _require(
            self.learning_rate > 0,
            f"optimizer.learning_rate={self.learning_rate} must be positive",
        )
        for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optimizer.{name}={value} must be between 0 and 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}={value} must be at least 0 and below 1")
        _require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon} must be positive")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name}={value} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how often, what to watch. Counts are optimiser steps.

    on_failure: what follows where a method sees its training go wrong: `warn` says so and goes on,
        `stop` saves and ends the run. In metrics.jsonl it is a 1 in either case.
    stall_factor: a step that takes this many times the median of those before it, and more than a
        minute, prints where every thread stands; 0 does not watch.
    """

    num_steps: int = 300
    num_microbatches: int = 1  # the global batch in so many parts, gradients and metrics summed
    log_every: int = 10
    eval_every: int = 100  # and at the end
    eval_batches: int = 8
    profile_start: int = 0  # first profiled step
    profile_steps: int = 0  # 0 does not profile; the trace goes to WORKDIR/profile
    tensorboard: bool = False  # needs the `tensorboard` extra
    on_failure: Literal["warn", "stop"] = "warn"
    stall_factor: float = 10.0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("num_steps", "num_microbatches", "log_every", "eval_every", "eval_batches"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}={value} must be at least 1")
        for name in ("profile_start", "profile_steps", "stall_factor"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}={value} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints go to WORKDIR/checkpoints, asynchronously.

    Precedence of a start: own run > restore_from (a run: everything) > init_from (a run or a
    Hugging Face folder: weights only) > new.
    """

    every: int = 200  # optimiser steps; 0 saves at the end only
    keep: int = 3
    restore_from: str | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every={self.every} must not be negative")
        _require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `method_config` is the dataclass that the registry holds for `method`."""

    method: str = "next_token"  # what is minimised: a name of the registry
    preset: str = ""  # where the values came from; kept for the record
    workdir: str = ""  # folder of metrics and checkpoints, local or in a bucket
    seed: int = 0  # of the initial parameters and of every draw during training
    compare: bool = False  # also train the plain baseline, on the same data and seed
    model: TransformerConfig = TransformerConfig()  # noqa: RUF009 (it is frozen)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    method_config: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "workdir", os.path.expanduser(self.workdir))
        expected = registry.config_class(self.method)
        if self.method_config is None:
            object.__setattr__(self, "method_config", expected())
        _require(
            isinstance(self.method_config, expected),
            f"method {self.method!r} takes a {expected.__name__}, "
            f"got {type(self.method_config).__name__}",
        )
        if registry.entry(self.method).reads_text(self.method_config):
            self._check_length()
        _require(
            self.data.batch_size % self.train.num_microbatches == 0,
            f"data.batch_size={self.data.batch_size} is not a multiple of "
            f"train.num_microbatches={self.train.num_microbatches}",
        )
        self._check_mesh()

    def _check_length(self) -> None:
        length, cut = self.data.sequence_length, self.mesh.sequence
        _require(
            length <= self.model.max_length,
            f"data.sequence_length={length} is longer than model.max_length="
            f"{self.model.max_length}",
        )
        _require(
            length % max(cut, 1) == 0,
            f"data.sequence_length={length} is not a multiple of mesh.sequence={cut}",
        )

    def _check_mesh(self) -> None:
        """What can be known of a mesh before its devices: axes of -1 are left to `train.data`."""
        mesh, rows = self.mesh, self.data.batch_size // self.train.num_microbatches
        cuts = {f"mesh.{n}": getattr(mesh, n) for n in ("data", "fsdp") if getattr(mesh, n) > 1}
        _require(
            rows % math.prod(cuts.values()) == 0,
            f"a micro-batch of {rows} sequences (data.batch_size / train.num_microbatches) is not "
            f"a multiple of {' x '.join(f'{n}={size}' for n, size in cuts.items())}",
        )
        _require(
            mesh.data == -1 or mesh.data % mesh.dcn_data == 0,
            f"mesh.dcn_data={mesh.dcn_data} does not divide mesh.data={mesh.data}",
        )


def sections() -> dict[str, type]:
    """The parts of a `RunConfig` that are dataclasses themselves, by field name."""
    hints = get_type_hints(RunConfig)
    return {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values; `from_dict` is its inverse."""
    return _to_json(dataclasses.asdict(config))


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Rebuilds what `to_dict` gave. Missing keys take the defaults, unknown ones are refused."""
    method_class = registry.config_class(values.get("method", RunConfig.method))
    classes = sections() | {"method_config": method_class}
    built = {
        name: _from_json(classes[name], part, name)
        if name in classes and part is not None
        else part
        for name, part in values.items()
    }
    return _from_json(RunConfig, built, "run configuration")


def require_complete(config: RunConfig) -> None:
    """Raises ValueError naming the text fields that the run needs and that are empty.

    An empty text is a value still to be given; fields that may be left out are None.
    """
    parts = {name: getattr(config, name) for name in sections()}
    parts[config.method] = config.method_config
    empty = [
        f"--{section}.{field.name}"
        for section, part in parts.items()
        for field in dataclasses.fields(part)
        if getattr(part, field.name) == ""
    ]
    _require(not empty, f"this run still needs a value for {', '.join(empty)}")


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _from_json(cls: type, values: dict[str, Any], where: str) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    _require(not unknown, f"unknown keys {unknown} in the {where}; known are {known}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
