"""What a workdir says about its run, and whether it is the run that goes on.

WORKDIR/config.json says which run a folder belongs to; every checkpoint below
WORKDIR/checkpoints repeats it.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from typing import Any, NamedTuple

from etils import epath

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train.config import RunConfig, from_dict, to_dict

CONFIG_FILE = "config.json"
FOLDER = "checkpoints"
METADATA_FILE = "_CHECKPOINT_METADATA"  # of Orbax, beside each checkpoint, the record within
FORMAT = 1  # of the record; a newer one is refused

# What must agree for a run to be continued: everything else may change between starts.
IDENTITY = ("method", "seed", "model", "method_config")
# These change memory and time, or what is measured, but not what is trained.
NOT_IDENTITY = (
    "remat", "loss_implementation", "attention_implementation", "memory", "max_candidate_gib",
    "eval_noise", "collect_parts", "gather_weights",
)  # fmt: skip
DATA_IDENTITY = (
    "source", "weights", "text_field", "tokenizer", "validation_source", "validation_fraction",
    "sequence_length", "batch_size", "shuffle_seed",
)  # fmt: skip


class Record(NamedTuple):
    """What a checkpoint says about its run."""

    config: RunConfig
    tokenizer: str  # fingerprint
    corpus: str  # fingerprint
    until: int | None = None  # the step at which the method becomes another
    pretrained: str = ""  # versions of the finished models that the method reads
    validation: str = ""  # fingerprint of the text or examples that are held out


def write_config(workdir: epath.PathLike, record: Record) -> None:
    """Writes WORKDIR/config.json, in one piece."""
    path = epath.Path(workdir) / CONFIG_FILE
    partial = path.with_name(CONFIG_FILE + ".partial")
    partial.write_text(json.dumps(to_json(record), indent=1) + "\n")
    partial.replace(path)


def read_record(workdir: epath.PathLike) -> Record | None:
    """The record in WORKDIR/config.json, or None where there is no such file.

    Raises ValueError where the file is not a run's, or belongs to checkpoints and is missing.
    """
    path = epath.Path(workdir).expanduser() / CONFIG_FILE
    if not path.exists():
        if has_checkpoint(workdir):
            raise ValueError(
                f"{workdir} holds checkpoints, but the {CONFIG_FILE} of their run is gone"
            )
        return None
    return _from_json(read_json(path), path)


def check_checkpoints(workdir: epath.PathLike) -> None:
    """Raises ValueError naming a checkpoint at which Orbax would fail, or a newer version's."""
    for step in steps(workdir):
        read_checkpoint(checkpoints_folder(workdir) / str(step))


def read_checkpoint(folder: epath.Path) -> Record | None:
    """The record in WORKDIR/checkpoints/STEP, or None: Orbax reads a checkpoint without it.

    Raises ValueError where it is not a run's, or what Orbax fails at.
    """
    path = folder / METADATA_FILE
    try:
        values = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return None
    except RecursionError:
        values = None
    found = values.get("custom_metadata") or {} if isinstance(values, dict) else None
    if not isinstance(found, dict):
        raise ValueError(
            f"the checkpoint {folder} cannot be read: its {METADATA_FILE} is damaged; move "
            "that folder elsewhere to go on from the checkpoint before it"
        )
    return _from_json(found, path) if found else None


def _from_json(values: dict[str, Any], path: epath.Path) -> Record:
    """The record of which `to_json` made `values`. Raises ValueError where they are none."""
    if not {"format", "run", "tokenizer", "corpus"} <= values.keys():
        raise ValueError(f"{path} does not describe a run of this library")
    if type(values["format"]) is not int:
        raise ValueError(f"{path} has a format that is not a whole number; put back what it was")
    if values["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {values['format']}, this version reads up to {FORMAT}; "
            "install a newer jaxlib-methods"
        )
    try:
        return Record(
            from_dict(values["run"]),
            values["tokenizer"],
            values["corpus"],
            values.get("until"),
            values.get("pretrained", ""),
            values.get("validation", ""),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a run of this version: {error}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError where there is none."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def checkpoints_folder(workdir: epath.PathLike) -> epath.Path:
    """WORKDIR/checkpoints as an absolute path: Orbax fails on a relative one, in mid-save."""
    folder = epath.Path(workdir).expanduser() / FOLDER
    return folder if "://" in str(folder) else epath.Path(os.path.abspath(folder))


def has_checkpoint(workdir: epath.PathLike) -> bool:
    """Whether a run has a whole checkpoint; one that is being written has another name."""
    return bool(steps(workdir))


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps of a run's whole checkpoints, ascending."""
    folder = checkpoints_folder(workdir)
    names = [step.name for step in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def newest(workdir: epath.PathLike) -> str:
    """The newest whole checkpoint by its step; another run's of that step has another hash."""
    step = steps(workdir)[-1]
    path = checkpoints_folder(workdir) / str(step) / METADATA_FILE
    if not path.exists():
        return f"step {step}"
    return f"step {step}, {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def to_json(record: Record) -> dict[str, Any]:
    """The form in which a record is written."""
    return {
        "format": FORMAT,
        "run": to_dict(record.config),
        "tokenizer": record.tokenizer,
        "corpus": record.corpus,
        "until": record.until,
        "pretrained": record.pretrained,
        "validation": record.validation,
    }


def check_same_run(
    saved: Record,
    current: Record,
    *,
    where: object,
    stateful: bool = False,
    flag: str = "--workdir",
) -> None:
    """Raises ValueError naming the first value in which a saved run is another than this one.

    stateful: the method has a state, whose rows are those of a micro-batch. flag: what named
    the saved run.
    """
    old, new = to_dict(saved.config), to_dict(current.config)
    pairs = [(name, old[name], new[name]) for name in IDENTITY]
    pairs += [(f"data.{name}", old["data"][name], new["data"][name]) for name in DATA_IDENTITY]
    sections = [("optimizer", "name"), *([("train", "num_microbatches")] if stateful else [])]
    pairs += [(f"{part}.{name}", old[part][name], new[part][name]) for part, name in sections]
    for name, before, now in pairs:
        if isinstance(before, dict) and isinstance(now, dict):
            section = new["method"] if name == "method_config" else name
            keys = [key for key in {**before, **now} if key not in NOT_IDENTITY]
            differing = [key for key in keys if before.get(key) != now.get(key)]
            if not differing:
                continue
            key = differing[0]
            name, before, now = f"{section}.{key}", before.get(key), now.get(key)
        if before != now:
            raise ValueError(
                f"{where} belongs to a run with {name}={before}, this run has {name}={now}; "
                f"give another {flag}, or the same value"
            )
    if saved.until != current.until:
        raise ValueError(
            f"the run in {where} ends its method's first part at step {saved.until}, this run at "
            f"{current.until}, which follows from train.num_steps; give the same length, or that "
            "step itself"
        )
    if not _same_versions(saved.pretrained, current.pretrained):
        raise ValueError(
            f"the finished model that {where} learns from has changed since then, from "
            f"{saved.pretrained!r} to {current.pretrained!r}; give the same model, or another "
            f"{flag}"
        )
    if saved.tokenizer != current.tokenizer or saved.corpus != current.corpus:
        what = "corpus" if saved.tokenizer == current.tokenizer else "tokenizer"
        raise ValueError(
            f"the {what} has changed since {where} was written: its position in the data would "
            f"mean other text; give another {flag} (--checkpoint.init_from keeps the weights)"
        )
    if saved.validation not in ("", current.validation):  # older records do not say
        raise ValueError(
            f"the text that is held out has changed since {where} was written: its losses would "
            f"not compare; give the same text, or another {flag}"
        )


def _same_versions(saved: str, current: str) -> bool:
    """Whether two `pretrained` are of the same models; older records name a step without a hash."""
    pairs = itertools.zip_longest(saved.split("; "), current.split("; "), fillvalue="")
    return all(before in (now, now.split(", ")[0]) for before, now in pairs)


def check_same_architecture(
    saved: TransformerConfig, current: TransformerConfig, *, where: object
) -> None:
    """Raises ValueError naming the first value in which two models have other parameters.

    How long a recurrent model iterates is no part of its parameters, that it does is.
    """
    ignored = ["compute_dtype", "param_dtype", "remat", "loss_implementation", "kernel_init"]
    ignored += ["attention_implementation", "recurrence_sampling", "backprop_steps"]
    if current.positions != "learned":
        ignored.append("max_length")
    if saved.recurrence and current.recurrence:
        ignored.append("recurrence")
    if not saved.recurrence and not current.recurrence:
        ignored += ["prelude_layers", "coda_layers", "injection"]
    for field in dataclasses.fields(TransformerConfig):
        before, now = getattr(saved, field.name), getattr(current, field.name)
        if before != now and field.name not in ignored:
            raise ValueError(
                f"the model in {where} has model.{field.name}={before}, this run has {now}; "
                "give the same value"
            )
