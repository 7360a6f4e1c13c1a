"""Hugging Face `config.json` <-> `TransformerConfig`: one table of families, read both ways."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlib_methods.models import huggingface_recurrent
from jaxlib_methods.models.config import TransformerConfig

_SWIGLU = {"silu": "swiglu", "swish": "swiglu"}
# The first name of each activation is the one written.
_PLAIN = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_MOST = 2**31 - 128  # as a padded vocabulary it is still an int32
_KINDS = {float: "a finite number", dict: "a JSON object"}
# Our rope_scaling -> our field -> key of the rope dictionary.
_ROPE: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"rope_scaling_factor": "factor"},
    "llama3": {
        "rope_scaling_factor": "factor",
        "rope_low_frequency_factor": "low_freq_factor",
        "rope_high_frequency_factor": "high_freq_factor",
        "rope_original_length": "original_max_position_embeddings",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What one `model_type` says in its keys and what it takes for granted.

    fixed: our fields that every member shares. switches: key -> (value where the key is absent,
    our fields that follow it). only: key -> the values that our trunk can run, the usual one
    first. `has_head_keys`: grouped keys and a free head size can be written. `recurrent`: its
    members are recurrent in depth, all of them; those of the others are not. size_keys: where
    `sizes` differ from the usual.
    """

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    switches: Mapping[str, tuple[bool, tuple[str, ...]]]
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: _SWIGLU)
    default_activation: str = "silu"
    mlp_dim_key: str = "intermediate_size"
    norm_eps_key: str | None = "rms_norm_eps"
    default_norm_eps: float = 1e-6
    has_head_keys: bool = True
    default_head_dim: int | None = None
    rope_theta_key: str = "rope_theta"
    rope_fraction_key: str = "partial_rotary_factor"
    default_rope_theta: float = 10_000.0
    default_rope_fraction: float = 1.0
    recurrent: bool = False
    size_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, str]:
        """Our field -> key, for the sizes that every config.json must give."""
        return {
            "vocab_size": "vocab_size",
            "num_layers": "num_hidden_layers",
            "embed_dim": "hidden_size",
            "num_heads": "num_attention_heads",
            "mlp_dim": self.mlp_dim_key,
            "max_length": "max_position_embeddings",
            **self.size_keys,
        }


_PLAIN_BLOCK = {"block": "pre_norm", "qk_bias": False}
_RMS_ROTARY = {
    "norm": "rms_norm",
    "positions": "rotary",
    "learned_position_offset": 0,
    "rotary_fraction": 1.0,
    "parallel_residual": False,
}
_LLAMA_LIKE = _PLAIN_BLOCK | _RMS_ROTARY
_ATTENTION_BIAS = ("qkv_bias", "output_bias")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            fixed=_LLAMA_LIKE | {"qk_norm": False},
            switches={
                "attention_bias": (False, _ATTENTION_BIAS),
                "mlp_bias": (False, ("mlp_bias",)),
                "tie_word_embeddings": (False, ("tie_embeddings",)),
            },
            only={"rope_interleaved": (False,)},
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            fixed=_LLAMA_LIKE
            | {"qk_norm": False, "qkv_bias": True, "output_bias": False, "mlp_bias": False},
            switches={"tie_word_embeddings": (False, ("tie_embeddings",))},
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            fixed=_LLAMA_LIKE | {"qk_norm": True, "mlp_bias": False},
            switches={
                "attention_bias": (False, _ATTENTION_BIAS),
                "tie_word_embeddings": (False, ("tie_embeddings",)),
            },
            default_head_dim=128,
        ),
        Family(
            model_type="gpt_neox",
            architecture="GPTNeoXForCausalLM",
            fixed=_PLAIN_BLOCK
            | {
                "norm": "layer_norm",
                "positions": "rotary",
                "learned_position_offset": 0,
                "qk_norm": False,
                "mlp_bias": True,
            },
            switches={
                "attention_bias": (True, _ATTENTION_BIAS),
                "use_parallel_residual": (True, ("parallel_residual",)),
                "tie_word_embeddings": (False, ("tie_embeddings",)),
            },
            activations=_PLAIN,
            default_activation="gelu",
            norm_eps_key="layer_norm_eps",
            default_norm_eps=1e-5,
            has_head_keys=False,
            rope_theta_key="rotary_emb_base",
            rope_fraction_key="rotary_pct",
            default_rope_fraction=0.25,
        ),
        Family(
            model_type="opt",
            architecture="OPTForCausalLM",
            fixed=_PLAIN_BLOCK
            | {
                "norm": "layer_norm",
                "norm_eps": 1e-5,
                "positions": "learned",
                "learned_position_offset": 2,
                "parallel_residual": False,
                "qk_norm": False,
            },
            switches={
                "enable_bias": (True, (*_ATTENTION_BIAS, "mlp_bias")),
                "tie_word_embeddings": (True, ("tie_embeddings",)),
            },
            activation_key="activation_function",
            activations=_PLAIN,
            default_activation="relu",
            mlp_dim_key="ffn_dim",
            norm_eps_key=None,
            has_head_keys=False,
            only={
                "do_layer_norm_before": (True,),
                "_remove_final_layer_norm": (False,),
                "layer_norm_elementwise_affine": (True,),
            },
        ),
        Family(
            model_type="huginn_raven",
            architecture="RavenForCausalLM",
            recurrent=True,
            fixed=_RMS_ROTARY
            | {
                "block": "sandwich",
                "injection": "linear",
                "rope_scaling": "none",
                "qkv_bias": False,
                "output_bias": False,
                "mlp_bias": False,
                "qk_norm": False,
            },
            switches={
                "tie_embeddings": (True, ("tie_embeddings",)),
                "qk_bias": (True, ("qk_bias",)),
            },
            size_keys={
                "num_layers": "n_layers",
                "embed_dim": "n_embd",
                "num_heads": "n_heads",
                "max_length": "block_size",
                "prelude_layers": "n_layers_in_prelude",
                "coda_layers": "n_layers_in_coda",
                "recurrence": "mean_recurrence",
                "backprop_steps": "mean_backprop_depth",
            },
            activation_key="nonlin_name",
            activations={"SiLU": "swiglu"},
            default_activation="SiLU",
            norm_eps_key="norm_eps",
            has_head_keys=False,
            rope_theta_key="rope_base",
            default_rope_theta=50_000.0,
            only={
                "architecture_class_name": ("RecurrentGPT",),
                "block_class_name": ("SandwichBlock",),
                "norm_class_name": ("RMSNorm_llama",),
                "mlp_class_name": ("GatedMLP",),
                "injection_type": ("linear",),
                "state_init": ("like-init",),
                "bias": (False,),
                "test_time_noise": (0,),
            },
        ),
    )
}


def _refuse(key: str, value: Any, possible: str) -> ValueError:
    return ValueError(f"config.json has {key}={value!r}, which this trunk cannot run: {possible}")


def _read(values: Mapping, key: str, kind: type, default: Any = None, *, least: int = 1) -> Any:
    """An int, float or dict of config.json; the default where the key is absent or null.

    Raises ValueError for another kind, an int outside `least` to `_MOST` or what is not finite.
    """
    value = values.get(key)
    if value is None:
        return default
    if kind is int:
        fits = type(value) is int and least <= value <= _MOST  # True is an int to isinstance
    elif kind is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    else:
        fits = isinstance(value, kind)
    if not fits:
        possible = _KINDS.get(kind, f"an integer from {least} to {_MOST}")
        raise _refuse(key, value, f"it must be {possible}")
    return kind(value)


def _choose(key: str, value: Any, possible: Sequence[Any]) -> Any:
    """A value of config.json that must be one of those possible; it need not be hashable."""
    if value not in possible:
        raise _refuse(key, value, f"choose from {possible}")
    return value


def config_from_huggingface(config_json: Mapping[str, Any], **overrides: Any) -> TransformerConfig:
    """The `TransformerConfig` of a parsed config.json; `overrides` are fields of ours that win.

    Reads the keys of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
    The file's dtype is not architecture and is not read: `param_dtype` says what weights become.
    Raises ValueError, with key and value, for anything that the trunk does not compute.
    """
    model_type, known = config_json.get("model_type"), sorted(FAMILIES)
    if model_type not in known:  # in a list: it need not be hashable
        raise ValueError(
            f"config.json: model_type {model_type!r} is not known; choose from {known}"
        )
    family = FAMILIES[model_type]
    _refuse_what_we_lack(config_json, family)
    missing = [key for key in family.sizes.values() if config_json.get(key) is None]
    if missing:
        raise ValueError(f"config.json of model_type {model_type!r} lacks {', '.join(missing)}")
    may_be_zero = ("prelude_layers", "coda_layers")
    values: dict[str, Any] = {
        ours: _read(config_json, key, int, least=0 if ours in may_be_zero else 1)
        for ours, key in family.sizes.items()
    }
    values |= family.fixed
    for key, (default, fields) in family.switches.items():
        switch = config_json.get(key, default)
        if switch not in (True, False, None):
            raise _refuse(key, switch, "it must be true or false")
        values |= dict.fromkeys(fields, bool(switch))
    values["mlp"] = _activation(config_json, family)
    if family.norm_eps_key:
        eps = _read(config_json, family.norm_eps_key, float, family.default_norm_eps)
        values["norm_eps"] = eps
    if family.has_head_keys:
        values |= _heads(config_json, family, values["num_heads"], values["embed_dim"])
    if values["positions"] == "rotary":
        values |= _rope_from(config_json, family)
    if family.recurrent:
        values["kernel_init"] = "takase"
    try:
        cfg = TransformerConfig(**values)
    except ValueError as error:
        raise ValueError(f"config.json describes no model of this trunk: {error}") from error
    wrong = huggingface_recurrent.disagreement(config_json, cfg) if family.recurrent else None
    if wrong is not None:
        key, value, wanted = wrong
        raise _refuse(key, value, f"it must be {wanted}")
    return dataclasses.replace(cfg, **overrides)


def _refuse_what_we_lack(config_json: Mapping[str, Any], family: Family) -> None:
    for key, possible in family.only.items():
        value = config_json.get(key, possible[0])
        if value not in possible:
            raise _refuse(key, value, f"it must be {possible[0]}")
    width = config_json.get("hidden_size")
    projected = config_json.get("word_embed_proj_dim")
    if projected not in (None, width):
        raise _refuse("word_embed_proj_dim", projected, f"it must be hidden_size {width}")
    if config_json.get("quantization_config"):
        method = config_json["quantization_config"]
        raise _refuse("quantization_config", method, "use the unquantised checkpoint")
    layer_types = config_json.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise _refuse("layer_types", layer_types, "every layer must be 'full_attention'")
    window = config_json.get("sliding_window")
    if not layer_types and config_json.get("use_sliding_window") and window:
        raise _refuse("sliding_window", window, "use_sliding_window must be False")


def _activation(config_json: Mapping[str, Any], family: Family) -> str:
    name = config_json.get(family.activation_key, family.default_activation)
    return family.activations[_choose(family.activation_key, name, sorted(family.activations))]


def _heads(
    config_json: Mapping[str, Any], family: Family, heads: int, width: int
) -> dict[str, Any]:
    kv_heads = _read(config_json, "num_key_value_heads", int) or heads
    derived = width // heads
    head_dim = _read(config_json, "head_dim", int) or family.default_head_dim or derived
    is_derived = head_dim == derived and width % heads == 0
    return {
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": None if is_derived else head_dim,
    }


def _rope_from(config_json: Mapping[str, Any], family: Family) -> dict[str, Any]:
    rope = _read(config_json, "rope_scaling", dict) or _read(config_json, "rope_parameters", dict)
    rope = rope or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise _refuse("rope_parameters", rope, "all layers must share one rotary embedding")
    written = rope.get("rope_type", rope.get("type", "default"))
    kind = _choose("rope_type", written, ["default", "linear", "llama3"])
    kind = "none" if kind == "default" else kind
    if kind != family.fixed.get("rope_scaling", kind):
        raise _refuse("rope_type", kind, f"{family.model_type} must have 'default'")
    theta = _read(config_json, "rope_theta", float, family.default_rope_theta)
    theta = _read(config_json, family.rope_theta_key, float, theta)
    fraction = family.default_rope_fraction
    fraction = _read(config_json, family.rope_fraction_key, float, fraction)
    fraction = _read(rope, "partial_rotary_factor", float, fraction)
    if fraction != family.fixed.get("rotary_fraction", fraction):
        raise _refuse("partial_rotary_factor", fraction, f"{family.model_type} must rotate all")
    if absent := [key for key in _ROPE[kind].values() if rope.get(key) is None]:
        raise _refuse("rope_type", kind, f"its {' and '.join(absent)} must be given")
    return {
        "rope_theta": _read(rope, "rope_theta", float, theta),
        "rotary_fraction": fraction,
        "rope_scaling": kind,
    } | {
        ours: _read(rope, key, int if ours == "rope_original_length" else float)
        for ours, key in _ROPE[kind].items()
    }


def _why_not(cfg: TransformerConfig, family: Family) -> str | None:
    """Why the family cannot express the configuration, or None where it can."""
    if bool(cfg.recurrence) != family.recurrent:
        return f"recurrence {cfg.recurrence} must be {'above 0' if family.recurrent else '0'}"
    for field, value in family.fixed.items():
        if getattr(cfg, field) != value:
            return f"{field} {getattr(cfg, field)!r} must be {value!r}"
    for _, fields in family.switches.values():
        if len({getattr(cfg, field) for field in fields}) > 1:
            return f"{' and '.join(fields)} must be equal"
    if cfg.mlp not in family.activations.values():
        return f"mlp {cfg.mlp!r} must be one of {sorted(set(family.activations.values()))}"
    if not family.has_head_keys and cfg.kv_heads != cfg.num_heads:
        return f"num_kv_heads {cfg.kv_heads} must be num_heads {cfg.num_heads}"
    if not family.has_head_keys and cfg.head_size * cfg.num_heads != cfg.embed_dim:
        return f"head_dim {cfg.head_size} must be embed_dim {cfg.embed_dim} / num_heads"
    return None


def family_of(cfg: TransformerConfig, family: str | None = None) -> Family:
    """The family that expresses `cfg`: the one named, or the first of the table.

    Raises ValueError with the reasons where there is none.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family {family!r} is not known; choose from {sorted(FAMILIES)}")
    candidates = [FAMILIES[family]] if family else list(FAMILIES.values())
    reasons = {}
    for candidate in candidates:
        reason = _why_not(cfg, candidate)
        if reason is None:
            return candidate
        reasons[candidate.model_type] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"no Hugging Face family can express this configuration ({listed})")


def config_to_huggingface(cfg: TransformerConfig, *, family: str | None = None) -> dict[str, Any]:
    """The config.json, as a dict, that makes transformers build this architecture.

    `family` None takes the first family that can express `cfg`. Token ids are written as null:
    a `TransformerConfig` does not know them, and the families' defaults would be wrong.
    Raises ValueError with the reason where no family fits.
    """
    found = family_of(cfg, family)
    names = {ours: name for name, ours in reversed(list(found.activations.items()))}
    out: dict[str, Any] = {
        "architectures": [found.architecture],
        "model_type": found.model_type,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        found.activation_key: names[cfg.mlp],
    }
    out |= {key: getattr(cfg, ours) for ours, key in found.sizes.items()}
    out[found.mlp_dim_key] = cfg.mlp_size
    if found.recurrent:
        out |= {found.sizes["backprop_steps"]: cfg.trained_steps}
        out |= huggingface_recurrent.written_keys(cfg)
    out |= {key: getattr(cfg, fields[0]) for key, (_, fields) in found.switches.items()}
    out |= {key: possible[0] for key, possible in found.only.items()}
    if found.norm_eps_key:
        out[found.norm_eps_key] = cfg.norm_eps
    if found.has_head_keys:
        out |= {"num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_size}
    if cfg.positions == "rotary":
        out[found.rope_theta_key] = cfg.rope_theta
    if cfg.positions == "rotary" and "rope_scaling" not in found.fixed:
        out["rope_scaling"] = _rope_to(cfg)
    if cfg.positions == "rotary" and "rotary_fraction" not in found.fixed:
        out[found.rope_fraction_key] = cfg.rotary_fraction
    return out


def _rope_to(cfg: TransformerConfig) -> dict[str, Any] | None:
    if cfg.rope_scaling == "none":
        return None
    numbers = {key: getattr(cfg, ours) for ours, key in _ROPE[cfg.rope_scaling].items()}
    return {"rope_type": cfg.rope_scaling} | numbers
