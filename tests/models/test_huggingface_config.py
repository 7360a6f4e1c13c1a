"""config.json in and out."""

import dataclasses
import math
from typing import Any

import pytest

from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.models.huggingface_config import (
    FAMILIES,
    config_from_huggingface,
    config_to_huggingface,
)

# The published checkpoints' own values (keys without meaning for the architecture left out).
PUBLISHED_JSON: dict[str, dict[str, Any]] = {
    "opt_125m": {
        "_name_or_path": "facebook/opt-125m",
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 50272,
        "word_embed_proj_dim": 768,
    },
    "pythia_160m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "smollm_135m": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.02,
        "intermediate_size": 1536,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "llama_3p2_1b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
}
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED_JSON["qwen3_1p7b"] = _QWEN3 | {
    "eos_token_id": 151643,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "tie_word_embeddings": True,
}
PUBLISHED_JSON["qwen3_14b"] = _QWEN3 | {
    "eos_token_id": 151645,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "max_position_embeddings": 40960,
    "max_window_layers": 40,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "tie_word_embeddings": False,
}
LLAMA = PUBLISHED_JSON["smollm_135m"]
OPT = PUBLISHED_JSON["opt_125m"]
NEOX = PUBLISHED_JSON["pythia_160m"]
QWEN2 = {key: LLAMA[key] for key in LLAMA if "bias" not in key} | {"model_type": "qwen2"}
QWEN3 = QWEN2 | {"model_type": "qwen3"}


@pytest.mark.parametrize("name", PUBLISHED_JSON)
def test_published_sizes_are_those_of_the_checkpoints(name: str) -> None:
    assert config_from_huggingface(PUBLISHED_JSON[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_JSON)
def test_export_repeats_what_the_checkpoint_says(name: str) -> None:
    original = PUBLISHED_JSON[name]
    written = config_to_huggingface(PUBLISHED[name], family=original["model_type"])
    for key in original.keys() & written.keys() - {"bos_token_id", "eos_token_id", "pad_token_id"}:
        assert written[key] == original[key], key
    assert config_from_huggingface(written) == PUBLISHED[name]


def test_keys_of_transformers_5_mean_the_same() -> None:
    old = PUBLISHED_JSON["llama_3p2_1b"]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = old["rope_scaling"] | {"rope_theta": 500000.0}
    assert (
        config_from_huggingface(new | {"rope_parameters": rope, "dtype": "bfloat16"})
        == (PUBLISHED["llama_3p2_1b"])
    )
    new = {k: v for k, v in NEOX.items() if k not in ("rotary_pct", "rotary_emb_base")}
    rope = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}
    cfg = config_from_huggingface(new | {"rope_parameters": rope})
    assert (cfg.rope_theta, cfg.rotary_fraction) == (777.0, 0.5)


def test_keys_that_are_absent_mean_what_transformers_takes() -> None:
    bare = {
        "vocab_size": 50,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 99,
        "ffn_dim": 99,
        "max_position_embeddings": 77,
    }
    llama = config_from_huggingface(bare | {"model_type": "llama"})
    assert (llama.norm_eps, llama.rope_theta, llama.kv_heads) == (1e-6, 10_000.0, 4)
    assert (llama.tie_embeddings, llama.qkv_bias, llama.mlp_bias) == (False, False, False)
    assert config_from_huggingface(bare | {"model_type": "qwen2"}).qkv_bias
    assert config_from_huggingface(bare | {"model_type": "qwen3"}).head_size == 128
    neox = config_from_huggingface(bare | {"model_type": "gpt_neox"})
    assert (neox.rotary_fraction, neox.mlp, neox.norm_eps) == (0.25, "gelu", 1e-5)
    assert neox.parallel_residual
    assert neox.qkv_bias
    assert not neox.tie_embeddings
    opt = config_from_huggingface(bare | {"model_type": "opt"})
    assert (opt.mlp, opt.learned_position_offset) == ("relu", 2)
    assert opt.tie_embeddings
    assert opt.mlp_bias


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("relu", "relu"),
    ],
)
def test_activations(name: str, ours: str) -> None:
    assert config_from_huggingface(NEOX | {"hidden_act": name}).mlp == ours
    assert config_from_huggingface(OPT | {"activation_function": name}).mlp == ours


@pytest.mark.parametrize(
    ("original", "change", "message"),
    [
        (LLAMA, {"model_type": "mistral"}, "model_type 'mistral' is not known"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_type='linear'.* its factor"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "share one rotary embedding"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        (LLAMA, {"hidden_size": None}, "lacks hidden_size"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 30}, "layer_types="),
        (NEOX, {"hidden_act": "gelu_10"}, "hidden_act='gelu_10'"),
        (OPT, {"activation_function": "silu"}, "activation_function='silu'"),
        (OPT, {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        (OPT, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
        (OPT, {"word_embed_proj_dim": 512}, "word_embed_proj_dim=512.* hidden_size 768"),
    ],
)
def test_what_the_trunk_lacks_is_refused(
    original: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    config_from_huggingface(original)
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(original | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "576"}, "hidden_size='576'.* an integer from 1 to 2147483520"),
        ({"hidden_size": 576.0}, "hidden_size=576.0"),
        ({"hidden_size": [576]}, r"hidden_size=\[576\]"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000.* 1 to 2147483520"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5"),
        ({"head_dim": "64"}, "head_dim='64'"),
        ({"num_key_value_heads": "3"}, "num_key_value_heads='3'"),
        ({"num_key_value_heads": 2}, "config.json describes no model.* num_kv_heads 2"),
        ({"model_type": []}, r"config.json: model_type \[\] is not known"),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\].* choose from"),
        ({"layer_types": 5}, "layer_types=5.* 'full_attention'"),
        ({"layer_types": [[1]]}, r"layer_types=\[\[1\]\]"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'.* true or false"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'.* a finite number"),
        ({"rope_theta": [1]}, r"rope_theta=\[1\]"),
        ({"rope_theta": math.inf}, "rope_theta=inf"),
        ({"rope_theta": 10**400}, "rope_theta=1000.* a finite number"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\].* a JSON object"),
        ({"rope_scaling": "x"}, "rope_scaling='x'"),
        ({"rope_scaling": {"rope_type": ["x"]}}, r"rope_type=\['x'\].* choose from"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'.* a finite number"),
    ],
)
def test_a_value_of_another_kind_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        config_from_huggingface(LLAMA | change)
    assert "config.json" in str(error.value)


def test_null_is_as_if_the_key_were_absent() -> None:
    null = dict.fromkeys(["head_dim", "rope_theta", "rope_scaling", "rope_parameters"])
    assert config_from_huggingface(LLAMA | null) == config_from_huggingface(LLAMA)


def test_a_window_that_is_not_used_is_no_window() -> None:
    cfg = config_from_huggingface(QWEN2 | {"use_sliding_window": False, "sliding_window": 4096})
    full = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"]}
    assert config_from_huggingface(QWEN2 | full) == cfg


def test_overrides_win() -> None:
    cfg = config_from_huggingface(LLAMA, param_dtype="bfloat16", remat="full", max_length=64)
    assert (cfg.param_dtype, cfg.remat, cfg.max_length) == ("bfloat16", "full", 64)


LAYER_NORM = TransformerConfig(norm="layer_norm", mlp="gelu", mlp_bias=True)
OPT_LIKE = dataclasses.replace(
    LAYER_NORM, positions="learned", learned_position_offset=2, qkv_bias=True, output_bias=True
)


@pytest.mark.parametrize(
    ("cfg", "family"),
    [
        (TransformerConfig(), "llama"),
        (TransformerConfig(qkv_bias=True, output_bias=True), "llama"),
        (TransformerConfig(qkv_bias=True), "qwen2"),
        (TransformerConfig(qk_norm=True, num_kv_heads=2, head_dim=64), "qwen3"),
        (LAYER_NORM, "gpt_neox"),
        (OPT_LIKE, "opt"),
    ],
)
def test_family_is_chosen_from_the_configuration(cfg: TransformerConfig, family: str) -> None:
    written = config_to_huggingface(cfg)
    assert written["model_type"] == family
    assert written["architectures"] == [FAMILIES[family].architecture]
    # The families' defaults would stop generation at a wrong token.
    assert {written[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {None}
    explicit = {"mlp_dim": cfg.mlp_size}
    assert config_from_huggingface(written) == dataclasses.replace(cfg, **explicit)


@pytest.mark.parametrize(
    ("cfg", "family", "message"),
    [
        (TransformerConfig(mlp="relu"), None, "llama: mlp 'relu' must be one of .'swiglu'."),
        (TransformerConfig(output_bias=True), None, "qkv_bias and output_bias must be equal"),
        (LAYER_NORM, "llama", "llama: norm 'layer_norm' must be 'rms_norm'"),
        (dataclasses.replace(LAYER_NORM, num_kv_heads=2), None, "num_kv_heads 2 must be num_heads"),
        (dataclasses.replace(LAYER_NORM, head_dim=64), None, "head_dim 64 must be embed_dim 128"),
        (dataclasses.replace(OPT_LIKE, norm_eps=1e-6), None, "norm_eps 1e-06 must be 1e-05"),
        (TransformerConfig(), "bert", "family 'bert' is not known"),
    ],
)
def test_what_no_family_expresses_is_refused(
    cfg: TransformerConfig, family: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_to_huggingface(cfg, family=family)
