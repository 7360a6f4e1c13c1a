"""Hugging Face weights in and out: safetensors and config.json <-> parameters of a language model.

    cfg = config_from_huggingface(json.loads((folder / "config.json").read_text()))
    params = load_params(folder, cfg, shardings=shardings)
    save_params(other_folder, params, cfg)

Neither direction needs torch or transformers. Folders are local.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.huggingface_config import (
    config_from_huggingface,
    config_to_huggingface,
    family_of,
)
from jaxlib_methods.models.huggingface_layout import Placement, is_ignorable, join, placements
from jaxlib_methods.models.huggingface_recurrent import buffers
from jaxlib_methods.models.language_model import init_params
from jaxlib_methods.models.partitioning import unbox

__all__ = [
    "config_from_huggingface",
    "config_to_huggingface",
    "load_params",
    "save_params",
    "weight_files",
]

_SAMPLE_BYTES = 1 << 16
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")

Folder = str | os.PathLike[str]
_Source = tuple[Placement, int | None]  # a parameter and its layer


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Hugging Face weights need safetensors; pip install jaxlib-methods[hf]"
        ) from error
    return safetensors


def _placements(cfg: TransformerConfig, family: str | None = None) -> list[Placement]:
    boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))  # no device is touched
    shapes = {path: leaf.shape for path, leaf in _flat(unbox(boxed)).items()}
    return placements(cfg, shapes, family_of(cfg, family).model_type)


def _flat(tree: Any) -> dict[str, Any]:
    return {str(path): leaf for path, leaf in flatten_dict(tree, sep="/").items()}


def _sources(found: Iterable[Placement]) -> dict[str, list[_Source]]:
    """Tensor name -> the parameters, with their layer, that lie in it."""
    sources: dict[str, list[_Source]] = {}
    for placement in found:
        for layer in placement.layers:
            sources.setdefault(placement.file_name(layer), []).append((placement, layer))
    return sources


def load_params(
    folder: Folder,
    cfg: TransformerConfig,
    *,
    shardings: Any = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Parameters of `Transformer(cfg)`, or of a recurrent model, from a folder of safetensors.

    shardings: a tree like the parameters; each process then reads only the bytes that its own
    devices need. None gives ordinary arrays. dtype: None is `cfg.param_dtype`. The vocabulary is
    padded with zeros. Raises FileNotFoundError where there are no weights, and one ValueError
    that names every tensor that is missing, has another shape, or is not known.
    """
    folder = Path(folder)
    dtype = jnp.dtype(cfg.param_dtype if dtype is None else dtype)
    places = None if shardings is None else _flat(shardings)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        found = _check(tensors, cfg, folder)
        if places is not None and places.keys() != {placement.path for placement in found}:
            raise ValueError("shardings must be a tree like the parameters of this configuration")
        leaves = {}
        for placement in found:
            if places is None:
                whole = (slice(None),) * len(placement.shape)
                leaf = jnp.asarray(placement.read(tensors.__getitem__, whole, dtype))
            else:
                leaf = _read_sharded(placement, tensors, places[placement.path], dtype)
            leaves[placement.path] = leaf
    return unflatten_dict(leaves, sep="/")


def _read_sharded(
    placement: Placement, tensors: Mapping[str, Any], sharding: Any, dtype: np.dtype
) -> jax.Array:
    # Devices that hold the same part (data parallelism) share one read.
    blocks: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def block(index: Any) -> np.ndarray:
        key = tuple(s.indices(n) for s, n in zip(index, placement.shape, strict=True))
        if key not in blocks:
            blocks[key] = placement.read(tensors.__getitem__, index, dtype)
        return blocks[key]

    return jax.make_array_from_callback(placement.shape, sharding, block, dtype=dtype)


def weight_files(folder: Path) -> list[str]:
    """Names of the files with a folder's weights, found without reading them.

    Raises FileNotFoundError where one is missing, ValueError where the index is none.
    """
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder of safetensors"
        )
    files = sorted(set(_read_index(folder / INDEX_FILE).values()))
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}, which {INDEX_FILE} names")
    return files


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> the file beside the index that holds it. Raises ValueError for others."""
    try:
        index = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # nested too deep
        raise ValueError(f"{path} is not JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"{path} has no weight_map from tensor names to files; export or download it again"
        )
    for name, file in weight_map.items():
        # The index comes from elsewhere: a name with a path in it must not lead out of the folder.
        plain = isinstance(file, str) and file.isprintable() and "\\" not in file
        if not plain or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {file!r} for {name!r}; it may name only .safetensors beside it"
            )
    return weight_map


def weights_version(folder: Path) -> str:
    """A hash that differs where a folder's weights do: of sizes, heads and tails of its files."""
    digest = hashlib.sha256()
    for name in weight_files(folder):
        with (folder / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{name} {size} ".encode())
            for begin in (0, max(0, size - _SAMPLE_BYTES)):
                file.seek(begin)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def check_weights(folder: Folder, cfg: TransformerConfig) -> None:
    """Reads the headers of a folder's weight files and nothing else.

    Raises FileNotFoundError where a file is missing, ValueError naming every tensor that is
    missing, unknown or of another shape.
    """
    with contextlib.ExitStack() as stack:
        _check(_open(Path(folder), stack), cfg, Path(folder))


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Tensor name -> slice, of all weight files, which stay open as long as the stack."""
    safetensors = _safetensors()
    tensors = {}
    for file in weight_files(folder):
        try:
            handle = stack.enter_context(safetensors.safe_open(folder / file, framework="numpy"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{folder / file} is not a whole safetensors file: {error}") from error
        tensors |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


def _check(tensors: Mapping[str, Any], cfg: TransformerConfig, folder: Path) -> list[Placement]:
    """Where the parameters lie in a folder's tensors. Raises ValueError where they do not fit."""
    if cfg.num_layers > len(tensors):  # a name for each of a billion layers would fill the memory
        raise ValueError(
            f"{folder} does not hold this model: its {len(tensors)} tensors are too few for "
            f"{cfg.num_layers} layers; give the config.json of these weights"
        )
    found = _placements(cfg)
    expected = {name: parts[0][0].file_shape for name, parts in _sources(found).items()}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if name not in expected:
            if not is_ignorable(name, cfg):
                problems.append(f"{name} is not known")
        elif shape != expected[name]:
            problems.append(f"{name} is {list(shape)}, wanted {list(expected[name])}")
        elif kind not in _FLOATS:
            problems.append(f"{name} is {kind}, wanted one of {_FLOATS}")
    if problems:
        raise ValueError(f"{folder} does not hold this model: {'; '.join(sorted(problems))}")
    return found


def save_params(
    folder: Folder,
    params: Mapping[str, Any],
    cfg: TransformerConfig,
    *,
    family: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    extra_config: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes safetensors and config.json that transformers loads; the vocabulary is unpadded.

    A recurrent model is loaded by the code that lies beside the published one (Huginn-0125).
    Every process calls it with its part of the parameters; they are gathered one tensor at a
    time and process 0 writes. The folder appears whole or not at all. `extra_config` goes into
    config.json, for what a `TransformerConfig` does not know (`eos_token_id`); `extra_files`, by
    name, lie beside it.
    Raises FileExistsError where the folder has files, ValueError where the parameters do not fit.
    """
    folder = Path(folder).absolute()
    found = _placements(cfg, family)
    leaves = _flat(unbox(params))
    _check_leaves(leaves, found)
    config_json = config_to_huggingface(cfg, family=family)
    config_json |= {"torch_dtype": leaves["embedding/table"].dtype.name, **(extra_config or {})}
    writes = jax.process_index() == 0
    taken = writes and is_taken(folder)
    if multihost_utils.broadcast_one_to_all(np.asarray(taken)):
        raise FileExistsError(f"{folder} already exists; give a new or an empty folder")
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shards = _shards(_sources(found), leaves, max_shard_bytes)
    constant = buffers(cfg) if cfg.recurrence else {}
    try:
        if writes:
            partial.mkdir(parents=True)
            for name, content in (extra_files or {}).items():
                (partial / name).write_bytes(content)
            _write_json(partial / "config.json", config_json)
            if len(shards) > 1:
                _write_json(partial / INDEX_FILE, _index(shards, leaves, constant))
        for file, sources in shards.items():
            tensors = dict(_gather(sources, leaves, keep=writes))
            if writes:
                tensors |= constant if file == next(iter(shards)) else {}
                path = partial / file
                _safetensors().numpy.save_file(tensors, path, metadata={"format": "pt"})
        if writes:
            os.replace(partial, folder)
    finally:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
    multihost_utils.sync_global_devices("save_params")


def is_taken(folder: Path) -> bool:
    """Whether there is something already, so that `save_params` refuses the folder."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _check_leaves(leaves: Mapping[str, Any], found: list[Placement]) -> None:
    expected = {placement.path: placement.shape for placement in found}
    given = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    problems = [
        f"{path} is {given.get(path, 'missing')}, wanted {expected.get(path, 'nothing')}"
        for path in sorted(expected.keys() | given.keys())
        if given.get(path) != expected.get(path)
    ]
    if problems:
        raise ValueError(f"the parameters do not fit the configuration: {'; '.join(problems)}")


def _num_bytes(sources: list[_Source], leaves: Mapping[str, Any]) -> int:
    placement, _ = sources[0]
    return math.prod(placement.file_shape) * leaves[placement.path].dtype.itemsize


def _shards(
    sources: Mapping[str, list[_Source]], leaves: Mapping[str, Any], max_bytes: int
) -> dict[str, dict[str, list[_Source]]]:
    """File name -> the tensors in it, in order, as many as fit below `max_bytes`."""
    shards: list[dict[str, list[_Source]]] = [{}]
    used = 0
    for name, parts in sources.items():
        size = _num_bytes(parts, leaves)
        if shards[-1] and used + size > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = parts
        used += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _index(
    shards: Mapping[str, dict[str, list[_Source]]],
    leaves: Mapping[str, Any],
    constant: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    total = sum(_num_bytes(parts, leaves) for s in shards.values() for parts in s.values())
    weight_map = {name: file for file, sources in shards.items() for name in sources}
    weight_map |= dict.fromkeys(constant, next(iter(shards)))
    total += sum(array.nbytes for array in constant.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _gather(
    sources: Mapping[str, list[_Source]], leaves: Mapping[str, Any], *, keep: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors as the file holds them; a process that does not keep them only takes part."""
    for name, parts in sources.items():
        ours = [_whole(leaves[placement.path], layer) for placement, layer in parts]
        if keep:
            used = [placement for placement, _ in parts]
            blocks = [p.block(np.asarray(o)) for p, o in zip(used, ours, strict=True)]
            yield name, join(used, blocks)
        else:
            jax.block_until_ready(ours)  # one tensor at a time here too


def _whole(leaf: Any, layer: int | None) -> Any:
    """The leaf, or one layer of it, whole on every process."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf if layer is None else leaf[layer]
    if not isinstance(leaf.sharding, NamedSharding):
        raise ValueError(f"a {leaf.sharding} cannot be gathered; give parameters on a mesh")
    replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax.jit(_pick, out_shardings=replicated)(leaf, layer)


def _pick(leaf: jax.Array, layer: jax.Array | None) -> jax.Array:
    if layer is None:
        return leaf
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
