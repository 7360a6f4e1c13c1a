"""The model and the batch that are timed: `late_to_early_tiny`'s unless flags say otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
from absl import flags

from jaxlib_methods.method import Batch
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import presets

PRESET = presets.get("late_to_early_tiny")
_MODEL = PRESET.model

VOCAB_SIZE = flags.DEFINE_integer("vocab_size", _MODEL.vocab_size, "Tokens of the vocabulary.")
NUM_LAYERS = flags.DEFINE_integer("num_layers", _MODEL.num_layers, "Blocks.")
_EMBED_DIM = flags.DEFINE_integer("embed_dim", _MODEL.embed_dim, "Width.")
_NUM_HEADS = flags.DEFINE_integer("num_heads", _MODEL.num_heads, "Attention heads.")
_MLP_DIM = flags.DEFINE_integer("mlp_dim", _MODEL.mlp_dim, "Feed-forward width; unset: derived.")
COMPUTE_DTYPE = flags.DEFINE_enum(
    "compute_dtype", _MODEL.compute_dtype, ["float32", "bfloat16"], "Of activations."
)


def model_config(length: int) -> TransformerConfig:
    """The model of the flags, with a context of `length` tokens."""
    return dataclasses.replace(
        _MODEL,
        vocab_size=VOCAB_SIZE.value,
        num_layers=NUM_LAYERS.value,
        embed_dim=_EMBED_DIM.value,
        num_heads=_NUM_HEADS.value,
        mlp_dim=_MLP_DIM.value,
        max_length=length,
        compute_dtype=COMPUTE_DTYPE.value,
    )


def make_batch(cfg: TransformerConfig, batch_size: int, *, documents: int) -> Batch:
    """Random tokens, `documents` of them of equal length in each row of `cfg.max_length`."""
    shape = (batch_size, cfg.max_length)
    tokens = jax.random.randint(jax.random.key(0), (shape[0], shape[1] + 1), 0, cfg.vocab_size)
    index = jnp.arange(shape[1])
    each = -(-shape[1] // documents)
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=jnp.broadcast_to(index % each, shape),
        segments=jnp.broadcast_to(1 + index // each, shape),
        where=jnp.ones(shape, bool),
    )
