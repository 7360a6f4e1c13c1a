"""Others' attention and linear cross-entropy, for the devices and derivatives that they know.

tokamax (`pip install tokamax`: Python 3.12 and jax 0.11 or newer) runs everywhere, the kernels that
come with JAX on the device they are written for. `usable` drops what refuses an operation.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Op = Callable[..., Any]


def attention() -> dict[str, Op]:
    """Causal attention of (query, key, value), each [1, length, heads, head size]."""
    found: dict[str, Op] = {}
    if tokamax := _tokamax():
        attend = functools.partial(tokamax.dot_product_attention, is_causal=True)
        found["tokamax"] = lambda arrays: attend(*arrays)
        found["tokamax in chunks"] = lambda arrays: attend(*arrays, implementation="xla_chunked")
    bundled = {"tpu": _flash_attention, "gpu": _attention_mgpu}.get(jax.default_backend())
    if bundled:
        found["bundled with JAX"] = bundled
    return found


def linear_cross_entropy() -> dict[str, Op]:
    """The loss alone, no entropy, of hidden [1, N, D], weight [V, D] and labels [1, N]."""
    tokamax = _tokamax()
    if not tokamax:
        return {}

    def loss(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        weight = weight.astype(hidden.dtype).T
        return tokamax.linear_softmax_cross_entropy_loss(
            hidden[0], labels[0], weight, reduction="none"
        )

    return {"tokamax, no entropy": loss}


def _tokamax() -> Any:
    """The module; None where it is not installed."""
    return importlib.import_module("tokamax") if importlib.util.find_spec("tokamax") else None


def usable(candidates: dict[str, Op], program: Callable[[Op], Op], *like: Any) -> dict[str, Op]:
    """Those whose `program(op)` compiles for arguments like `like`; prints why others do not."""
    found = {}
    for name, op in candidates.items():
        try:
            jax.jit(program(op)).lower(*like).compile()
        except Exception as error:  # of whatever kind others raise: it is what is reported
            reason = str(error).strip().split("\n")[0][:100]
            print(f"\nNot {name}: {type(error).__name__}: {reason}")
        else:
            found[name] = op
    return found


def _flash_attention(arrays: Any) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    query, key, value = (jnp.swapaxes(x, 1, 2) for x in arrays)
    key, value = (jnp.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
    out = flash_attention(query, key, value, causal=True, sm_scale=query.shape[-1] ** -0.5)
    return jnp.swapaxes(out, 1, 2)


def _attention_mgpu(arrays: Any) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    query, key, value = arrays
    scaled = query * jnp.asarray(1 / math.sqrt(query.shape[-1]), query.dtype)
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
    )
    return attention_mgpu.attention(scaled, key, value, config)
