"""`recurrent_tail` on a block of tokens, and the TPU kernels (Pallas, Mosaic) that walk over them.

    n = a + s f    z = sigmoid(q)    h' = h + z (n - h)    x = (h' + d - m) r    y = x c + b

with mean m (0 in RMSNorm) and r = 1 / sqrt(mean((h' + d - m)^2) + eps). From slopes G of h' and Y
of y, with t = Y c:

    u = r (t - mean(t) - x mean(t x))    e = G + u    (RMSNorm: without mean(t))
    a: z e    f: s z e    h: (1 - z) e    q: z (1 - z) (n - h) e
    s: sum f z e    d: sum u    c: sum Y x    b: sum Y
"""

# Dimension key: N tokens, D width; n is a block of tokens.

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlib_methods.pallas_kernels.dispatch import interpret

# Largest bytes of a float32 row -> tokens of a block: ten arrays, twice each, fit VMEM.
BLOCKS = {2048: 512, 4096: 256, 8192: 128, 16384: 64}
VMEM_BYTES = 56 * 2**20
SUBLANES = 8

Arrays = tuple[jax.Array, ...]
_Ref = Any  # of a block in VMEM


class Norm(NamedTuple):
    """centre: LayerNorm; else RMSNorm."""

    centre: bool
    eps: float


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def forward(norm: Norm, arrays: Arrays, lines: Arrays) -> Arrays:
    """h', y, and of each token m and r. lines: s, d, c and b, of the arrays' rank."""
    a, f, h, q = arrays
    scale, depth, norm_scale, norm_bias = lines
    new = h + jax.nn.sigmoid(q) * (a + scale * f - h)
    x = new + depth
    mean = _mean(x) if norm.centre else 0 * x[..., :1]
    x = x - mean
    deviation = jax.lax.rsqrt(_mean(x * x) + norm.eps)
    return new, x * deviation * norm_scale + norm_bias, mean, deviation


def backward(
    norm: Norm, arrays: Arrays, lines: Arrays, statistics: Arrays, slopes: Arrays
) -> tuple[Arrays, Arrays]:
    """Slopes of a, f, h and q, and what a token adds to those of the lines."""
    a, f, h, q = arrays
    scale, depth, norm_scale, _ = lines
    mean, deviation = statistics
    of_state, of_normed = slopes
    z = jax.nn.sigmoid(q)
    moved = a + scale * f - h
    x = (h + z * moved + depth - mean) * deviation
    t = of_normed * norm_scale
    u = t - x * _mean(t * x)
    if norm.centre:
        u = u - _mean(t)
    u = deviation * u
    e = of_state + u
    ze = z * e
    found = (ze, scale * ze, e - ze, (1 - z) * moved * ze)
    return found, (f * ze, u, of_normed * x, of_normed)


def why_not(*arrays: jax.Array) -> str | None:
    """Why the kernels cannot take these arguments, as a clause; None where they can."""
    for x in arrays:
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"an argument is {x.dtype} and the kernel takes float32 or bfloat16"
    D = arrays[0].shape[-1]
    if max(BLOCKS) < 4 * D:
        return f"the state is {D} wide and the kernel takes {max(BLOCKS) // 4} at most"
    return None


def run(norm: Norm, *arguments: jax.Array) -> Arrays:
    """`forward` of arrays `[..., D]` and lines `[4, D]`."""
    *arrays, lines = arguments
    results = [arrays[2].dtype, arrays[1].dtype]
    kernel = functools.partial(_forward_kernel, norm)
    new, y, statistics = _call(kernel, arrays, lines, results, with_lines=False)
    return new, y, statistics[..., :1], statistics[..., 1:2]


def pull(norm: Norm, *arguments: jax.Array) -> Arrays:
    """`backward` of arrays `[..., D]`, lines `[4, D]`, statistics `[..., 1]` and slopes."""
    *arrays, lines, mean, deviation, of_state, of_normed = arguments
    statistics = jnp.concatenate([mean, deviation], axis=-1)
    N = mean.size
    kernel = functools.partial(_backward_kernel, norm, N)
    inputs = [*arrays, of_state, of_normed, statistics]
    results = [x.dtype for x in arrays]
    *found, of_lines = _call(kernel, inputs, lines, results, with_lines=True)
    return *found, of_lines[:4]


def _call(
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    lines: jax.Array,
    results: Sequence[Any],
    *,
    with_lines: bool,
) -> list[jax.Array]:
    """Runs a kernel over blocks of tokens. results: dtypes of its arrays `[..., D]`; the last one
    is `[..., 2]`, or with_lines what is summed over the tokens `[SUBLANES, D]`."""
    shape, D = arrays[0].shape, lines.shape[1]
    flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
    N = flat[0].shape[0]
    n = next(size for most, size in BLOCKS.items() if most >= 4 * D)
    n = min(n, -(-N // 16) * 16)

    def of_tokens(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((n, x.shape[1]), lambda i: (i, 0))

    whole = pl.BlockSpec((SUBLANES, D), lambda i: (0, 0))
    padded = jnp.pad(lines, [(0, SUBLANES - lines.shape[0]), (0, 0)])
    shapes = [jax.ShapeDtypeStruct((N, D), dtype) for dtype in results]
    last = jax.ShapeDtypeStruct((SUBLANES, D) if with_lines else (N, 2), jnp.float32)
    moved = [*flat, padded, *shapes, last]
    *found, end = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(N, n),),
        in_specs=[*map(of_tokens, flat), whole],
        out_specs=[*map(of_tokens, shapes), whole if with_lines else of_tokens(last)],
        out_shape=[*shapes, last],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=(40 if with_lines else 15) * N * D,
            transcendentals=N * D,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=interpret(),
        name="recurrent_tail_backward" if with_lines else "recurrent_tail_forward",
    )(*flat, padded)
    end = end if with_lines else end.reshape(*shape[:-1], 2)
    return [*(x.reshape(shape) for x in found), end]


def _lines(lines: _Ref) -> Arrays:
    return tuple(lines[k : k + 1, :] for k in range(4))


def _forward_kernel(norm: Norm, *refs: _Ref) -> None:
    *arrays, lines, state, normed, statistics = refs
    loaded = tuple(x[...].astype(jnp.float32) for x in arrays)
    new, y, mean, deviation = forward(norm, loaded, _lines(lines))
    state[...] = new.astype(state.dtype)
    normed[...] = y.astype(normed.dtype)
    first = jax.lax.broadcasted_iota(jnp.int32, statistics.shape, 1) == 0
    statistics[...] = jnp.where(first, mean, deviation)


def _backward_kernel(norm: Norm, num_tokens: int, *refs: _Ref) -> None:
    """What a token beyond the last gives is not written, and must not be summed."""
    inputs, statistics, lines, results, of_lines = refs[:6], refs[6], refs[7], refs[8:-1], refs[-1]
    loaded = tuple(x[...].astype(jnp.float32) for x in inputs)
    numbers = statistics[:, :1], statistics[:, 1:2]
    found, terms = backward(norm, loaded[:4], _lines(lines), numbers, loaded[4:])
    for result, x in zip(results, found, strict=True):
        result[...] = x.astype(result.dtype)

    @pl.when(pl.program_id(0) == 0)
    def _begin() -> None:
        of_lines[...] = jnp.zeros(of_lines.shape, of_lines.dtype)

    n = loaded[0].shape[0]
    token = pl.program_id(0) * n + jax.lax.broadcasted_iota(jnp.int32, loaded[0].shape, 0)
    for k, x in enumerate(terms):
        total = jnp.sum(jnp.where(token < num_tokens, x, 0.0), axis=0, keepdims=True)
        of_lines[k : k + 1, :] += total
