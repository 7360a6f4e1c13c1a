"""Where arrays live: the mesh, the one logical-axis table, shardings of any tree."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis name -> mesh axes. Parameters and activations share the table.
LOGICAL_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "head_dim": (),
    "norm": (),
    "table_rows": (),
}


def logical_spec(names: Sequence[str | None]) -> PartitionSpec:
    """Translates logical axis names, one per dimension, into a PartitionSpec.

    Raises ValueError for an unknown name, and where two dimensions would use one mesh axis.
    """
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | str | None] = []
    for name in names:
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"unknown logical axis {name!r}; choose from {sorted(LOGICAL_AXES)}")
        axes = LOGICAL_AXES[name] if name is not None else ()
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"logical axes {tuple(names)} use mesh axis {axis!r} twice "
                    f"({used[axis]!r} and {name!r}); leave one of them None"
                )
            used[axis] = str(name)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def batch_spec() -> PartitionSpec:
    """The PartitionSpec of `[B, L]` token arrays."""
    return logical_spec(("batch", "sequence"))


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    dcn_data: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with all four axes, also those of size 1, so that no code asks which exist.

    One size may be -1: it takes what the others leave. `dcn_data` slices are joined along
    `data`. Axes are `Auto`, because Linen does not run under Explicit axes.
    Raises ValueError where the sizes do not use every device exactly once.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name}={size} must be at least 1, or -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if -1 in sizes.values() and len(devices) % known == 0:
        sizes = {n: len(devices) // known if s == -1 else s for n, s in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {given} does not fit {len(devices)} devices; the product of the sizes must be "
            f"{len(devices)} (one size may be -1)"
        )
    if dcn_data < 1 or sizes["data"] % dcn_data:
        raise ValueError(f"dcn_data={dcn_data} does not divide the mesh axis data={sizes['data']}")
    shape = tuple(sizes.values())
    if dcn_data > 1 and devices[0].platform != "cpu":
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        if slices != dcn_data:
            raise ValueError(
                f"dcn_data={dcn_data} does not fit devices in {slices} slices; give {slices}"
            )
        inner = (shape[0] // dcn_data, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (dcn_data, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "cpu":
        grid = np.array(devices).reshape(shape)
    else:
        # Axes of a torus are split where a mesh cannot do without: 8 x 2 on 4 x 4 chips.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Places an activation by logical axis names, one per dimension; no mesh, no effect.

    A dimension that its mesh axes do not divide (a batch of one on eight devices) stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible(x.shape, logical_spec(names), mesh))


def axis_size(name: str) -> int:
    """Devices along an axis of the current mesh; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def cut_axes(x: jax.Array, *names: str | None) -> list[tuple[str, ...]]:
    """The mesh axes that cut each dimension where `constrain` places it, for `jax.shard_map`.

    Those of size 1 cut nothing, and a collective along them would be a copy.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return [()] * x.ndim
    entries = _divisible(x.shape, logical_spec(names), mesh)
    axes = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    return [tuple(axis for axis in each if mesh.shape[axis] > 1) for each in axes]


def gather_width(
    table: jax.Array, width: tuple[str, ...], tokens: Sequence[tuple[str, ...]]
) -> jax.Array:
    """Inside `jax.shard_map`: `[N, D]` of its parts `[N, D / n]` along the mesh axes `width`.

    tokens: the axes that cut what it is used with. Its gradient is scattered, then added up over
    the others of these; left to themselves, compilers add up the whole of it on each device.
    """
    table = _vary(table, width, tokens)
    if not width:
        return table
    if table.shape[0] % jax.lax.axis_size(width):
        return jax.lax.all_gather(table, width, axis=1, tiled=True)
    # By way of whole rows: TPUs scatter along the first dimension what fills no tile of the last.
    table = jax.lax.all_to_all(table, width, split_axis=0, concat_axis=1, tiled=True)
    return jax.lax.all_gather(table, width, axis=0, tiled=True)


def look_up(table: jax.Array, rows: jax.Array, name: str, *, dtype: Any) -> jax.Array:
    """Rows `[B, L, D]` of a table `[N, D]`, by int32 `[B, L]`, each device those of its tokens.

    name: the logical axis of the table's rows. Where a table is cut along the batch's axes, either
    its parts are sent around or, where a device has fewer tokens than rows, what was found in them.
    dtype: of what is found and sent; a row's gradient is added up in the table's own, because in
    bfloat16 the sum of a frequent token would stand still.
    """
    tokens = cut_axes(rows, "batch", "sequence")
    parts, width = cut_axes(table, name, "embed")
    if not any((*tokens, parts, width)):
        return table[rows].astype(dtype)
    width = width if set(width) <= set(tokens[0]) else ()  # a whole batch has no need of it

    def find(table: jax.Array, rows: jax.Array) -> jax.Array:
        if not parts:
            return table[rows].astype(dtype)
        place = rows - jax.lax.axis_index(parts) * table.shape[0]
        here = (place >= 0) & (place < table.shape[0])
        found = table[jnp.where(here, place, 0)].astype(dtype)
        return jax.lax.psum(jnp.where(here[..., None], found, 0), parts)

    def on_each(table: jax.Array, rows: jax.Array) -> jax.Array:
        if not width or rows.size >= table.shape[0]:
            sent = gather_width(table.astype(dtype), width, tokens)
            return find(sent.astype(table.dtype), rows)
        table = _vary(table, width, tokens)
        found = find(table, jax.lax.all_gather(rows, width, axis=0, tiled=True))
        return jax.lax.all_to_all(found, width, split_axis=0, concat_axis=2, tiled=True)

    in_specs = (PartitionSpec(parts, width), PartitionSpec(*tokens))
    return jax.shard_map(on_each, in_specs=in_specs, out_specs=PartitionSpec(*tokens))(table, rows)


def _vary(table: jax.Array, width: tuple[str, ...], tokens: Sequence[tuple[str, ...]]) -> jax.Array:
    """A table that meets other tokens along other axes than its own: its gradient is their sum."""
    others = tuple(axis for axes in tokens for axis in axes if axis not in width)
    return jax.lax.pcast(table, others, to="varying")


def split_rows(tree: Any, num_parts: int) -> Any:
    """Leaves `[B, ...]` to `[num_parts, B / num_parts, ...]`; B must be divisible.

    Part i holds the rows i, i + num_parts, ...: a device that holds neighbouring rows keeps them.
    """

    def split(x: jax.Array) -> jax.Array:
        # A leaf may be empty, such as the answers of rollouts that only think: no -1 here.
        return jnp.swapaxes(x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """The inverse of `split_rows`: leaves `[num_parts, B / num_parts, ...]` to `[B, ...]`."""

    def join(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return jax.tree.map(join, tree)


def whole_along_batch(params: Any, boxed: Any, *, dtype: Any) -> Any:
    """Parameters as a loop over tokens should have them: cut along no axis that cuts the batch.

    Those that such an axis cuts are gathered, in `dtype`, once; left to themselves, compilers
    gather them anew in every round of the loop. boxed: their names, see `param_shardings`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = {name for name, axes in LOGICAL_AXES.items() if set(axes) & set(LOGICAL_AXES["batch"])}

    def place(box: Any, x: jax.Array) -> jax.Array:
        if not (_is_box(box) and names & set(box.names)):
            return x
        x = x.astype(dtype)
        kept = logical_spec([None if name in names else name for name in box.names])
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, kept)

    # A compiler for TPUs moves what only the loop reads back into it.
    return jax.lax.optimization_barrier(jax.tree.map(place, boxed, params, is_leaf=_is_box))


def _axes_size(mesh_shape: Mapping[str, int], entry: tuple[str, ...] | str | None) -> int:
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh_shape[axis] for axis in axes)


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


def param_shardings(
    boxed: Any,
    mesh: Mesh | AbstractMesh,
    *,
    indivisible: Literal["refuse", "whole"] = "refuse",
) -> Any:
    """Shardings of a tree of `nn.with_logical_partitioning` boxes (abstract or not).

    A dimension that its mesh axes do not divide raises ValueError naming the parameter, or with
    `indivisible="whole"` is not cut: a teacher of 3 key heads on a mesh made for its student.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=_is_box)
    placed = [
        (path, leaf.value.shape, logical_spec(leaf.names))
        if _is_box(leaf)
        else (path, leaf.shape, PartitionSpec())
        for path, leaf in leaves
    ]
    if indivisible == "whole":
        placed = [(path, shape, _divisible(shape, spec, mesh)) for path, shape, spec in placed]
    return jax.tree.unflatten(treedef, _checked(placed, mesh))


def _divisible(
    shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    return PartitionSpec(
        *(
            entry if size % _axes_size(mesh.shape, entry) == 0 else None
            for size, entry in zip(shape, spec, strict=False)
        )
    )


_Placed = tuple[Any, Sequence[int], PartitionSpec]  # path, shape, spec


def _checked(placed: Sequence[_Placed], mesh: Mesh | AbstractMesh) -> list[NamedSharding]:
    for path, shape, spec in placed:
        for size, entry in zip(shape, spec, strict=False):
            parts = _axes_size(mesh.shape, entry)
            if size % parts:
                raise ValueError(
                    f"parameter {_name(path)} of shape {tuple(shape)} cannot be cut into {parts} "
                    f"along its dimension of {size}; mesh axis {entry} of this model may be "
                    f"{_possible(placed, entry)}"
                )
    return [NamedSharding(mesh, spec) for _, _, spec in placed]


def _possible(placed: Sequence[_Placed], entry: Any) -> str:
    """The sizes that divide every dimension cut like `entry`."""
    sizes = [
        size
        for _, shape, spec in placed
        for size, other in zip(shape, spec, strict=False)
        if other == entry
    ]
    common = math.gcd(*sizes)
    divisors = [str(n) for n in range(1, common + 1) if common % n == 0]
    return " or ".join(filter(None, (", ".join(divisors[:-1]), divisors[-1])))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def unbox(tree: Any) -> Any:
    """Drops the logical-axis boxes."""
    return nn.meta.unbox(tree)


def shardings_by_path(
    tree: Any, rules: Sequence[tuple[str, Sequence[str | None]]], mesh: Mesh | AbstractMesh
) -> Any:
    """Shardings of a foreign tree: the first rule (regex, logical axes) that matches a path wins.

    Paths are joined by `/` and searched, not matched from the start. A leaf without a rule is
    replicated. Raises ValueError where a rule's axes are not one per dimension of the leaf.
    """

    def spec(path: Any, shape: Sequence[int]) -> PartitionSpec:
        name = _name(path)
        for pattern, names in rules:
            if re.search(pattern, name):
                if len(names) != len(shape):
                    raise ValueError(
                        f"rule {pattern!r} names {len(names)} axes for {name} of shape {shape}"
                    )
                return logical_spec(names)
        return PartitionSpec()

    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    placed = [(path, leaf.shape, spec(path, leaf.shape)) for path, leaf in leaves]
    return jax.tree.unflatten(treedef, _checked(placed, mesh))


def shardings_like_params(tree: Any, params: Any, shardings: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a tree that repeats the parameters, such as an optimiser state.

    A leaf whose path ends in a parameter's path and that has its shape is placed like it;
    anything else (counters, factored statistics) is replicated.
    """
    flat_params = jax.tree_util.tree_flatten_with_path(params)[0]
    by_path = {
        tuple(map(str, path)): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(flat_params, jax.tree.leaves(shardings), strict=True)
    }
    longest = max(map(len, by_path))

    def place(path: Any, leaf: Any) -> NamedSharding:
        keys = tuple(map(str, path))
        for length in range(min(longest, len(keys)), 0, -1):
            shape, sharding = by_path.get(keys[-length:], (None, None))
            if shape == leaf.shape and sharding is not None:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def sharded_fraction(tree: Any, shardings: Any, *, axes: Sequence[str]) -> float:
    """Share of the tree's bytes (0 to 1) in leaves that are cut along one of the mesh axes."""
    total = cut = 0
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        names = {
            name
            for entry in sharding.spec
            for name in ((entry,) if isinstance(entry, str) else entry or ())
        }
        total += size
        cut += size * any(a in names and sharding.mesh.shape[a] > 1 for a in axes)
    return cut / max(total, 1)


def describe(tree: Any, shardings: Any) -> str:
    """One line a leaf: path, dtype, shape and where it is cut; the golden text of a preset."""
    lines = []
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True):
        entries = [
            "+".join((entry,) if isinstance(entry, str) else entry or ("-",))
            for entry in (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
        ]
        lines.append(
            f"{_name(path)}  {leaf.dtype.name}{list(leaf.shape)}  {' '.join(entries)}".rstrip()
        )
    return "\n".join(lines) + "\n"
