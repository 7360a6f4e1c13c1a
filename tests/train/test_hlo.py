"""Loops, bytes and collectives of compiled programs, and their seconds, worked by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_methods.models import partitioning
from jaxlib_methods.train import hlo, roofline
from jaxlib_methods.train.roofline import Chip

AXES = {"slices": 1, "data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}


def compiled_text(function: Callable[..., Any], *arguments: Any) -> str:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return text


def fsdp_matmuls(num_layers: int) -> hlo.Cost:
    """x @ W for each of the layers, W `[64, 64]` float32 cut into 4 and gathered."""
    mesh = partitioning.make_mesh(data=2, fsdp=4)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((num_layers, 64, 64), jnp.float32, sharding=cut)

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            whole = jax.lax.with_sharding_constraint(w, partitioning.replicated(mesh))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), rows), None

        return jax.lax.scan(layer, x, w)[0]

    return hlo.read(compiled_text(run, x, w), AXES)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_scan_gathers_the_weights_of_each_layer(num_layers: int):
    cost = fsdp_matmuls(num_layers)
    assert cost.collectives == {
        ("all-gather", "fsdp"): hlo.Moved(num_layers, num_layers * 64 * 64 * 4)
    }
    assert cost.unknown_loops == 0


PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %reduced = f32[8,128]{1,0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[2,128]{1,0:T(8,128)} dynamic-slice(%reduced, %zero, %zero)
}

%sliced (stack: f32[10,8,128], i: s32[]) -> f32[8,128] {
  %stack = f32[10,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i, %i, %i)
  ROOT %layer = f32[8,128]{1,0} bitcast(%one)
}

%body (state: (s32[], f32[10,8,128])) -> (s32[], f32[10,8,128]) {
  %state = (s32[], f32[10,8,128]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state), index=0
  %stack.1 = f32[10,8,128]{2,1,0} get-tuple-element(%state), index=1
  %x = f32[8,128]{1,0} fusion(%stack.1, %i.1), kind=kLoop, calls=%sliced
  %move = (f32[8,128], f32[8,128]) collective-permute-start(%x), source_target_pairs={{0,4},{4,0}}
  %done = f32[8,128]{1,0} collective-permute-done(%move)
  %scattered = f32[2,128]{1,0:T(8,128)S(1)} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1
  %two = s32[] constant(2)
  %later = s32[] add(%i.1, %two)
  ROOT %next = (s32[], f32[10,8,128]{2,1,0}) tuple(%later, %stack.1)
}

%condition (state: (s32[], f32[10,8,128])) -> pred[] {
  %state.1 = (s32[], f32[10,8,128]{2,1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.1), index=0
  %ten = s32[] constant(10)
  ROOT %test = pred[] compare(%i.2, %ten), direction=LT
}

ENTRY %main (stack.2: f32[10,8,128]) -> f32[10,8,128] {
  %stack.2 = f32[10,8,128]{2,1,0} parameter(0)
  %begin = s32[] constant(4)
  %first = (s32[], f32[10,8,128]{2,1,0}) tuple(%begin, %stack.2)
  %loop = (s32[], f32[10,8,128]{2,1,0}) while(%first), condition=%condition, body=%body
  ROOT %result = f32[10,8,128]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_without_a_note_is_counted_by_its_condition():
    cost = hlo.read(PROGRAM, AXES)
    assert cost.collectives == {  # three trips: 4, 6 and 8
        ("collective-permute", "data"): hlo.Moved(3, 3 * 4096),
        ("reduce-scatter", "fsdp"): hlo.Moved(3, 3 * 4096),
    }
    # Of the stack a trip reads one layer and the index, and writes the layer; it moves that, sums
    # it into VMEM, adds to the index and compares it.
    assert cost.memory_bytes == 3 * ((4096 + 4 + 4096) + 2 * 4096 + 4096 + 3 * 4 + 2 * 4 + 1)


def test_a_loop_that_may_end_sooner_counts_to_its_bound():
    text = PROGRAM.replace(
        "ROOT %test = pred[] compare(%i.2, %ten), direction=LT",
        "%test = pred[] compare(%i.2, %ten), direction=LT\n  ROOT %both = pred[] and(%test, %test)",
    )
    cost = hlo.read(text, AXES)
    assert (cost.collectives["collective-permute", "data"].count, cost.unknown_loops) == (3, 0)


# Begun in front of a loop of 5 trips, in which a part of it overlaps with `tanh`.
OVERLAPPED = """HloModule jit_step, is_scheduled=true

%begin (p: f32[2,128]) -> (f32[2,128], f32[8,128]) {
  %p = f32[2,128]{1,0} parameter(0)
  %gather.1 = f32[8,128]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %begun = (f32[2,128]{1,0}, f32[8,128]{1,0}) custom-call(%p, %gather.1)
}

%part (q: f32[2,128], whole: f32[8,128], x: f32[128]) -> (f32[128], f32[8,128]) {
  %q = f32[2,128]{1,0} parameter(0)
  %whole = f32[8,128]{1,0} parameter(1)
  %x = f32[128]{0} parameter(2)
  %gather.2 = f32[8,128]{1,0} all-gather(%q), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}
  %y = f32[128]{0} tanh(%x)
  ROOT %both = (f32[128]{0}, f32[8,128]{1,0}) tuple(%y, %whole)
}

%body (state: (f32[2,128], f32[8,128], f32[128])) -> (f32[2,128], f32[8,128], f32[128]) {
  %state = (f32[2,128]{1,0}, f32[8,128]{1,0}, f32[128]{0}) parameter(0)
  %cut = f32[2,128]{1,0} get-tuple-element(%state), index=0
  %buffer = f32[8,128]{1,0} get-tuple-element(%state), index=1
  %z = f32[128]{0} get-tuple-element(%state), index=2
  %step = (f32[128]{0}, f32[8,128]{1,0}) fusion(%cut, %buffer, %z), kind=kOutput, \
output_to_operand_aliasing={{1}: (1, {})}, calls=%part
  ROOT %next = (f32[2,128]{1,0}, f32[8,128]{1,0}, f32[128]{0}) tuple(%cut, %step, %step)
}

%condition (state.1: (f32[2,128], f32[8,128], f32[128])) -> pred[] {
  %state.1 = (f32[2,128]{1,0}, f32[8,128]{1,0}, f32[128]{0}) parameter(0)
  ROOT %again = pred[] constant(true)
}

ENTRY %main (shard: f32[2,128], vector: f32[128]) -> f32[128] {
  %shard = f32[2,128]{1,0} parameter(0)
  %vector = f32[128]{0} parameter(1)
  %started = (f32[2,128]{1,0}, f32[8,128]{1,0}) fusion(%shard), kind=kCustom, calls=%begin
  %first = (f32[2,128]{1,0}, f32[8,128]{1,0}, f32[128]{0}) tuple(%started, %started, %vector)
  %loop = (f32[2,128]{1,0}, f32[8,128]{1,0}, f32[128]{0}) while(%first), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[128]{0} get-tuple-element(%loop), index=2
}
"""


def test_a_collective_in_several_fusions_is_one():
    cost = hlo.read(OVERLAPPED, AXES)
    assert cost.collectives == {("all-gather", "fsdp"): hlo.Moved(1, 4096)}
    # Its begin reads a part and has it and the whole in its result; the loop reads the part and the
    # vector and writes a vector: the whole is handed on.
    assert cost.memory_bytes == (1024 + 1024 + 4096) + 5 * (1024 + 512 + 512)


# Of a stack of layers a fusion inside it takes one; another hands its vector on; the cache is
# updated in place.
NESTED = """HloModule jit_step, is_scheduled=true

%layer (stack: f32[10,8,128]) -> f32[8,128] {
  %stack = f32[10,8,128]{2,1,0} parameter(0)
  %flat = f32[80,128]{1,0} bitcast(%stack)
  ROOT %one = f32[8,128]{1,0} slice(%flat), slice={[16:24], [0:128]}
}

%same (vector: f32[128]) -> f32[128] {
  %vector = f32[128]{0} parameter(0)
  ROOT %again = f32[128]{0} bitcast(%vector)
}

%both (v: f32[128], stack.1: f32[10,8,128], cache: f32[64,8], i: s32[]) -> f32[64,8] {
  %cache = f32[64,8]{1,0} parameter(2)
  %v = f32[128]{0} parameter(0)
  %i = s32[] parameter(3)
  %stack.1 = f32[10,8,128]{2,1,0} parameter(1)
  %matrix = f32[8,128]{1,0} fusion(%stack.1), kind=kLoop, calls=%layer
  %vector.1 = f32[128]{0} fusion(%v), kind=kLoop, calls=%same
  %new = f32[1,8]{1,0} dot(%vector.1, %matrix)
  ROOT %updated = f32[64,8]{1,0} dynamic-update-slice(%cache, %new, %i, %i)
}

ENTRY %main (v.1: f32[128], stack.2: f32[10,8,128], cache.1: f32[64,8], i.1: s32[]) -> f32[64,8] {
  %v.1 = f32[128]{0} parameter(0)
  %stack.2 = f32[10,8,128]{2,1,0} parameter(1)
  %cache.1 = f32[64,8]{1,0} parameter(2)
  %i.1 = s32[] parameter(3)
  ROOT %result = f32[64,8]{1,0} fusion(%v.1, %stack.2, %cache.1, %i.1), calls=%both
}
"""


def test_a_collective_that_is_begun_behind_a_part_of_it_is_one_for_each_beginning():
    """The text of a loop that prefetches for its next trip names the part in front."""
    begin, part = OVERLAPPED.index("%begin"), OVERLAPPED.index("%part")
    body = OVERLAPPED.index("%body")
    swapped = (
        OVERLAPPED[:begin] + OVERLAPPED[part:body] + OVERLAPPED[begin:part] + OVERLAPPED[body:]
    )
    assert hlo.read(swapped, AXES).collectives == {("all-gather", "fsdp"): hlo.Moved(1, 4096)}


def test_a_fusion_inside_a_fusion_reads_what_it_takes():
    read = 128 + 8 * 128 + 1
    assert hlo.read(NESTED, AXES).memory_bytes == 4 * (read + 8)


def test_a_slice_that_overlaps_reads_no_more_than_itself():
    text = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[64,8]) -> f32[4,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %begun = ((f32[64,8]{1,0}), f32[4,8]{1,0}, s32[]) slice-start(%x), slice={[0:4], [0:8]}
  ROOT %done = f32[4,8]{1,0} slice-done(%begun)
}
"""
    assert hlo.read(text, AXES).memory_bytes == pytest.approx(2 * 4 * 4 * 8, abs=8)


def test_a_loop_of_unknown_length_counts_as_often_as_it_is_told():
    text = PROGRAM.replace("%ten = s32[] constant(10)", "%ten = s32[] get-tuple-element(%state.1)")
    cost = hlo.read(text, AXES, unknown_trips=2.5)
    assert cost.collectives["collective-permute", "data"] == hlo.Moved(2.5, 2.5 * 4096)
    assert cost.unknown_loops == 1
    noted = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.read(noted, AXES).collectives["collective-permute", "data"].count == 7


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("{}, to_apply=%add", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}, dimensions={0}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [[0, 3], [1, 2]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_replica_groups(written: str, groups: list[list[int]]):
    found = hlo.replica_groups(f", channel_id=1, replica_groups={written}", 4)
    assert found.tolist() == groups


def test_groups_are_named_by_the_axes_along_which_they_differ():
    assert hlo.axes_of(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), AXES) == "fsdp"
    assert hlo.axes_of(np.array([[0, 4], [1, 5]]), AXES) == "data"
    assert hlo.axes_of(np.arange(8)[None], AXES) == "data+fsdp"


def test_roofline_by_hand():
    chip = Chip(flops=100.0, memory=1.0, bandwidth=10.0, links=4.0, network=1.0)
    axes = {"slices": 2, "data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    collectives = {
        ("all-gather", "fsdp"): hlo.Moved(1, 32.0),  # sends 24
        ("all-reduce", "slices+fsdp"): hlo.Moved(1, 8.0),  # 12 within a slice, 2 between
    }
    found = roofline.estimate(
        chip, flops=500.0, memory_bytes=20.0, collectives=collectives, axes=axes
    )
    assert found == roofline.Roofline(compute=5.0, memory=2.0, links=9.0, network=2.0)
    assert (found.overlapped, found.one_by_one, found.limit) == (9.0, 18.0, "links")
