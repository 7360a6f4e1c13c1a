"""Losses of next tokens from the states that a model's head reads, with or without logits.

`TransformerConfig.loss_implementation` says how: from the logits `[B, L, V]`, as `losses` takes
them, or without such an array by `pallas_kernels.linear_cross_entropy`.
"""

# Dimension key: B batch, L sequence, D width, V padded vocabulary.

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlib_methods import losses
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.decoding import divisor_of, temper
from jaxlib_methods.models.partitioning import cut_axes, gather_width
from jaxlib_methods.models.transformer import head_rows
from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels.linear_cross_entropy import (
    TokenStatistics,
    linear_cross_entropy,
)

# Platform -> vocabulary from which, and width up to which, training steps were measured to take no
# longer without logits: what is computed again grows with the width.
NO_SLOWER = {"cpu": (8192, 256)}


class Predictions(Protocol):
    """A model's outputs: `logits` `[B, L, V]` and `final` `[B, L, D]`, what the head reads."""

    @property
    def logits(self) -> jax.Array: ...

    @property
    def final(self) -> jax.Array | None: ...


def token_nll(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    out: Predictions,
    labels: jax.Array,
    *,
    where: jax.Array,
    temperature: jax.Array | float | None = None,
) -> jax.Array:
    """`losses.token_nll` of the head's predictions.

        l_t = logsumexp_v z_v - z_y,   z_v = <w_v, h_t> / temperature,   y the label of t

    params, out: of a model of either depth; under `jax.jit` nothing of `out` is computed that is
    not read. labels: int `[B, L]`; where: bool `[B, L]`, False gives 0 and no gradient.
    temperature: a scalar without a gradient; none, 0 and less are 1. Returns `[B, L]` nats, float32
    or better.
    """
    if _makes_logits(cfg):
        return nll_of_logits(params, out, labels, where=where, temperature=temperature)
    return _statistics(cfg, params, out.final, labels, where, temperature).nll


def nll_of_logits(
    params: Any,
    out: Predictions,
    labels: jax.Array,
    *,
    where: jax.Array,
    temperature: jax.Array | float | None = None,
) -> jax.Array:
    """`token_nll` of any model, from its logits; it reads no parameters."""
    del params
    logits = out.logits if temperature is None else temper(out.logits, temperature)
    return losses.token_nll(logits, labels, where=where)


def token_entropy(
    cfg: TransformerConfig, params: Mapping[str, Any], out: Predictions, *, where: jax.Array
) -> jax.Array:
    """`losses.token_entropy` of the head's predictions, over the whole vocabulary.

    Arguments as `token_nll`'s. Returns `[B, L]` nats, float32 or better.
    """
    if _makes_logits(cfg):
        return losses.token_entropy(out.logits, where=where)
    any_label = jnp.zeros(where.shape, jnp.int32)
    return _statistics(cfg, params, out.final, any_label, where).entropy


def _makes_logits(cfg: TransformerConfig) -> bool:
    """Whether the array of tokens times vocabulary is made; `auto` logs once what and why."""
    if cfg.loss_implementation != "auto":
        return cfg.loss_implementation == "logits"
    here, size, width = dispatch.platform(), cfg.padded_vocab_size, cfg.embed_dim
    least, most = NO_SLOWER.get(here, (0, 0))
    wins = least <= size and width <= most
    known = f"from a vocabulary of {least} and up to a width of {most}" if most else "nowhere"
    reason = f"tiles are known to be no slower on {here} {known}, this is {size} and {width}"
    dispatch.log_once("the loss of next tokens", "tiles" if wins else "logits", reason)
    return not wins


def _statistics(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    final: jax.Array | None,
    labels: jax.Array,
    where: jax.Array,
    temperature: jax.Array | float | None = None,
) -> TokenStatistics:
    """Each device takes its tokens and its part of the vocabulary."""
    asked = cfg.loss_implementation
    assert asked != "logits"
    assert final is not None
    op = functools.partial(linear_cross_entropy, num_classes=cfg.vocab_size, implementation=asked)
    weight = head_rows(cfg, params).astype(final.dtype)
    tokens = cut_axes(labels, "batch", "sequence")
    (vocabulary, width) = cut_axes(weight, "vocab", "embed")
    scale = jnp.ones(()) if temperature is None else 1 / divisor_of(temperature)
    if not any((*tokens, vocabulary, width)):
        return op(final, weight, labels, where=where, scale=scale)
    width = width if set(width) <= set(tokens[0]) else ()  # a whole batch has no need of it

    def on_each(
        final: jax.Array, weight: jax.Array, labels: jax.Array, where: jax.Array, scale: jax.Array
    ) -> TokenStatistics:
        weight = gather_width(weight, width, tokens)
        axis_name = vocabulary[0] if vocabulary else None
        return op(final, weight, labels, where=where, scale=scale, axis_name=axis_name)

    of_tokens = PartitionSpec(*tokens)
    rows = PartitionSpec(vocabulary, width)
    in_specs = (of_tokens, rows, of_tokens, of_tokens, PartitionSpec())
    mapped = jax.shard_map(on_each, in_specs=in_specs, out_specs=of_tokens)
    return mapped(final, weight, labels, where, scale)
