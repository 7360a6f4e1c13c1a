"""Floating-point operations of a training step: analytic, and counted in a jaxpr as a check.

A multiply and an add count as two. XLA's cost analysis counts the body of a scan once, whatever
its length, so the check counts the dots of the jaxpr instead.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from jaxlib_methods.models import recurrent_training
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.pallas_kernels.attention.derivatives import in_one_tile

TRAIN_TO_FORWARD = 3  # the backward of a matmul is two matmuls of the same size


def transformer_forward_flops(
    cfg: TransformerConfig,
    length: int,
    *,
    head: bool = True,
    attention: Literal["full", "causal"] = "full",
) -> float:
    """Matmul FLOPs of one forward pass, per token of a sequence of `length` tokens.

        2 * (weights of all matmuls, the head over the padded vocabulary included)
        + 4 * num_layers * num_heads * head_dim * keys

    keys: `length` for `attention="full"`, the whole square of scores, which is what the plain
    implementation executes and what PaLM's MFU counts (times three: 6 N + 12 L H Q T, PaLM,
    appendix B); `(length + 1) / 2` for `"causal"`, the mean number of keys that a query may see.
    Embedding lookups, norms, rotations and softmax are not matmuls and are left out.
    """
    width, mlp_matrices = cfg.embed_dim, 3 if cfg.mlp == "swiglu" else 2
    projections = width * cfg.head_size * (2 * cfg.num_heads + 2 * cfg.kv_heads)
    weights = cfg.num_layers * (projections + mlp_matrices * width * cfg.mlp_size)
    weights += width * cfg.padded_vocab_size if head else 0
    keys = length if attention == "full" else (length + 1) / 2
    return 2.0 * weights + 4.0 * cfg.num_layers * cfg.num_heads * cfg.head_size * keys


def transformer_train_flops(
    cfg: TransformerConfig, length: int, *, attention: Literal["full", "causal"] = "full"
) -> float:
    """Model FLOPs of a forward and backward pass, per token: three times the forward.

    What `remat` computes again is not counted: this is the numerator of MFU, not of the hardware
    utilisation (HFU).
    """
    return TRAIN_TO_FORWARD * transformer_forward_flops(cfg, length, attention=attention)


def iteration_flops(
    cfg: TransformerConfig, length: int, *, attention: Literal["full", "causal"] = "full"
) -> float:
    """Forward FLOPs of one iteration of a recurrent model's core, per token: injection and blocks.

    See `transformer_forward_flops` for what counts.
    """
    core = dataclasses.replace(cfg, num_layers=cfg.core_layers, recurrence=0)
    injection = 4 * cfg.embed_dim**2 if cfg.injection == "linear" else 0
    return injection + transformer_forward_flops(core, length, head=False, attention=attention)


def recurrent_forward_flops(
    cfg: TransformerConfig,
    length: int,
    *,
    num_steps: float,
    head: bool = True,
    attention: Literal["full", "causal"] = "full",
) -> float:
    """Forward FLOPs of a recurrent model with `num_steps` iterations, per token.

    prelude + coda + head + num_steps * iteration
    """
    once = dataclasses.replace(
        cfg, num_layers=max(cfg.prelude_layers + cfg.coda_layers, 1), recurrence=0
    )
    blocks = cfg.prelude_layers + cfg.coda_layers
    total = transformer_forward_flops(once, length, head=False, attention=attention)
    total = total if blocks else 0.0
    total += 2.0 * cfg.embed_dim * cfg.padded_vocab_size if head else 0.0
    return total + num_steps * iteration_flops(cfg, length, attention=attention)


def recurrent_train_flops(
    cfg: TransformerConfig,
    length: int,
    *,
    forward_only: float,
    trained: float,
    attention: Literal["full", "causal"] = "full",
) -> float:
    """Model FLOPs of a training step of a recurrent model, per token.

        3 (prelude + coda + head + trained * iteration) + forward_only * iteration

    forward_only, trained: iterations without and with gradient.
    """
    whole = recurrent_forward_flops(cfg, length, num_steps=trained, attention=attention)
    free = forward_only * iteration_flops(cfg, length, attention=attention)
    return TRAIN_TO_FORWARD * whole + free


def forward_flops(
    cfg: TransformerConfig, length: int, *, attention: Literal["full", "causal"] = "full"
) -> float:
    """Forward FLOPs of a plain model, or of a recurrent one with `cfg.recurrence` iterations."""
    if cfg.recurrence:
        steps = cfg.recurrence
        return recurrent_forward_flops(cfg, length, num_steps=steps, attention=attention)
    return transformer_forward_flops(cfg, length, attention=attention)


def train_flops(
    cfg: TransformerConfig, length: int, *, attention: Literal["full", "causal"] = "full"
) -> float:
    """Model FLOPs of a training step, per token; of a recurrent model the expected ones."""
    if cfg.recurrence:
        free, trained = recurrent_training.mean_steps(cfg)
        return recurrent_train_flops(
            cfg, length, forward_only=free, trained=trained, attention=attention
        )
    return transformer_train_flops(cfg, length, attention=attention)


def late_to_early_flops(
    student: TransformerConfig,
    teacher: TransformerConfig,
    length: int,
    *,
    attention: Literal["full", "causal"] = "full",
) -> float:
    """Model FLOPs of one late-to-early training step, per token, while the teacher is active.

    The student's training and the teacher's forward pass, its head included since its loss is
    logged. Interpolating the hidden states and the cosine have no matmul; the two of the optional
    learned resize (4 * teacher width * student width) are left out.
    """
    taught = train_flops(student, length, attention=attention)
    return taught + forward_flops(teacher, length, attention=attention)


def count_dot_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of all matmuls and convolutions that `fn(*args)` executes, over all devices.

    args: arrays or `jax.ShapeDtypeStruct`s; nothing is run. A scan counts `length` times, a
    `shard_map` once per device, a Pallas kernel once per grid point, attention in tiles as all
    scores, a conditional as its most expensive branch. Recomputation under `jax.checkpoint` counts;
    what no result depends on does not, since XLA drops it. Raises ValueError for a matmul in a
    while loop, whose number of trips is unknown.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _count(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
        return 2 * math.prod(equation.outvars[0].aval.shape) * depth
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
    attention = in_one_tile(equation)
    if attention is not None:
        return _count(attention)
    counts = [_count(inner) for inner in _inner_jaxprs(params)]
    if name == "while" and any(counts):
        raise ValueError(
            "a matmul in a while loop of unknown length cannot be counted; "
            "use jax.lax.scan, or fori_loop with constant bounds"
        )
    if name == "cond":
        return max(counts)
    return _repeats(name, params) * sum(counts)


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    values = []
    for value in params.values():
        values.extend(value if isinstance(value, tuple | list) else [value])
    return [value for value in values if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]


def _repeats(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # shapes inside are those of one device
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":  # shapes inside are those of one block
        return math.prod(params["grid_mapping"].grid)
    return 1
