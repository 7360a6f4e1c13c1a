"""The mesh, the one table of logical axes, and the shardings made from it."""

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import init_params

P = PartitionSpec
TINY = TransformerConfig(
    vocab_size=250, num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24
)


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Stands in for a device of a multi-slice pod, of which a CPU machine has none."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "stand-in"
    process_index: int = 0


def abstract_mesh(**sizes: int):
    shape = tuple(sizes.get(name, 1) for name in partitioning.MESH_AXES)
    return AbstractMesh(shape, partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def abstract_params(cfg: TransformerConfig = TINY):
    return jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))


def shape(*sizes: int):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def boxed(names: tuple[str | None, ...], *sizes: int):
    return nn.LogicallyPartitioned(shape(*sizes), names)


# The table.


def test_logical_names_become_mesh_axes():
    assert partitioning.logical_spec(("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)
    assert partitioning.logical_spec(("batch", None, "sequence")) == (
        P(("data", "fsdp"), None, "sequence")
    )
    assert partitioning.batch_spec() == P(("data", "fsdp"), "sequence")


def test_an_unknown_logical_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown logical axis 'width'; choose from .*'embed'"):
        partitioning.logical_spec(("width",))


@pytest.mark.parametrize(
    ("names", "axis"),
    [(("heads", "mlp"), "tensor"), (("batch", None, "embed"), "fsdp"), (("vocab",) * 2, "tensor")],
)
def test_one_mesh_axis_twice_in_a_tensor_is_refused(names: tuple[str | None, ...], axis: str):
    first, second = (name for name in names if name is not None)
    with pytest.raises(ValueError, match=f"mesh axis '{axis}' twice .'{first}' and '{second}'"):
        partitioning.logical_spec(names)


def test_the_table_names_mesh_axes_only():
    used = {axis for axes in partitioning.LOGICAL_AXES.values() for axis in axes}
    assert used == set(partitioning.MESH_AXES)


# The mesh.


def test_the_mesh_has_every_axis_in_order():
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert mesh.axis_names == partitioning.MESH_AXES
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "axis", "size"),
    [({"fsdp": 2}, "data", 4), ({"data": 1, "fsdp": -1}, "fsdp", 8), ({}, "data", 8)],
)
def test_minus_one_takes_what_the_others_leave(sizes: dict[str, Any], axis: str, size: int):
    assert partitioning.make_mesh(**sizes).shape[axis] == size


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3, fsdp=1, tensor=1, sequence=1 does not fit 8 devices"),
        ({"fsdp": 3}, "data=-1, fsdp=3, .* does not fit 8 devices; the product .* must be 8"),
        ({"data": -1, "fsdp": -1}, "does not fit 8 devices; .*one size may be -1"),
        ({"tensor": 0}, "mesh axis tensor=0 must be at least 1, or -1"),
        ({"fsdp": -2}, "mesh axis fsdp=-2 must be at least 1, or -1"),
        ({"data": 8, "dcn_data": 3}, "dcn_data=3 does not divide the mesh axis data=8"),
        ({"data": 8, "dcn_data": 0}, "dcn_data=0 does not divide the mesh axis data=8"),
    ],
)
def test_an_impossible_mesh_is_refused(sizes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        partitioning.make_mesh(**sizes)


def test_slices_are_joined_along_data_outermost():
    # Slices alternate in the list, so that its order alone would mix them.
    devices = [Accelerator(i, slice_index=i % 2) for i in range(8)]
    mesh = partitioning.make_mesh(data=4, fsdp=2, dcn_data=2, devices=devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape == (4, 2, 1, 1)
    assert slices[..., 0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert {device.id for device in mesh.devices.flat} == set(range(8))


def test_a_dcn_factor_that_is_not_the_number_of_slices_is_refused():
    devices = [Accelerator(i, slice_index=0) for i in range(8)]
    with pytest.raises(ValueError, match="dcn_data=2 does not fit devices in 1 slices; give 1"):
        partitioning.make_mesh(data=4, fsdp=2, dcn_data=2, devices=devices)


# Activations.


def placed(x: jax.Array) -> PartitionSpec:
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding)
    return sharding.spec


def test_constrain_places_an_activation():
    mesh = partitioning.make_mesh(data=2, fsdp=2, sequence=2)
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: partitioning.constrain(x, "batch", "sequence", None))(
            jnp.zeros((4, 6, 5))
        )
        assert placed(x)[:2] == (("data", "fsdp"), "sequence")
        assert x.addressable_shards[0].data.shape == (1, 3, 5)


def test_constrain_leaves_whole_what_does_not_divide():
    with jax.set_mesh(partitioning.make_mesh(data=4, sequence=2)):
        jaxpr = jax.make_jaxpr(lambda x: partitioning.constrain(x, "batch", "sequence"))(
            jnp.zeros((1, 6))
        )
    assert jaxpr.eqns[0].params["sharding"].spec == P(None, "sequence")


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.zeros((2, 3))
    assert partitioning.constrain(x, "batch", None) is x


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": 2, "fsdp": 4}, (8, 6)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (4, 6)),
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, (2, 6)),
        ({"tensor": 8}, (1, 6)),
        ({"fsdp": 8}, (3, 6)),  # a batch that stays whole
        ({"data": 4, "fsdp": 2}, (8, 5)),
        ({"data": 2, "fsdp": 4}, (8, 40)),  # more tokens on a device than rows in the table
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, (2, 80)),
    ],
)
@pytest.mark.parametrize(("name", "num_rows"), [("vocab", 32), ("table_rows", 9)])
def test_looking_up_is_indexing_on_any_mesh(
    sizes: dict[str, int], shape: tuple[int, int], name: str, num_rows: int
):
    table = jax.random.normal(jax.random.key(0), (num_rows, 16))
    rows = jax.random.randint(jax.random.key(1), shape, 0, num_rows)
    slopes = jax.random.normal(jax.random.key(2), (*shape, 16))

    def looked_up(table: jax.Array):
        return partitioning.look_up(table, rows, name, dtype=table.dtype)

    whole: Any = {"data": 1, **sizes}
    mesh = partitioning.make_mesh(**whole)
    with jax.set_mesh(mesh):
        cut = NamedSharding(mesh, partitioning.logical_spec((name, "embed")))
        placed = jax.device_put(table, cut)
        out, pull = jax.vjp(jax.jit(looked_up), placed)
        (gradient,) = jax.jit(pull)(slopes)
    np.testing.assert_array_equal(out, table[rows])
    expected = jnp.zeros_like(table).at[rows].add(slopes)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def compiled_gradient_of_looking_up(num_tokens: int) -> str:
    """By 8 rows of tokens in a table of 64 x 16, cut along 4 devices."""
    mesh = partitioning.make_mesh(data=2, fsdp=4)
    rows = jnp.zeros((8, num_tokens), jnp.int32)
    with jax.set_mesh(mesh):
        cut = NamedSharding(mesh, P(None, "fsdp"))
        table = jax.device_put(jnp.ones((64, 16)), cut)

        def total(table: jax.Array, rows: jax.Array):
            found = partitioning.look_up(table, rows, "vocab", dtype=table.dtype)
            return jnp.sin(found).sum()

        compiled = jax.jit(jax.grad(total), out_shardings=cut).lower(table, rows).compile()
    return compiled.as_text() or ""


def test_the_gradient_of_looking_up_is_scattered():
    text = compiled_gradient_of_looking_up(64)
    assert "reduce-scatter(" in text
    added = re.findall(r"= (f32\[[\d,]*\])\S* all-reduce\(", text)
    assert "f32[64,16]" not in added, added  # each device would hold all of it


@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}])
@pytest.mark.parametrize("num_rows", [16, 1024])  # a device has 128 or 512 tokens
def test_a_frequent_token_has_its_whole_gradient(sizes: dict[str, int] | None, num_rows: int):
    rows = jnp.zeros((8, 128), jnp.int32)

    def total(table: jax.Array):
        found = partitioning.look_up(table, rows, "vocab", dtype=jnp.bfloat16)
        assert found.dtype == jnp.bfloat16
        return found.astype(jnp.float32).sum()

    table = jnp.ones((num_rows, 8))
    if sizes is None:
        gradient = jax.jit(jax.grad(total))(table)
    else:
        whole: Any = {"data": 1, **sizes}
        mesh = partitioning.make_mesh(**whole)
        cut = NamedSharding(mesh, partitioning.logical_spec(("vocab", "embed")))
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(total))(jax.device_put(table, cut))
    assert gradient[0].tolist() == [1024.0] * 8


def test_a_table_of_more_rows_than_tokens_stays_where_it_is():
    text = compiled_gradient_of_looking_up(63)
    sent = re.findall(r"= \(?(\w+\[[\d,]*\]).* (all-gather|reduce-scatter|all-to-all)\(", text)
    assert {kind for _, kind in sent} == {"all-gather", "all-to-all"}
    assert {shape for shape, kind in sent if kind == "all-gather"} == {"s32[4,63]"}, sent


# Parameters.


def test_parameters_are_cut_by_the_table():
    mesh = abstract_mesh(fsdp=2, tensor=2)
    shardings = partitioning.param_shardings(abstract_params(), mesh)
    attention, mlp = shardings["blocks"]["attention"], shardings["blocks"]["mlp"]
    assert attention["query"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert attention["key"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert attention["output"]["kernel"].spec == P(None, "tensor", None, "fsdp")
    assert mlp["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert shardings["embedding"]["table"].spec == P("tensor", "fsdp")
    assert shardings["head"]["kernel"].spec == P("fsdp", "tensor")
    assert not any(shardings["final_norm"]["scale"].spec)


def test_a_leaf_without_names_is_replicated():
    found = partitioning.param_shardings({"a": shape(3)}, abstract_mesh(fsdp=2))
    assert found["a"].spec == P()


@pytest.mark.parametrize("tensor", [4, 8])
def test_more_tensor_parts_than_key_heads_is_refused_with_the_possible_sizes(tensor: int):
    message = (
        rf"parameter blocks/attention/key/kernel of shape \(3, 16, 2, 4\) cannot be cut into "
        rf"{tensor} along its dimension of 2; mesh axis tensor of this model may be 1 or 2$"
    )
    with pytest.raises(ValueError, match=message):
        partitioning.param_shardings(abstract_params(), abstract_mesh(tensor=tensor))


def test_a_foreign_model_is_cut_where_it_can_be():
    mesh = abstract_mesh(tensor=4, fsdp=2)
    found = partitioning.param_shardings(abstract_params(), mesh, indivisible="whole")
    attention = found["blocks"]["attention"]  # 4 query heads, 2 key heads
    assert attention["query"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert attention["key"]["kernel"].spec == P(None, "fsdp", None, None)


def test_possible_sizes_divide_every_dimension_that_is_cut():
    tree = {"a": boxed(("mlp",), 12), "b": boxed(("heads", None), 18, 5), "c": boxed(("embed",), 7)}
    with pytest.raises(
        ValueError, match=r"parameter a .* tensor of this model may be 1, 2, 3 or 6$"
    ):
        partitioning.param_shardings(tree, abstract_mesh(tensor=5))


def test_a_sharded_share_counts_bytes():
    mesh = abstract_mesh(fsdp=2)
    tree = {"cut": jax.ShapeDtypeStruct((6, 5), jnp.bfloat16), "whole": shape(5)}
    shardings = {"cut": NamedSharding(mesh, P("fsdp")), "whole": NamedSharding(mesh, P())}
    share = partitioning.sharded_fraction(tree, shardings, axes=["fsdp", "tensor"])
    assert share == 60 / 80  # 30 numbers of 2 bytes, 5 of 4
    assert partitioning.sharded_fraction(tree, shardings, axes=["tensor"]) == 0
    one = {name: NamedSharding(abstract_mesh(), s.spec) for name, s in shardings.items()}
    assert partitioning.sharded_fraction(tree, one, axes=["fsdp"]) == 0  # an axis of size 1


# Foreign trees and optimiser states.

RULES = [
    (r"attn/.*kernel$", ("embed", "heads")),
    (r"kernel$", ("embed", None)),
    (r"^wte$", ("vocab", "embed")),
]


def test_the_first_rule_that_matches_a_path_wins():
    tree = {"h": [{"attn": {"q": {"kernel": shape(6, 4)}}, "mlp": {"kernel": shape(6, 7)}}]}
    tree |= {"wte": shape(8, 6), "ln": {"scale": shape(5)}}
    found = partitioning.shardings_by_path(tree, RULES, abstract_mesh(fsdp=2, tensor=2))
    assert found["h"][0]["attn"]["q"]["kernel"].spec == P("fsdp", "tensor")
    assert found["h"][0]["mlp"]["kernel"].spec == P("fsdp", None)
    assert found["wte"].spec == P("tensor", "fsdp")
    assert found["ln"]["scale"].spec == P()


def test_a_rule_that_does_not_fit_a_leaf_is_refused():
    mesh = abstract_mesh(fsdp=2)
    with pytest.raises(ValueError, match=r"rule 'kernel\$' names 2 axes for m/kernel of shape"):
        partitioning.shardings_by_path({"m": {"kernel": shape(2, 3, 5)}}, RULES, mesh)
    with pytest.raises(ValueError, match=r"parameter m/kernel of shape \(3, 5\) cannot be cut"):
        partitioning.shardings_by_path({"m": {"kernel": shape(3, 5)}}, RULES, mesh)


def test_an_optimiser_state_is_placed_like_its_parameters():
    mesh = abstract_mesh(fsdp=2)
    params = {"a": {"kernel": shape(4, 6)}, "b": {"kernel": shape(6, 4), "bias": shape(4)}}
    shardings = {
        "a": {"kernel": NamedSharding(mesh, P("fsdp"))},
        "b": {"kernel": NamedSharding(mesh, P(None, "fsdp")), "bias": NamedSharding(mesh, P())},
    }
    state = jax.eval_shape(optax.chain(optax.clip(1.0), optax.adam(1e-3)).init, params)
    found = partitioning.shardings_like_params(state, params, shardings, mesh)
    adam = found[1][0]
    for moment in (adam.mu, adam.nu):
        assert moment == shardings
    assert adam.count.spec == P()


def test_a_leaf_of_another_shape_is_not_placed_like_a_parameter():
    mesh = abstract_mesh(fsdp=2)
    params = {"kernel": shape(4, 6)}
    shardings = {"kernel": NamedSharding(mesh, P("fsdp"))}
    found = partitioning.shardings_like_params(
        {"rows": {"kernel": shape(4)}, "all": {"kernel": shape(4, 6)}}, params, shardings, mesh
    )
    assert found["rows"]["kernel"].spec == P()
    assert found["all"]["kernel"].spec == P("fsdp")


def test_describe_by_hand():
    mesh = abstract_mesh(fsdp=2)
    tree = {"a": {"kernel": shape(4, 6)}, "x": jax.ShapeDtypeStruct((), jnp.int32)}
    shardings = {
        "a": {"kernel": NamedSharding(mesh, P(("data", "fsdp")))},
        "x": NamedSharding(mesh, P()),
    }
    expected = "a/kernel  float32[4, 6]  data+fsdp -\nx  int32[]\n"
    assert partitioning.describe(tree, shardings) == expected


def test_unbox_drops_the_names():
    tree = partitioning.unbox({"a": boxed(("embed",), 7)})
    assert tree["a"].shape == (7,)


# What the compiler makes of it.


def test_parameters_are_born_in_their_parts():
    mesh = partitioning.make_mesh(data=1, fsdp=4, tensor=2)
    cfg = dataclasses.replace(TINY, embed_dim=64, head_dim=8, mlp_dim=96)
    shapes = abstract_params(cfg)
    shardings = partitioning.param_shardings(shapes, mesh)

    def create(key: jax.Array):
        return partitioning.unbox(init_params(cfg, key))

    whole = jax.jit(create).lower(jax.random.key(0)).compile()
    cut = jax.jit(create, out_shardings=shardings).lower(jax.random.key(0)).compile()
    one, part = (program.memory_analysis() for program in (whole, cut))
    assert one is not None
    assert part is not None
    assert part.output_size_in_bytes < 1.05 * one.output_size_in_bytes / 8
    assert part.temp_size_in_bytes < one.output_size_in_bytes / 4
    texts = [program.as_text() or "" for program in (whole, cut)]
    for leaf in jax.tree.leaves(partitioning.unbox(shapes)):
        if math.prod(leaf.shape) > 1000:
            full = re.escape(f"f32[{','.join(map(str, leaf.shape))}]")
            assert re.search(full, texts[0])
            assert not re.search(full, texts[1]), f"a device computes all of {leaf.shape}"


def test_parts_take_every_nth_row_and_are_joined_again():
    tree = {"rows": np.arange(24).reshape(8, 3), "none": np.zeros((8, 3, 0))}
    parts = partitioning.split_rows(tree, 4)
    assert parts["none"].shape == (4, 2, 3, 0)
    np.testing.assert_array_equal(parts["rows"][:, :, 0] // 3, [[0, 4], [1, 5], [2, 6], [3, 7]])
    jax.tree.map(np.testing.assert_array_equal, partitioning.join_rows(parts), tree)
