"""A finished model, with its tokenizer, from a run's workdir or a Hugging Face folder."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from jaxlib_methods import energy
from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.infer import kinds
from jaxlib_methods.infer.kinds import Kind
from jaxlib_methods.models import decoding
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import KVCache, Outputs, forward
from jaxlib_methods.thinking import ThinkConfig
from jaxlib_methods.thinking_text import Thinker
from jaxlib_methods.train import checkpoint, run_record
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.tokenizer import Tokenizer, load_tokenizer


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Trunk:
    """A plain transformer as a language model: its call and its cache. See `Thinker`."""

    model: TransformerConfig

    def __call__(self, params: Any, inputs: jax.Array, **arguments: Any) -> Outputs:
        """`models.transformer.forward` of this model."""
        return forward(self.model, params, inputs, **arguments)

    def init_cache(self, params: Any, *, batch_size: int, length: int) -> KVCache:
        """An empty cache of `length` tokens."""
        del params
        return decoding.init_cache(self.model, batch_size=batch_size, length=length)


class LanguageModel(Protocol):
    """What predicts the next token: a `Trunk`, a `Thinker` or a `RecurrentModel`, all hashable."""

    def __call__(
        self,
        params: Any,
        inputs: jax.Array,
        *,
        positions: jax.Array,
        segments: jax.Array,
        cache: Any = None,
    ) -> Outputs:
        """Predictions after each of the inputs; see `models.transformer.Transformer`."""
        ...

    def init_cache(self, params: Any, *, batch_size: int, length: int) -> Any:
        """An empty cache of `length` tokens."""
        ...


class Restored(NamedTuple):
    """What inference needs.

    config, step: of the run and its checkpoint; None for a Hugging Face folder.
    params: sharded over `mesh`. first_token: stands in front of every text the model has seen.
    stop_tokens: end a text. think, depth: how an energy run and a recurrent model predict, and
    seed: from which draws.
    """

    config: RunConfig | None
    model: TransformerConfig
    params: Any
    tokenizer: Tokenizer
    step: int | None
    mesh: Mesh
    first_token: int
    stop_tokens: tuple[int, ...]
    think: ThinkConfig = ThinkConfig()
    depth: DepthConfig = DepthConfig()
    seed: int = 0

    @property
    def kind(self) -> Kind:
        """What the model is, by the run's method and the model's recurrence."""
        return kinds.kind_of(self.config, self.model)

    @property
    def language_model(self) -> LanguageModel:
        """What predicts the next token. Raises ValueError where no text was learned."""
        return _language_model(
            self.config, self.model, think=self.think, depth=self.depth, seed=self.seed
        )

    @property
    def thinker(self) -> Thinker | None:
        """The language model of an energy run; None for another."""
        found = self.language_model if self.kind == "energy" else None
        return found if isinstance(found, Thinker) else None

    def require_thinker(self, mode: str) -> Thinker:
        """The thinker. Raises ValueError where there is none, in the name of a mode."""
        if self.thinker is None:
            method = "no run" if self.config is None else f"a run of {self.config.method}"
            raise ValueError(f"--mode={mode} is for an energy run, and this is {method}")
        return self.thinker


def _language_model(
    config: RunConfig | None,
    model: TransformerConfig,
    *,
    think: ThinkConfig,
    depth: DepthConfig,
    seed: int,
) -> LanguageModel:
    # The run's may be kernels of another platform.
    model = dataclasses.replace(model, loss_implementation="auto", attention_implementation="auto")
    kind = kinds.kind_of(config, model)
    if kind in ("questions", "images"):
        raise ValueError(f"{kinds.KINDS[kind].what} predicts no text")
    if kind == "recurrent":
        return RecurrentModel(model, depth, seed)
    run = None if config is None else config.method_config
    if isinstance(run, EnergyConfig):
        return Thinker(run, energy.model_config(model, run), think, seed)
    return Trunk(model)


# What `params` and `mesh` are before the weights are read.
_UNREAD: Any = None


def describe(
    workdir: str,
    *,
    step: int | None = None,
    think: Mapping[str, Any] | None = None,
    depth: Mapping[str, Any] | None = None,
) -> Restored:
    """All of `restore` but the weights: `params` and `mesh` are None. Touches no device."""
    folder = epath.Path(workdir).expanduser()
    flags = {"think": think or {}, "depth": depth or {}}
    if run_record.checkpoints_folder(folder).exists():
        found = _describe_run(folder, step, flags)
    elif step is not None:
        raise ValueError(f"--step={step} is for a run; {workdir} holds no checkpoints")
    else:
        found = _describe_huggingface(folder, flags)
    return found._replace(think=ThinkConfig(**flags["think"]), depth=DepthConfig(**flags["depth"]))


def check(
    found: Restored, workdir: str, mode: str, *, reason: Mapping[str, Any] | None = None
) -> None:
    """Raises ValueError where the model described in `workdir` cannot do what is asked.

    reason: fields of `ReasonConfig`.
    """
    kinds.check_mode(workdir, found.kind, mode)
    kinds.check_flags(workdir, found.kind, reason=reason or {})
    if mode in ("generate", "evaluate", "score"):
        _ = found.language_model


def load(found: Restored, workdir: str, mesh: Mesh) -> Restored:
    """What `describe` found in `workdir`, with its parameters, sharded over the mesh."""
    folder = epath.Path(workdir).expanduser()
    if found.config is None:
        params = checkpoint.load_pretrained(str(folder), mesh=mesh).params
    else:
        with ocp.training.Checkpointer(run_record.checkpoints_folder(folder)) as checkpointer:
            abstract = {"params": checkpoint.abstract_run_params(found.config, mesh)}
            params = checkpoint.load(checkpointer, found.step, abstract)["params"]
    return found._replace(params=params, mesh=mesh)


def restore(
    workdir: str,
    *,
    mesh: Mesh,
    step: int | None = None,
    think: Mapping[str, Any] | None = None,
    depth: Mapping[str, Any] | None = None,
) -> Restored:
    """Reads the configuration, the tokenizer and the parameters, not the optimiser.

    step: which checkpoint of a run; None takes the newest. The mesh need not be the run's.
    think, depth: fields of `ThinkConfig`, for an energy run only, and of `DepthConfig`, for a
    model that is recurrent in depth only.
    Raises FileNotFoundError or ValueError where there is no such model.
    """
    return load(describe(workdir, step=step, think=think, depth=depth), workdir, mesh)


_Flags = dict[str, Mapping[str, Any]]


def _describe_run(folder: epath.Path, step: int | None, flags: _Flags) -> Restored:
    record = run_record.read_record(folder)
    if record is None:
        raise FileNotFoundError(f"{folder} holds no run: it has no {run_record.CONFIG_FILE}")
    config = dataclasses.replace(record.config, workdir=str(folder))  # it may have been moved
    kinds.check_flags(folder, kinds.kind_of(config, config.model), **flags)
    tokenizer = load_tokenizer(config.data.tokenizer, separator_id=config.data.separator_id)
    if tokenizer.fingerprint != record.tokenizer:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer} has changed since the run in {folder} was "
            "trained; its ids mean something else now"
        )
    run_record.check_checkpoints(folder)
    steps = run_record.steps(folder)
    if not steps:
        raise FileNotFoundError(f"the run in {folder} has no checkpoint yet; let it finish one")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise ValueError(f"{folder} has no checkpoint of step {step}; there are {known}")
    chosen = steps[-1] if step is None else step
    first = tokenizer.separator
    return Restored(config, config.model, None, tokenizer, chosen, _UNREAD, first, (first,))


def _describe_huggingface(folder: epath.Path, flags: _Flags) -> Restored:
    model = checkpoint.load_pretrained(str(folder), weights=False).config
    kinds.check_flags(folder, kinds.kind_of(None, model), **flags)
    values = json.loads((folder / run_record.CONFIG_FILE).read_text())
    ends = values.get("eos_token_id")
    ends = (ends,) if isinstance(ends, int) else tuple(ends or ())
    if values.get(checkpoint.TOKENIZER_KEY) == "bytes":
        tokenizer = load_tokenizer("bytes")
    else:
        tokenizer = load_tokenizer(str(folder), separator_id=ends[0] if ends else None)
    first = values.get("bos_token_id")
    first = tokenizer.separator if first is None else int(first)
    stop_tokens = ends or (tokenizer.separator,)
    return Restored(None, model, None, tokenizer, None, _UNREAD, first, stop_tokens)
