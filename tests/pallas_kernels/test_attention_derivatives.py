"""`attention`: every implementation against float64, transformations, memory, refusals, TPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.pallas_kernels.attention import (
    MASKED_SCORE,
    SHARED_SEGMENT,
    Keys,
    attention,
    attention_reference,
    visible,
)
from jaxlib_methods.pallas_kernels.dispatch import interpreted, lowering_for

# No length is a multiple of a tile's side, no two sizes are equal.
B, K, G, C, E = 2, 2, 3, 7, 5
H = K * G
WINDOW = 11
Arrays = tuple[jax.Array, ...]


def places(length: int, *, ahead: int = 0) -> tuple[jax.Array, jax.Array]:
    """Positions and segments of documents of 29 tokens, three of padding at the end."""
    index = np.arange(length) + ahead
    segments = 1 + index // 29
    segments[-3:] = 0
    both = np.broadcast_to(np.stack([index % 29, segments])[:, None], (2, B, length)).copy()
    both[1, 1, length // 2 : length // 2 + 2] = 0  # and inside a row
    return jnp.asarray(both[0], jnp.int32), jnp.asarray(both[1], jnp.int32)


class Case:
    """Random heads of some lengths, the first key shared, padding that holds NaN."""

    def __init__(self, queries: int, keys: int, dtype: Any, *, tile: Any = None) -> None:
        self.positions, self.segments = places(queries)
        self.key_positions, segments = places(keys)
        self.key_segments = segments.at[0, 0].set(SHARED_SEGMENT)
        self.tile = tile
        rng = np.random.default_rng(0)
        shapes = ((B, queries, H, C), (B, keys, K, C), (B, keys, K, E))
        self.arrays, self.way = (
            tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes) for _ in range(2)
        )
        real = (self.segments != 0, self.key_segments != 0, self.key_segments != 0)
        self.real = tuple(x[..., None, None] for x in real)
        self.weight = jnp.asarray(rng.normal(size=(B, queries, H, E)))

    def ours(self, *arrays: jax.Array, implementation: Any = "xla") -> Arrays:
        query, key, value = arrays
        return attention(
            query,
            Keys(key, value, self.key_positions, self.key_segments),
            positions=self.positions,
            segments=self.segments,
            window=WINDOW,
            implementation=implementation,
            tile=self.tile,
        )

    def plainly(self, *arrays: jax.Array) -> Arrays:
        """By way of all scores, written out."""
        query, key, value = (jnp.where(*pair, 0) for pair in zip(self.real, arrays, strict=True))
        key, value = (jnp.repeat(x, G, axis=2) for x in (key, value))
        sight = (self.positions, self.key_positions, self.segments, self.key_segments)
        where = visible(*sight, window=WINDOW)[:, None]
        s = jnp.where(where, jnp.einsum("blhc,bmhc->bhlm", query, key) / C**0.5, MASKED_SCORE)
        lse = jax.nn.logsumexp(s, axis=-1)
        p = jnp.where(where, jnp.exp(s - lse[..., None]), 0)
        seen = jnp.moveaxis(where.any(axis=-1), 1, 2)
        lse = jnp.where(seen, jnp.moveaxis(lse, 1, 2), MASKED_SCORE)
        return jnp.einsum("bhlm,bmhc->blhc", p, value), lse

    def derivatives(self, attend: Callable[..., Arrays], arrays: Arrays, way: Arrays) -> Any:
        """Output, gradient, and the Hessian's product with `way`, forward and in reverse."""

        def loss(arrays: Arrays) -> tuple[jax.Array, Arrays]:
            mixed, lse = attend(*arrays)
            # Both results count, neither linearly; padding's do not.
            known = jnp.where(self.real[0][..., 0], lse, 0)
            total = jnp.sum(jnp.where(self.real[0], jnp.sin(mixed.astype(lse.dtype)), 0) * weight)
            total += jnp.sum(jnp.where(known > MASKED_SCORE / 2, jnp.cos(known), 0))
            return total, (jnp.where(self.real[0], mixed, 0), known)

        weight = self.weight.astype(jnp.promote_types(arrays[0].dtype, jnp.float32))
        gradient = jax.grad(loss, has_aux=True)

        def along(arrays: Arrays) -> jax.Array:
            pairs = zip(gradient(arrays)[0], way, strict=True)
            return sum((jnp.sum(g.astype(weight.dtype) * w) for g, w in pairs), jnp.zeros(()))

        (slopes, results), (turns, moves) = jax.jvp(gradient, (arrays,), (way,))
        return {
            "output": results,
            "tangent": moves,
            "gradient": slopes,
            "forward over reverse": turns,
            "reverse over reverse": jax.grad(along)(arrays),
        }


def filled(arrays: Arrays, real: Arrays, junk: float) -> Arrays:
    pairs = zip(real, arrays, strict=True)
    return tuple(jnp.where(where, x, jnp.asarray(junk, x.dtype)) for where, x in pairs)


def distance(got: Any, want: Any) -> float:
    """Largest difference, as a share of the largest number, of any array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    shares = []
    for one, other in pairs:
        other = np.asarray(other, np.float64)
        gap = np.abs(np.asarray(one, np.float64) - other).max()
        assert np.abs(other).max() > 0.1
        shares.append(gap / np.abs(other).max())
    return float(np.max(shares))


@functools.cache
def reference(queries: int, keys: int) -> Callable[[Arrays, Arrays], Any]:
    """`Case.derivatives` in float64, by way of all scores."""
    with jax.enable_x64(True):
        case = Case(queries, keys, "float64")
    run = jax.jit(functools.partial(case.derivatives, case.plainly))

    def compute(arrays: Arrays, way: Arrays) -> Any:
        with jax.enable_x64(True):
            exact = tuple(x.astype(jnp.float64) for x in (*arrays, *way))
            return run(filled(exact[:3], case.real, 0.0), exact[3:])

    return compute


# implementation, dtype, (queries, keys), tile, units of rounding of the dtype. float32 sums some
# dozens of products; bfloat16 rounds the weights once and the results once, in each of the two
# derivatives, and what is rounded partly cancels in a sum over some ten keys.
CASES = {
    "xla float64": ("xla", "float64", (38, 53), (8, 16), 64),
    "xla float32": ("xla", "float32", (38, 53), (16, 24), 32),
    "xla bfloat16": ("xla", "bfloat16", (38, 53), (16, 24), 4),
    "pallas float32": ("pallas", "float32", (137, 153), (128, 128), 32),
    "pallas bfloat16": ("pallas", "bfloat16", (137, 153), (128, 128), 4),
}


@functools.cache
def program(name: str) -> tuple[Case, Callable[[Arrays, Arrays], Any]]:
    """A case and its derivatives as an implementation computes them."""
    implementation, dtype, lengths, tile, _ = CASES[name]
    with jax.enable_x64(dtype == "float64"):
        case = Case(*lengths, dtype, tile=tile)
    attend = functools.partial(case.ours, implementation=implementation)
    return case, jax.jit(functools.partial(case.derivatives, attend))


@pytest.mark.parametrize("name", CASES)
def test_everything_equals_float64(name):
    _, dtype, lengths, _, units = CASES[name]
    case, run = program(name)
    with jax.enable_x64(dtype == "float64"), interpreted():
        got = run(filled(case.arrays, case.real, jnp.nan), case.way)
    want = reference(*lengths)(case.arrays, case.way)
    unit = float(jnp.finfo(dtype).eps)
    errors = {kind: distance(got[kind], want[kind]) / unit for kind in want}
    assert max(errors.values()) <= units, errors


def test_what_all_keys_share_does_not_swamp_bfloat16():
    # Row statistics are subtracted from sums of rounded products: a vector that all directions of
    # the keys have in common adds a constant to every entry of a row and must not cost digits.
    case, run = program("xla bfloat16")
    query, key, value = case.way
    way = (query, key + jnp.asarray(100, key.dtype), value)
    with interpreted():  # as the program was compiled
        got = run(filled(case.arrays, case.real, 0), way)
    want = reference(38, 53)(case.arrays, way)
    kinds = ("forward over reverse", "reverse over reverse")
    errors = [distance(got[kind], want[kind]) for kind in kinds]
    errors.append(distance(got["tangent"][0], want["tangent"][0]))
    assert max(errors) <= 4 * float(jnp.finfo("bfloat16").eps), errors


def test_one_more_axis_is_more_batch():
    case, _ = program("xla float32")
    want = reference(38, 53)(case.arrays, case.way)
    arrays = filled(case.arrays, case.real, 0)
    stacked = tuple(jnp.stack([2 * x, x], axis=1) for x in arrays)
    many = jax.vmap(functools.partial(case.derivatives, case.ours), in_axes=(1, None))
    got = jax.tree.map(lambda x: x[1], jax.jit(many)(stacked, case.way))
    assert distance(got, want) <= 1e-5


def test_layers_under_scan_and_checkpoint():
    # Two layers, each a function of the one before. The mask's indices depend on no argument: what
    # JAX (0.10 to 0.12) hoists out of the loop, and then mistakes for other residuals, where a
    # `custom_vjp` is called in another's forward rule.
    case = Case(37, 37, "float32", tile=(16, 24))

    def two_layers(attend: Callable[..., Arrays], *arrays: jax.Array) -> Arrays:
        query, key, value = arrays

        def layer(query: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
            mixed, lse = attend(query, key * scale, value)
            return query + jnp.pad(mixed, [(0, 0)] * 3 + [(0, C - E)]), lse

        scales = jnp.array([1.0, 0.5], query.dtype)
        query, lse = jax.lax.scan(jax.checkpoint(layer), query, scales)
        return query[..., :E], lse.sum(axis=0)

    arrays = filled(case.arrays, case.real, 0)
    got, want = (
        jax.jit(functools.partial(case.derivatives, functools.partial(two_layers, attend)))(
            arrays, case.way
        )
        for attend in (case.ours, case.plainly)
    )
    for kind in ("output", "gradient", "forward over reverse", "reverse over reverse"):
        assert distance(got[kind], want[kind]) <= 1e-4, kind


def test_devices_may_share_batch_queries_and_heads():
    case, _ = program("xla float32")
    want = reference(38, 53)(case.arrays, case.way)
    axes = ("data", "sequence", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows, keys, heads = jax.P(*axes[:2]), jax.P("data", None), jax.P("data", None, "tensor", None)

    def local(*arrays: jax.Array) -> Arrays:
        query, key, value, positions, segments, key_positions, key_segments = arrays
        keys = Keys(key, value, key_positions, key_segments)
        where: dict[str, Any] = {"positions": positions, "segments": segments}
        return attention(query, keys, window=WINDOW, tile=case.tile, **where)

    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(jax.P(*axes, None), heads, heads, rows, rows, keys, keys),
        out_specs=(jax.P(*axes, None), jax.P(*axes)),
        check_vma=False,
    )
    at = (case.positions, case.segments, case.key_positions, case.key_segments)
    run = functools.partial(case.derivatives, lambda *arrays: split(*arrays, *at))
    got = jax.jit(run)(filled(case.arrays, case.real, 0), case.way)
    assert distance(got, want) <= 1e-5


def test_a_key_of_ones_own_joins_through_the_log_sum_exp():
    with jax.enable_x64(True):
        case = Case(38, 53, "float64", tile=(16, 24))
        own, own_way = (
            tuple(jnp.sin(x[:, -38:]) for x in arrays[1:]) for arrays in (case.arrays, case.way)
        )
        sight: dict[str, Any] = {"positions": case.positions, "segments": case.segments}

        def joined(*arrays: jax.Array) -> Arrays:
            query, key, value, *own = arrays
            context = Keys(key, value, case.key_positions, case.key_segments)
            return attention(query, context, own=(own[0], own[1]), tile=case.tile, **sight)

        def dense(*arrays: jax.Array) -> Arrays:
            # Values of C features for all scores, and a feature to find the sum with:
            # where it is 1 for the own key alone, the output is that key's share.
            query, key, value, *own = arrays
            value = jnp.pad(value, [(0, 0)] * 3 + [(0, C - E)])
            shares = jnp.pad(own[1], [(0, 0)] * 3 + [(0, C - E)], constant_values=1)
            where = visible(case.positions, case.key_positions, case.segments, case.key_segments)
            mixed = attention_reference(query, key, value, where=where, own=(own[0], shares))
            score = jnp.sum(query * jnp.repeat(own[0], G, axis=2), axis=-1) / C**0.5
            return mixed[..., :E], score - jnp.log(mixed[..., -1])

        arrays = (*filled(case.arrays, case.real, 0), *own)
        way = (*case.way, *own_way)
        got, want = (
            jax.jit(functools.partial(case.derivatives, attend))(arrays, way)
            for attend in (joined, dense)
        )
    assert distance(got, want) <= 1e-12


def test_a_row_that_sees_nothing_is_zero():
    case, _ = program("xla float32")
    query, key, value = case.arrays
    nowhere = Keys(key, value, case.key_positions, jnp.zeros_like(case.key_segments))
    mixed, lse = attention(
        query, nowhere, positions=case.positions, segments=case.segments, tile=case.tile
    )
    assert not mixed.any()
    assert bool((lse == MASKED_SCORE).all())


def test_a_window_looks_back_so_many_positions():
    index = jnp.arange(5)[None]
    segments = jnp.array([[SHARED_SEGMENT, 1, 1, 1, 1]])
    got = visible(index, index, segments * 0 + 1, segments, window=2)
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert jnp.array_equal(got[0], jnp.array(want, bool))


def shapes(length: int, dtype: Any = jnp.float32, size: int = 64) -> tuple[Any, Any]:
    """Heads `[1, length, 2, size]` and int32 places `[1, length]`."""
    heads = jax.ShapeDtypeStruct((1, length, 2, size), dtype)
    return heads, jax.ShapeDtypeStruct((1, length), jnp.int32)


def second_order(implementation: Any, *, reverse: bool) -> Callable[..., Any]:
    """The Hessian's product with the arguments, of some loss of both results."""

    def total(arrays: Arrays, place: jax.Array) -> jax.Array:
        query, key, value = arrays
        mixed, lse = attention(
            query,
            Keys(key, value, place, place * 0 + 1),
            positions=place,
            segments=place * 0 + 1,
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(mixed.astype(lse.dtype))) + jnp.sum(jnp.sin(lse))

    def product(query: jax.Array, key: jax.Array, value: jax.Array, place: jax.Array) -> Any:
        arrays = (query, key, value)
        gradient = functools.partial(jax.grad(total), place=place)
        if not reverse:
            return jax.jvp(gradient, (arrays,), (arrays,))[1]
        pairs = functools.partial(jax.tree.map, lambda a, b: jnp.sum((a * b).astype(jnp.float32)))
        return jax.grad(lambda x: sum(pairs(gradient(x), arrays), jnp.zeros(())))(arrays)

    return product


@pytest.mark.parametrize("reverse", [False, True])
def test_memory_of_second_derivatives_is_linear_in_the_length(reverse):
    def temporary(length: int) -> int:
        heads, place = shapes(length, size=4)
        run = jax.jit(second_order("xla", reverse=reverse))
        analysis = run.lower(heads, heads, heads, place).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(2048) <= 2.1 * temporary(1024)


@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_lower_for_tpus(reverse):
    heads, place = shapes(300, jnp.bfloat16)
    with lowering_for("tpu"):
        traced = jax.jit(second_order("pallas", reverse=reverse)).trace(heads, heads, heads, place)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 4


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_compile_for_tpus(name, monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name=name)
    one = jax.sharding.SingleDeviceSharding(chips.devices[0])

    def analysis(length: int, *, reverse: bool) -> Any:
        heads, place = (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
            for x in shapes(length, jnp.bfloat16, size=128)
        )
        run = jax.jit(second_order("pallas", reverse=reverse))
        with lowering_for("tpu"):
            return run.lower(heads, heads, heads, place).compile().memory_analysis()

    for reverse in (False, True):
        found = analysis(4096, reverse=reverse)
        assert found.peak_memory_in_bytes < 4096 * 4096 * 4  # of one head's scores in float32
    # Not even a byte for each query and key, of whether it is seen.
    assert analysis(2**14, reverse=False).temp_size_in_bytes < 2**28 / 2


@pytest.mark.parametrize(
    ("platform", "change", "says"),
    [
        ("cpu", {}, "no kernel is written for cpu, only for gpu, tpu"),
        ("tpu", {"dtype": jnp.float16}, "kernels for a tpu take float32 or bfloat16, not float16"),
        ("tpu", {"size": 320}, "heads of at most 256 features, not 320"),
        ("gpu", {}, "kernels for a gpu take bfloat16, not float32"),
        ("gpu", {"dtype": jnp.bfloat16, "size": 160}, "heads of at most 128 features, not 160"),
    ],
)
def test_a_kernel_asked_for_by_name_runs_or_says_why_not(platform, change, says):
    heads, place = shapes(8, **change)
    run = second_order("pallas", reverse=False)
    with lowering_for(platform), pytest.raises(ValueError, match=says):
        jax.eval_shape(run, heads, heads, heads, place)


def test_arguments_that_do_not_fit_are_named():
    (heads, place), (other, _) = shapes(8), shapes(8, size=32)
    run = second_order("xla", reverse=False)
    with pytest.raises(ValueError, match=r"key is float32\(1, 8, 2, 32\), must be "):
        jax.eval_shape(run, heads, other, heads, place)


def test_third_derivatives_are_refused():
    heads, place = shapes(8)
    run = second_order("xla", reverse=True)

    def total(query: jax.Array, place: jax.Array) -> jax.Array:
        return sum((x.sum() for x in run(query, query, query, place)), jnp.zeros(()))

    with pytest.raises(NotImplementedError, match="attention_double_backward has no derivative"):
        jax.eval_shape(jax.grad(total), heads, place)


def test_a_derivative_of_a_forward_derivative_is_refused():
    heads, place = shapes(8)

    def tangent(query: jax.Array, place: jax.Array) -> jax.Array:
        context = Keys(query, query, place, place)
        run = functools.partial(attention, context=context, positions=place, segments=place)
        return jax.jvp(lambda x: run(x)[0].sum(), (query,), (query,))[1]

    with pytest.raises(NotImplementedError, match="first in reverse; attention_reference"):
        jax.eval_shape(jax.grad(tangent), heads, place)
