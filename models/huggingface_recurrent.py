"""What only the published recurrent-depth checkpoints have (Huginn-0125, `huginn_raven`).

Their code is not in transformers: it lies beside the published weights, as
`raven_modeling_minimal.py`, and reads the keys and the buffer that are made here.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.layers import rotation, takase

ROTATION = "freqs_cis"


def _derived(cfg: TransformerConfig) -> dict[str, Any]:
    return {
        "padded_vocab_size": cfg.vocab_size,
        "num_key_value_heads": cfg.num_heads,
        "head_dim": cfg.head_size,
        "n_layers_in_recurrent_block": cfg.core_layers,
        "tie_word_embeddings": cfg.tie_embeddings,
    }


def _scales(cfg: TransformerConfig) -> dict[str, float]:
    """Of the first state, before it is multiplied like the embedding, and of the embedding."""
    return {"std": takase(cfg.embed_dim), "embed_scale": math.sqrt(cfg.embed_dim)}


def disagreement(
    config_json: Mapping[str, Any], cfg: TransformerConfig
) -> tuple[str, Any, Any] | None:
    """The first key that should follow from the others and does not: it, its value, that wanted.

    An absent key agrees. Keys of training alone (`sampling_scheme`, `init_strategy`) are not read.
    """
    for key, wanted in _derived(cfg).items():
        given = config_json.get(key)
        if given is not None and given != wanted:
            return key, given, wanted
    scales = config_json.get("init_values") or {}
    if not isinstance(scales, Mapping):
        return "init_values", scales, "a JSON object"
    for key, wanted in _scales(cfg).items():
        given = scales.get(key, wanted)
        low, high = wanted * (1 - 1e-5), wanted * (1 + 1e-5)
        if not isinstance(given, int | float) or not low <= given <= high:
            return f"init_values.{key}", given, f"{wanted:.6g}, as n_embd gives it"
    return None


def written_keys(cfg: TransformerConfig) -> dict[str, Any]:
    """Keys of config.json that follow from the configuration, or that the published code reads."""
    deviation = takase(cfg.embed_dim)
    written = deviation / math.sqrt(2 * cfg.unfolded_layers)
    return _derived(cfg) | {
        "effective_expected_depth": cfg.unfolded_layers,
        "init_values": _scales(cfg) | {"out_proj": written, "embedding": deviation},
        "init_strategy": "takase",
        "sampling_scheme": "poisson-lognormal-filling",
        "test_time_noise_type": "none",
    }


def buffers(cfg: TransformerConfig) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint that are no parameters: cosine and sine of every position.

    `freqs_cis` is float32 `[1, max_length, 1, head size / 2, 2]`. The published code keeps it in
    the file, and transformers leaves a buffer that a file lacks uninitialised.
    """
    angles = rotation(jnp.arange(cfg.max_length)[None], cfg)
    return {ROTATION: np.asarray(jnp.stack(angles, axis=-1)[:, :, None])}
