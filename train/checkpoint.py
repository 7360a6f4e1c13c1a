"""Checkpoints: asynchronous, whole or not there, restorable onto any mesh.

WORKDIR/config.json says which run a folder belongs to; WORKDIR/checkpoints/STEP holds the
checkpointables `params` (the model's, all that inference needs) and `optimizer` (optimiser state,
step, and the parameters that a method adds to the model), and as custom metadata the record of
the run: its configuration and the fingerprints of its tokenizer and corpus. The position in the
data is the step.
"""

import contextlib
import functools
import gc
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from jaxlib_methods import registry
from jaxlib_methods.method import Pretrained
from jaxlib_methods.models import huggingface, huggingface_config, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import run_record
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState
from jaxlib_methods.train.tokenizer import load_tokenizer

TOKENIZER_KEY = "jaxlib_methods_tokenizer"  # in an exported config.json: `bytes` has no file


def restore_run(workdir: epath.PathLike, abstract: TrainState, record: Record) -> TrainState:
    """The newest state of another start of a run, to go on from here.

    Raises ValueError like `load`, and where the checkpoint is another run's.
    """
    run_record.check_checkpoints(workdir)
    with ocp.training.Checkpointer(run_record.checkpoints_folder(workdir)) as checkpointer:
        return _load_state(checkpointer, abstract, record)


def load(
    checkpointer: ocp.training.Checkpointer, step: int | None, abstract: dict[str, Any]
) -> dict[str, Any]:
    """The checkpointables of a step (None: the newest), placed as `abstract` says.

    Raises ValueError where a file of it is missing or damaged; nothing is changed on disk.
    """
    steps = sorted(int(saved.step) for saved in checkpointer.checkpoints)
    step = steps[-1] if step is None else step
    _hide_tracebacks()
    try:
        return checkpointer.load_checkpointables(step, abstract)
    except Exception as error:  # Orbax and tensorstore raise many kinds
        cause = str(error.__cause__ or error.__context__ or error)
        _drop_reads(error)
        before = [known for known in steps if known < step]
        then = f"step {before[-1]}, the newest before it" if before else "the start"
        raise ValueError(
            f"the checkpoint {checkpointer.directory}/{step} cannot be read: "
            f"{' '.join(cause.split())[:300]}; move that folder elsewhere to go on from {then}"
        ) from error


def _drop_reads(error: BaseException | None) -> None:
    """Frees the reads that Orbax left; Python would report the end of each at some later time."""
    report = sys.unraisablehook
    sys.unraisablehook = lambda found: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__cause__ or error.__context__
            gc.collect()
    finally:
        sys.unraisablehook = report


def _report_unless_closed(report: Callable[[Any], object], found: Any) -> None:
    if "Event loop is closed" not in str(found.exc_value):
        report(found)


class Checkpoints:
    """The checkpoints of one run. A context manager; leaving it waits for a save under way."""

    def __init__(self, workdir: epath.PathLike, *, keep: int, record: Record) -> None:
        self._folder = run_record.checkpoints_folder(workdir)
        self._record = record
        self._saving: Any = None  # Orbax's answer to the save under way
        _hide_tracebacks()
        run_record.check_checkpoints(workdir)
        with self._one_error():
            self._checkpointer = ocp.training.Checkpointer(
                self._folder,
                save_decision_policy=_EveryCall(),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
            )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    def save(self, state: TrainState) -> None:
        """Saves in the background; waits for the save before it. Raises OSError like `wait`."""
        self.wait()
        step = int(state.step)
        if self.latest_step == step:
            return
        params, optimizer = _items(state, self._record.config)
        with self._one_error():
            self._saving = self._checkpointer.save_checkpointables_async(
                step,
                {"params": params, "optimizer": optimizer},
                custom_metadata=run_record.to_json(self._record),
            )

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, placed as `abstract` says, whatever mesh it was saved from.

        Raises ValueError like `restore_run`.
        """
        return _load_state(self._checkpointer, abstract, self._record)

    def wait(self) -> None:
        """Waits for the save under way. Raises OSError where it could not be written."""
        with self._one_error():
            self._end_save()
            self._checkpointer.wait()

    def _end_save(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()  # without it Orbax keeps a thread and three descriptors for each save

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._one_error(), self._checkpointer:
            self._end_save()

    @contextlib.contextmanager
    def _one_error(self) -> Iterator[None]:
        """What cannot be written is an OSError, whatever Orbax and tensorstore raise."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(
                f"a checkpoint could not be written to {self._folder}: {error}; those that were "
                "there before are kept, the same command goes on from the newest"
            ) from error


def _hide_tracebacks() -> None:
    """Orbax logs the errors that it raises, many times over, and asyncio those of its reads.

    Reads and writes that are under way when another one fails end later, in threads of tensorstore,
    which find that their loop is closed.
    """
    logging.getLogger("absl").addFilter(_not_a_traceback)
    logging.getLogger("asyncio").addFilter(_not_a_traceback)
    report = sys.unraisablehook
    if getattr(report, "func", None) is not _report_unless_closed:
        sys.unraisablehook = functools.partial(_report_unless_closed, report)


def _not_a_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and ("orbax" in record.pathname or "orbax" in record.getMessage()))


class _EveryCall:
    """The loop decides when to save."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        del step, previous_steps, context
        return True


def _items(state: TrainState, config: RunConfig) -> tuple[Any, Any]:
    """The checkpointables: the parameters of the model itself, and all else."""
    own = _names_of_params(config)
    optimizer = {
        "state": state.opt_state,
        "step": state.step,
        "method_params": {n: leaves for n, leaves in state.params.items() if n not in own},
    }
    if jax.tree.leaves(state.method_state):
        optimizer["method_state"] = state.method_state
    return {n: leaves for n, leaves in state.params.items() if n in own}, optimizer


def _load_state(
    checkpointer: ocp.training.Checkpointer, abstract: TrainState, record: Record
) -> TrainState:
    step = max(int(saved.step) for saved in checkpointer.checkpoints)
    where = f"the checkpoint {checkpointer.directory}/{step}"
    saved = run_record.read_checkpoint(checkpointer.directory / str(step))
    if saved is not None:
        stateful = bool(jax.tree.leaves(abstract.method_state))
        run_record.check_same_run(saved, record, where=where, stateful=stateful)
    params, optimizer = _items(abstract, record.config)
    loaded = load(checkpointer, step, {"params": params, "optimizer": optimizer})
    optimizer = loaded["optimizer"]
    if int(optimizer["step"]) != step:
        raise ValueError(
            f"{where} is one of step {int(optimizer['step'])}; give its folder that name again, or "
            "move it elsewhere"
        )
    params = {**loaded["params"], **optimizer["method_params"]}
    return TrainState(
        optimizer["step"], params, optimizer["state"], optimizer.get("method_state", ())
    )


def load_pretrained(
    source: str, *, mesh: Mesh | None = None, weights: bool = True, dtype: str | None = None
) -> Pretrained:
    """A finished model from a run's workdir or a Hugging Face folder, sharded over `mesh`.

    weights=False reads only the configuration and the tokenizer's fingerprint and touches no
    device; `params` is None. dtype: what the parameters are cast to; None keeps a run's own and
    reads a folder in float32.
    Raises FileNotFoundError or ValueError where the folder holds no model.
    """
    folder = epath.Path(source).expanduser()
    path = folder / run_record.CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{source} holds no model: there is no {run_record.CONFIG_FILE}; give a run's workdir "
            "or a Hugging Face folder"
        )
    values = run_record.read_json(path)
    if "model_type" in values:
        return _load_huggingface(folder, values, mesh, weights, dtype)
    return _load_run(folder, mesh, weights, dtype)


def is_language_model(config: RunConfig) -> bool:
    """Whether a run's parameters are those of the language model that `config.model` describes."""
    if registry.entry(config.method).init_model is None:
        return True
    return getattr(config.method_config, "task", None) == "language"


def require_language_model(config: RunConfig, folder: epath.PathLike) -> None:
    """Raises ValueError where the run in `folder` trains another model than a transformer."""
    if not is_language_model(config):
        raise ValueError(
            f"the run in {folder} trains a model of the method {config.method}, not a plain "
            "transformer; give the run of another method, or a Hugging Face folder"
        )


def _load_run(
    folder: epath.Path, mesh: Mesh | None, weights: bool, dtype: str | None
) -> Pretrained:
    record = run_record.read_record(folder)
    assert record is not None
    require_language_model(record.config, folder)
    if not run_record.has_checkpoint(folder):
        raise FileNotFoundError(f"the run in {folder} has no checkpoint yet; let it finish first")
    if not weights:
        return Pretrained(record.config.model, None, record.tokenizer, run_record.newest(folder))
    assert mesh is not None
    run_record.check_checkpoints(folder)
    with ocp.training.Checkpointer(run_record.checkpoints_folder(folder)) as checkpointer:
        abstract = abstract_run_params(record.config, mesh)
        params = load(checkpointer, None, {"params": abstract})["params"]
    return Pretrained(record.config.model, _cast(params, dtype), record.tokenizer)


def _load_huggingface(
    folder: epath.Path,
    values: dict[str, Any],
    mesh: Mesh | None,
    weights: bool,
    dtype: str | None,
) -> Pretrained:
    if "://" in str(folder):
        raise ValueError(f"{folder}: Hugging Face weights are read from a local folder; copy it")
    config = huggingface_config.config_from_huggingface(values)
    has_tokenizer = (folder / "tokenizer.json").exists()
    tokenizer = load_tokenizer(str(folder), separator_id=0).fingerprint if has_tokenizer else None
    tokenizer = tokenizer or values.get(TOKENIZER_KEY)
    if not weights:
        huggingface.check_weights(Path(folder), config)
        version = huggingface.weights_version(Path(folder))
        return Pretrained(config, None, tokenizer, version)
    assert mesh is not None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
    params = huggingface.load_params(folder, config, shardings=shardings, dtype=dtype)
    return Pretrained(config, params, tokenizer)


def _names_of_params(config: RunConfig) -> frozenset[str]:
    return frozenset(_boxed_params(config.method, config.model, config.method_config))


@functools.cache
def _boxed_params(method: str, model: TransformerConfig, method_config: Any) -> Any:
    return jax.eval_shape(
        lambda: registry.init_model(method, model, method_config, jax.random.key(0))
    )


def abstract_params(config: TransformerConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a trunk's parameters on a mesh, to load them into."""
    return _abstract(_boxed_params("next_token", config, None), mesh)


def abstract_run_params(config: RunConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters that inference with a run needs."""
    return _abstract(_boxed_params(config.method, config.model, config.method_config), mesh)


def _abstract(boxed: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        partitioning.unbox(boxed),
        partitioning.param_shardings(boxed, mesh, indivisible="whole"),
    )


def _cast(params: Any, dtype: str | None) -> Any:
    if dtype is None:
        return params
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))(params)
