"""Architecture configurations: frozen, self-validating, with the published sizes."""

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

VOCABULARY_MULTIPLE = 128  # sharding needs divisible sizes, kernels aligned ones


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choices(config: Any) -> None:
    """Raises ValueError where a field of a dataclass holds a value outside its `Literal`.

    None is one where the field is `Literal[...] | None`.
    """
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint)
        if type(None) in kinds:
            if value is None:
                continue
            others = [kind for kind in kinds if kind is not type(None)]
            hint = others[0] if len(others) == 1 else hint
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} {value!r} is unknown; choose one of {list(get_args(hint))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Decoder-only transformer: Llama, Qwen, GPT-NeoX and OPT families in one description.

    `None` means derived: `kv_heads` = `num_heads`, `head_size` = `embed_dim / num_heads`,
    `mlp_size` = 8/3 (SwiGLU) or 4 (others) times `embed_dim`, rounded up to 128.
    block: where a block norms, see `layers.Block`.
    kernel_init: `scaled` draws kernels with deviation 1 / sqrt(fan_in), those that write to the
        residual stream smaller by sqrt(2 * unfolded_layers); `xavier` all with
        sqrt(2 / (fan_in + fan_out)), as energy-based transformers do; `takase` with
        sqrt(2 / (5 * embed_dim)), as recurrent-depth models do: those that write to the stream and
        the product half of SwiGLU smaller by sqrt(2 * unfolded_layers), and the embedding too.

    loss_implementation: how losses of next tokens are computed. `logits` makes an array of tokens
        times vocabulary; `xla` makes none, in tiles of the vocabulary, and `pallas` none by a
        kernel; `auto` what was measured to be faster.
    attention_implementation: how whole sequences, and candidates to theirs, attend. `plain` makes
        all scores, `xla` and `pallas` none but those of a tile; `auto` what was measured, in
        float32, to be no slower, and tiles for energies of more than 512 candidates, whose scores
        fill memory.

    A `recurrence` above 0 makes the model recurrent in depth (arXiv 2502.05171, see
    `models.recurrent_depth`): of its `num_layers` blocks the first and the last run once, those
    between form the core and run again and again.

    recurrence: mean number of iterations of the core in training, and the number in inference.
    recurrence_sampling: how many a training step takes. `lognormal_poisson` is the paper's, with
        mean recurrence + 1 and a heavy tail; `uniform` 1 to 2 * recurrence - 1; `fixed` always
        `recurrence`.
    backprop_steps: the last iterations, through which gradients flow; none is a quarter of
        `recurrence`, as published.
    injection: how the prelude's output e enters each iteration of the state s: `linear` [s; e] A,
        `add` s + e, `gate` s * e; `none` begins with s = e and never enters it again.
    """

    vocab_size: int = 256
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    max_length: int = 2048  # longest context in tokens
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-5
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    positions: Literal["rotary", "learned"] = "rotary"
    learned_position_offset: int = 0  # OPT's table begins with two unused rows
    rotary_fraction: float = 1.0  # GPT-NeoX rotates a part of each head
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_scaling_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_length: int = 8192
    parallel_residual: bool = False  # attention and feed-forward read the same input
    block: Literal["pre_norm", "sandwich", "post_norm"] = "pre_norm"
    qkv_bias: bool = False
    qk_bias: bool = False  # biases of queries and keys alone
    output_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head, before rotation
    kernel_init: Literal["scaled", "xavier", "takase"] = "scaled"  # see `TransformerConfig`
    tie_embeddings: bool = False
    recurrence: int = 0  # 0: every block runs once
    recurrence_sampling: Literal["lognormal_poisson", "uniform", "fixed"] = "lognormal_poisson"
    backprop_steps: int | None = None
    prelude_layers: int = 1  # blocks before the core
    coda_layers: int = 1  # blocks after it
    injection: Literal["linear", "add", "gate", "none"] = "linear"
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    loss_implementation: Literal["auto", "logits", "xla", "pallas"] = "auto"
    attention_implementation: Literal["auto", "plain", "xla", "pallas"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "max_length"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} {value} must be at least 1")
        for name in ("num_kv_heads", "head_dim", "mlp_dim"):
            value = getattr(self, name)
            _require(
                value is None or value >= 1, f"{name} {value} must be at least 1, or None to derive"
            )
        _require(
            self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; "
            "set head_dim or change one of them",
        )
        _require(
            self.num_heads % self.kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}",
        )
        _require(
            0.0 < self.rotary_fraction <= 1.0,
            f"rotary_fraction {self.rotary_fraction} must be above 0 and at most 1",
        )
        _require(
            self.positions != "rotary" or (self.rotary_dim % 2 == 0 and self.rotary_dim > 0),
            f"rotary_fraction {self.rotary_fraction} of head_dim {self.head_size} gives "
            f"{self.rotary_dim} rotated features; the number must be even and positive",
        )
        _require(
            self.learned_position_offset >= 0,
            f"learned_position_offset {self.learned_position_offset} must not be negative",
        )
        _require(self.norm_eps > 0, f"norm_eps {self.norm_eps} must be positive")
        _require(
            not (self.parallel_residual and self.block != "pre_norm"),
            f"parallel_residual is for block 'pre_norm', not {self.block!r}; change one of them",
        )
        _require(
            not (self.qk_bias and self.qkv_bias),
            "qk_bias and qkv_bias both give queries and keys a bias; choose one of them",
        )
        self._check_rope()
        self._check_recurrence()

    def _check_recurrence(self) -> None:
        for name in ("recurrence", "prelude_layers", "coda_layers"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} {value} must not be negative")
        steps = self.backprop_steps
        _require(
            steps is None or steps >= 1,
            f"backprop_steps {steps} must be at least 1, or None for a quarter of recurrence",
        )
        if self.recurrence:
            _require(
                self.core_layers >= 1,
                f"num_layers {self.num_layers} leaves no block for the core beside prelude_layers "
                f"{self.prelude_layers} and coda_layers {self.coda_layers}; give at least "
                f"{self.prelude_layers + self.coda_layers + 1}",
            )
            _require(
                steps is None or steps <= self.recurrence,
                f"backprop_steps {steps} is more than the recurrence of {self.recurrence} "
                f"iterations; give at most {self.recurrence}",
            )

    def _check_rope(self) -> None:
        _require(self.rope_theta > 0, f"rope_theta {self.rope_theta} must be positive")
        for name in ("rope_scaling_factor", "rope_original_length"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} {value} must be at least 1")
        low, high = self.rope_low_frequency_factor, self.rope_high_frequency_factor
        _require(
            0 < low < high,
            f"rope_high_frequency_factor {high} must exceed rope_low_frequency_factor {low}, "
            "and that must be positive",
        )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def mlp_size(self) -> int:
        if self.mlp_dim:
            return self.mlp_dim
        wanted = 8 * self.embed_dim / 3 if self.mlp == "swiglu" else 4 * self.embed_dim
        return -(-int(wanted) // 128) * 128

    @property
    def rotary_dim(self) -> int:
        """Number of features of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def core_layers(self) -> int:
        """Blocks of the core of a recurrent model."""
        return self.num_layers - self.prelude_layers - self.coda_layers

    @property
    def trained_steps(self) -> int:
        """Iterations of the core through which gradients flow, at most."""
        return self.backprop_steps or max(1, self.recurrence // 4)

    @property
    def unfolded_layers(self) -> int:
        """Blocks that a token passes: those of the core count once for each iteration."""
        return self.num_layers + max(self.recurrence - 1, 0) * self.core_layers

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 128; the padded logits are masked."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


# name: layers, width, heads (EBT, arXiv 2507.02092, table D.1; 4xs and 3xs are in its code alone).
_EBT_SIZES = {
    "ebt_4xs": (2, 128, 2),
    "ebt_3xs": (4, 256, 4),
    "ebt_xxs": (6, 384, 6),
    "ebt_xs": (12, 384, 6),
    "ebt_small": (12, 768, 12),
    "ebt_medium": (24, 1024, 16),
    "ebt_large": (24, 1536, 16),
    "ebt_xl": (24, 2048, 32),
}


def _ebt(num_layers: int, embed_dim: int, num_heads: int) -> TransformerConfig:
    """A Llama block with a hidden layer as wide as the stream, GPT-NeoX's tokens, float32."""
    return TransformerConfig(
        vocab_size=50_277,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_dim=embed_dim,
        max_length=256,
        compute_dtype="float32",
        remat="full",
    )


# The sizes of LET's experiments. The students' widths and depths were not published (paper,
# arXiv 2602.05393, gives only 1.4B, 3B and 7B, Llama style): these are the usual Llama shapes of
# those sizes. The teachers are the config.json values of facebook/opt-125m, EleutherAI/pythia-160m,
# HuggingFaceTB/SmolLM-135M and meta-llama/Llama-3.2-1B.
PUBLISHED: dict[str, TransformerConfig] = {
    **{name: _ebt(*size) for name, size in _EBT_SIZES.items()},
    # Huginn-0125 ("nebel-raven-3.5b", arXiv 2502.05171): 3,564,976,800 parameters.
    "huginn_3p5b": TransformerConfig(
        vocab_size=65_536,
        num_layers=8,
        embed_dim=5280,
        num_heads=55,
        mlp_dim=17_920,
        max_length=4096,
        norm_eps=1e-6,
        rope_theta=50_000.0,
        block="sandwich",
        qk_bias=True,
        kernel_init="takase",
        tie_embeddings=True,
        recurrence=32,
        backprop_steps=8,
        prelude_layers=2,
        coda_layers=2,
        remat="full",
    ),
    "let_1p4b": TransformerConfig(
        vocab_size=49_152,
        num_layers=24,
        embed_dim=2048,
        num_heads=16,
        mlp_dim=5504,
        max_length=2048,
        remat="dots",
    ),
    "let_3b": TransformerConfig(
        vocab_size=49_152,
        num_layers=26,
        embed_dim=3200,
        num_heads=32,
        mlp_dim=8640,
        max_length=2048,
        remat="dots",
    ),
    "let_7b": TransformerConfig(
        vocab_size=128_256,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=11_008,
        max_length=2048,
        remat="full",
    ),
    "opt_125m": TransformerConfig(
        vocab_size=50_272,
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        mlp_dim=3072,
        max_length=2048,
        norm="layer_norm",
        mlp="relu",
        positions="learned",
        learned_position_offset=2,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    ),
    "pythia_160m": TransformerConfig(
        vocab_size=50_304,
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        mlp_dim=3072,
        max_length=2048,
        norm="layer_norm",
        mlp="gelu",
        rotary_fraction=0.25,
        parallel_residual=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "smollm_135m": TransformerConfig(
        vocab_size=49_152,
        num_layers=30,
        embed_dim=576,
        num_heads=9,
        num_kv_heads=3,
        mlp_dim=1536,
        max_length=2048,
        tie_embeddings=True,
    ),
    # config.json of Qwen/Qwen3-1.7B-Base and of Qwen/Qwen3-14B (arXiv 2505.09388).
    "qwen3_1p7b": TransformerConfig(
        vocab_size=151_936,
        num_layers=28,
        embed_dim=2048,
        num_heads=16,
        num_kv_heads=8,
        mlp_dim=6144,
        max_length=32_768,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
        tie_embeddings=True,
    ),
    "qwen3_14b": TransformerConfig(
        vocab_size=151_936,
        num_layers=40,
        embed_dim=5120,
        num_heads=40,
        num_kv_heads=8,
        mlp_dim=17_408,
        max_length=40_960,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
    ),
    "llama_3p2_1b": TransformerConfig(
        vocab_size=128_256,
        num_layers=16,
        embed_dim=2048,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=8192,
        max_length=131_072,
        rope_theta=500_000.0,
        rope_scaling="llama3",
        rope_scaling_factor=32.0,
        tie_embeddings=True,
    ),
}
