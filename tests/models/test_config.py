"""Architecture configurations: derived sizes, refusals, published sizes."""

import dataclasses
import math

import jax
import pytest

from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.models.transformer import init_params


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig().num_layers = 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="positional"):
        TransformerConfig(256)  # pyright: ignore[reportCallIssue]


def test_derived_sizes():
    cfg = TransformerConfig(embed_dim=96, num_heads=6)
    assert (cfg.kv_heads, cfg.head_size, cfg.rotary_dim) == (6, 16, 16)
    given = dataclasses.replace(cfg, num_kv_heads=2, head_dim=20, rotary_fraction=0.5, mlp_dim=7)
    assert (given.kv_heads, given.head_size, given.rotary_dim, given.mlp_size) == (2, 20, 10, 7)


@pytest.mark.parametrize(
    ("mlp", "embed_dim", "size"),
    [
        ("swiglu", 48, 128),  # 8/3 * 48 = 128, a multiple already
        ("swiglu", 64, 256),  # 170.7
        ("swiglu", 2048, 5504),  # 5461.3
        ("gelu", 32, 128),
        ("relu", 64, 256),
        ("gelu_tanh", 66, 384),  # 264
    ],
)
def test_feed_forward_size_is_rounded_up_to_128(mlp, embed_dim, size):
    assert TransformerConfig(mlp=mlp, embed_dim=embed_dim, num_heads=1).mlp_size == size


@pytest.mark.parametrize(("vocab", "padded"), [(1, 128), (128, 128), (129, 256), (50_272, 50_304)])
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab, padded):
    assert TransformerConfig(vocab_size=vocab).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size 0 must be at least 1"),
        ({"num_layers": -2}, "num_layers -2 must be at least 1"),
        ({"embed_dim": 0}, "embed_dim 0 must be at least 1"),
        ({"num_heads": 0}, "num_heads 0 must be at least 1"),
        ({"max_length": 0}, "max_length 0 must be at least 1"),
        ({"num_kv_heads": 0}, "num_kv_heads 0 must be at least 1, or None to derive"),
        ({"head_dim": 0}, "head_dim 0 must be at least 1, or None to derive"),
        ({"mlp_dim": -1}, "mlp_dim -1 must be at least 1, or None to derive"),
        ({"num_heads": 3}, "embed_dim 128 is not a multiple of num_heads 3; set head_dim or"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rotary_fraction": 0.0}, "rotary_fraction 0.0 must be above 0 and at most 1"),
        ({"rotary_fraction": 1.5}, "rotary_fraction 1.5 must be above 0 and at most 1"),
        ({"head_dim": 7}, "rotary_fraction 1.0 of head_dim 7 gives 7 rotated features; the"),
        ({"head_dim": 4, "rotary_fraction": 0.1}, "head_dim 4 gives 0 rotated features; the"),
        ({"norm_eps": 0.0}, "norm_eps 0.0 must be positive"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor 0.5 must be at least 1"),
        ({"rope_theta": 0.0}, "rope_theta 0.0 must be positive"),
        ({"rope_original_length": 0}, "rope_original_length 0 must be at least 1"),
        ({"learned_position_offset": -1}, "learned_position_offset -1 must not be negative"),
        (
            {"rope_low_frequency_factor": 4.0},
            "rope_high_frequency_factor 4.0 must exceed rope_low_frequency_factor 4.0",
        ),
        ({"norm": "rmsnorm"}, r"norm 'rmsnorm' is unknown; choose one of \['rms_norm', 'layer_no"),
        ({"mlp": "silu"}, "mlp 'silu' is unknown; choose one of "),
        ({"positions": "alibi"}, "positions 'alibi' is unknown; choose one of "),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' is unknown; choose one of "),
        ({"compute_dtype": "float16"}, "compute_dtype 'float16' is unknown; choose one of "),
        ({"param_dtype": "int8"}, "param_dtype 'int8' is unknown; choose one of "),
        ({"remat": "some"}, "remat 'some' is unknown; choose one of "),
    ],
)
def test_nonsense_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        TransformerConfig(**changes)
    assert "\n" not in str(error.value)


def test_a_head_of_odd_size_is_fine_without_rotation():
    assert TransformerConfig(head_dim=7, positions="learned").head_size == 7


def num_params(cfg: TransformerConfig) -> int:
    """Parameters without the padding of the vocabulary."""
    tree = partitioning.unbox(jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0)))
    rows = cfg.padded_vocab_size - cfg.vocab_size
    padding = rows * cfg.embed_dim * (1 if cfg.tie_embeddings else 2)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) - padding


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("opt_125m", 125_239_296),
        ("pythia_160m", 162_322_944),
        ("smollm_135m", 134_515_008),
        ("llama_3p2_1b", 1_235_814_400),
        ("qwen3_1p7b", 1_720_574_976),
        ("qwen3_14b", 14_768_307_200),
    ],
)
def test_language_models_have_the_published_number_of_parameters(name, published):
    assert num_params(PUBLISHED[name]) == published


@pytest.mark.parametrize(
    ("name", "layers", "width", "mlp", "vocab", "nominal", "tolerance"),
    [
        ("let_1p4b", 24, 2048, 5504, 49_152, 1.4e9, 0.05),
        ("let_3b", 26, 3200, 8640, 49_152, 3.0e9, 0.20),
        ("let_7b", 32, 4096, 11_008, 128_256, 7.0e9, 0.10),
    ],
)
def test_students_have_their_nominal_size(name, layers, width, mlp, vocab, nominal, tolerance):
    # Llama: 4 square matrices, 3 of the feed-forward and 2 norms a block; a table, a head, a norm.
    block = 4 * width**2 + 3 * width * mlp + 2 * width
    count = num_params(PUBLISHED[name])
    assert count == layers * block + 2 * vocab * width + width
    assert abs(count / nominal - 1) < tolerance


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "millions"),
    [
        ("ebt_4xs", 2, 128, 2, None),  # of the code alone
        ("ebt_3xs", 4, 256, 4, None),
        ("ebt_xxs", 6, 384, 6, 6.18),
        ("ebt_xs", 12, 384, 6, 12.4),
        ("ebt_small", 12, 768, 12, 48.8),
        ("ebt_medium", 24, 1024, 16, 176),
        ("ebt_large", 24, 1536, 16, 396),
        ("ebt_xl", 24, 2048, 32, 708),
    ],
)
def test_energy_transformers_have_their_published_blocks(name, layers, width, heads, millions):
    cfg = PUBLISHED[name]
    assert (cfg.num_layers, cfg.embed_dim, cfg.num_heads) == (layers, width, heads)
    assert (cfg.mlp_size, cfg.vocab_size, cfg.max_length) == (width, 50_277, 256)
    block = 4 * width**2 + 3 * width**2 + 2 * width
    assert num_params(cfg) == layers * block + 2 * 50_277 * width + width
    assert millions is None or abs(layers * block / (millions * 1e6) - 1) < 0.02


def test_every_published_size_is_tested():
    energies = {f"ebt_{n}" for n in ("4xs", "3xs", "xxs", "xs", "small", "medium", "large", "xl")}
    students = {"let_1p4b", "let_3b", "let_7b"}
    teachers = {"opt_125m", "pythia_160m", "smollm_135m", "llama_3p2_1b"}
    policies = {"qwen3_1p7b", "qwen3_14b"}
    recurrent = {"huginn_3p5b"}  # in test_recurrent_depth.py
    assert set(PUBLISHED) == students | teachers | policies | energies | recurrent
