"""Norms, rotary positions, attention and feed-forward: functions first, modules around them."""

# Dimension key: B batch, L sequence, M cached keys (slots), D width, F hidden, H heads,
# C head size, R rotated features of a head.

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import constrain
from jaxlib_methods.models.self_attention import Sight, attend
from jaxlib_methods.pallas_kernels.attention import Part, attend_parts

Initializer = Callable[..., jax.Array]
Rotation = tuple[jax.Array, jax.Array]
KeysValues = tuple[jax.Array, jax.Array]  # of one layer, each `[B, K, M, C]`


class LayerCache(NamedTuple):
    """What the attention of a layer has seen.

    own: keys and values; at: where the next are written, see `write_slots`. prefix: what rows of
    the batch have in common, only read, or None.
    """

    own: KeysValues
    at: jax.Array
    prefix: Part | None = None


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), in float32 or better.

        y = x / sqrt(mean(x^2) + eps) * scale

    x: `[..., D]`; scale: `[D]`. Returns x's shape and dtype.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float) -> jax.Array:
    """Layer norm over the last axis (Ba et al. 2016), in float32 or better.

        y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias

    x: `[..., D]`; scale, bias: `[D]`. Returns x's shape and dtype.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    lead = range(x.ndim - 1)
    return (y * jnp.expand_dims(scale, lead) + jnp.expand_dims(bias, lead)).astype(x.dtype)


def rotary_frequencies(cfg: TransformerConfig) -> jax.Array:
    """Angular frequencies of rotary positions (Su et al. 2021), radians per token, `[R / 2]`.

        w_i = theta^(-2 i / R)

    `linear` scaling divides all of them by the factor. `llama3` (Llama 3.1) divides only those
    whose wavelength exceeds original_length / low_factor, keeps those below
    original_length / high_factor, and blends between.
    """
    exponents = jnp.arange(0, cfg.rotary_dim, 2, dtype=jnp.float32) / cfg.rotary_dim
    freq = cfg.rope_theta**-exponents
    if cfg.rope_scaling == "linear":
        return freq / cfg.rope_scaling_factor
    if cfg.rope_scaling == "llama3":
        low, high = cfg.rope_low_frequency_factor, cfg.rope_high_frequency_factor
        turns = cfg.rope_original_length * freq / (2 * math.pi)
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return keep * freq + (1.0 - keep) * freq / cfg.rope_scaling_factor
    return freq


def rotation(positions: jax.Array, cfg: TransformerConfig) -> Rotation:
    """Cosine and sine of the rotary angles at `positions` `[B, L]`, float32, each `[B, L, R/2]`."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(cfg)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: Rotation) -> jax.Array:
    """Rotates feature pairs (i, i + R/2) of the first R features of each head.

    x: `[B, L, H, C]`; angles: cosine and sine `[B, L, R/2]`. Returns x's shape and dtype.
    """
    cos, sin = (a[:, :, None, :].astype(jnp.promote_types(x.dtype, jnp.float32)) for a in angles)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([t.astype(x.dtype) for t in turned] + [rest], axis=-1)


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    cfg: TransformerConfig,
) -> jax.Array:
    """Declares a parameter with one logical axis name per dimension."""
    boxed = nn.with_logical_partitioning(init, axes)
    return cast(jax.Array, module.param(name, boxed, shape, jnp.dtype(cfg.param_dtype)))


def truncated_normal(stddev: float) -> Initializer:
    """A normal of deviation `stddev`, cut at 3 of it and not rescaled."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype) * stddev

    return init


def takase(embed_dim: int) -> float:
    """Standard deviation of kernels and embeddings before their scale: sqrt(2 / (5 D)).

    Takase et al. 2023, as recurrent-depth models take it (arXiv 2502.05171); cut at 3 of it.
    """
    return (2 / (5 * embed_dim)) ** 0.5


def write_slots(slots: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Writes `new` `[B, L, ...]` into the slots `[B, M, ...]` of a cache.

    at: the slot of the first, int32 scalar; or of each, `[B, L]`, where M and above writes nothing.
    """
    if at.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), at, axis=1)
    rows = jnp.arange(slots.shape[0])[:, None]
    return slots.at[rows, at].set(new.astype(slots.dtype), mode="drop")


def write_heads(slots: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """`write_slots` of `new` `[B, L, K, C]` into keys or values `[B, K, M, C]`, heads first."""
    new = new.astype(slots.dtype)
    if at.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(slots, jnp.swapaxes(new, 1, 2), at, axis=2)
    # Heads are indexed too: a slice between indices makes XLA transpose the whole array.
    rows, heads = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[None, None]
    return slots.at[rows, heads, at[:, :, None]].set(new, mode="drop")


def _kernel_init(
    cfg: TransformerConfig, fan_in: int, scale: float, used: int | None
) -> Initializer:
    if cfg.kernel_init == "takase":
        draw = truncated_normal(scale * takase(cfg.embed_dim))
    else:
        # 0.88 is the deviation of a unit normal that is cut at 2.
        draw = nn.initializers.truncated_normal(stddev=scale * fan_in**-0.5 / 0.87962566)
    if used is None:
        return draw

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        columns = jnp.expand_dims(jnp.arange(shape[-1]), range(len(shape) - 1))
        return jnp.where(columns < used, draw(key, shape, dtype), 0)

    return init


class Projection(nn.Module):
    """A linear map over the last `len(in_names)` axes, with logical axis names.

    kernel: `[*in_shape, *out_shape]`; bias: `[*out_shape]` where `use_bias`. output: `wide` keeps
    the matmul's float32 sums (logits), `compute` rounds them to the compute dtype.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_names: tuple[str, ...]
    out_names: tuple[str, ...]
    use_bias: bool
    cfg: TransformerConfig
    init_scale: float = 1.0
    used: int | None = None  # the last axis starts at zero from here on
    output: Literal["compute", "wide"] = "compute"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.cfg.compute_dtype)
        fan_in, fan_out = math.prod(self.in_shape), math.prod(self.out_shape)
        if self.cfg.kernel_init == "xavier":
            kernel_init: Initializer = nn.initializers.normal((2 / (fan_in + fan_out)) ** 0.5)
        else:
            kernel_init = _kernel_init(self.cfg, fan_in, self.init_scale, self.used)
        shape, names = (*self.in_shape, *self.out_shape), (*self.in_names, *self.out_names)
        kernel = parameter(self, "kernel", kernel_init, shape, names, self.cfg)
        axes = tuple(range(-len(self.in_shape), 0))
        wide = jnp.promote_types(dtype, jnp.float32) if self.output == "wide" else None
        y = jnp.tensordot(
            x,
            kernel.astype(dtype),
            axes=(axes, tuple(range(len(self.in_shape)))),
            preferred_element_type=wide,
        )
        if self.use_bias:
            names = tuple("norm" if name == "embed" else name for name in self.out_names)
            bias = parameter(self, "bias", nn.initializers.zeros, self.out_shape, names, self.cfg)
            y = y + jnp.expand_dims(bias.astype(dtype), range(y.ndim - bias.ndim))
        return y


class Table(nn.Module):
    """Embeddings: a normal table of `shape`; rows from `used` on are zero.

    `kernel_init="takase"` draws with its deviation instead of `stddev`.
    """

    cfg: TransformerConfig
    shape: tuple[int, int]
    used: int
    row_name: str
    stddev: float

    @nn.compact
    def __call__(self) -> jax.Array:
        def init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
            if self.cfg.kernel_init == "takase":
                table = truncated_normal(takase(self.cfg.embed_dim))(key, shape, dtype)
            else:
                table = jax.random.normal(key, shape, dtype) * self.stddev
            return jnp.where(jnp.arange(shape[0])[:, None] < self.used, table, 0)

        return parameter(self, "table", init, self.shape, (self.row_name, "embed"), self.cfg)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, as the configuration says, over the last axis of size `size`."""

    cfg: TransformerConfig
    size: int
    kind: str | None = None  # None: the configuration's

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, names = (self.size,), ("norm",)
        scale = parameter(self, "scale", nn.initializers.ones, shape, names, self.cfg)
        if (self.kind or self.cfg.norm) == "rms_norm":
            return rms_norm(x, scale, eps=self.cfg.norm_eps)
        bias = parameter(self, "bias", nn.initializers.zeros, shape, names, self.cfg)
        return layer_norm(x, scale, bias, eps=self.cfg.norm_eps)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values.

    x: `[B, L, D]`; where: bool `[B, L, M]`, or `Places` without a cache; angles: rotary cosine and
    sine or None; cache: of this layer, or None, its own slots being the M keys of `where`.
    Returns the output `[B, L, D]` and the cache's own new keys and values (None without a cache).
    """

    cfg: TransformerConfig

    def setup(self) -> None:
        cfg = self.cfg
        heads, kv_heads = (cfg.num_heads, cfg.head_size), (cfg.kv_heads, cfg.head_size)
        inputs: dict[str, Any] = {
            "cfg": cfg,
            "in_shape": (cfg.embed_dim,),
            "in_names": ("embed",),
            "use_bias": cfg.qkv_bias,
        }
        self.query = Projection(out_shape=heads, out_names=("heads", "head_dim"), **inputs)
        self.key = Projection(out_shape=kv_heads, out_names=("kv_heads", "head_dim"), **inputs)
        self.value = Projection(out_shape=kv_heads, out_names=("kv_heads", "head_dim"), **inputs)
        self.output = Projection(
            in_shape=heads,
            out_shape=(cfg.embed_dim,),
            in_names=("heads", "head_dim"),
            out_names=("embed",),
            use_bias=cfg.output_bias,
            cfg=cfg,
            init_scale=(2 * cfg.unfolded_layers) ** -0.5,
        )
        if cfg.qk_bias:
            zeros = nn.initializers.zeros
            names = ("kv_heads", "head_dim")
            self.query_bias = parameter(self, "query_bias", zeros, heads, ("heads", names[1]), cfg)
            self.key_bias = parameter(self, "key_bias", zeros, kv_heads, names, cfg)
        if cfg.qk_norm:
            self.query_norm = Norm(cfg, cfg.head_size, kind="rms_norm")
            self.key_norm = Norm(cfg, cfg.head_size, kind="rms_norm")

    def heads(
        self, x: jax.Array, angles: Rotation | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, L, H, C]`, keys and values `[B, L, K, C]` of `x`, normed and rotated."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.cfg.qk_bias:
            query = query + self.query_bias.astype(query.dtype)[None, None]
            key = key + self.key_bias.astype(key.dtype)[None, None]
        if self.cfg.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        return constrain(query, "batch", "sequence", "heads", None), key, value

    def __call__(
        self,
        x: jax.Array,
        where: Sight,
        angles: Rotation | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, KeysValues | None]:
        query, key, value = self.heads(x, angles)
        if cache is None:
            return self.output(attend(self.cfg, query, key, value, where)), None
        assert isinstance(where, jax.Array)
        kept = (write_heads(*each, cache.at) for each in zip(cache.own, (key, value), strict=True))
        keys, values = (constrain(x, "batch", "kv_heads", None, None) for x in kept)
        parts = [Part(keys, values, where)]
        if cache.prefix is not None:
            parts.append(cache.prefix)
        return self.output(attend_parts(query, parts)), (keys, values)


class FeedForward(nn.Module):
    """Feed-forward block: `down(silu(gate(x)) * up(x))`, or `down(activation(up(x)))`.

    x: `[B, L, D]`. Returns `[B, L, D]`.
    """

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        inputs: dict[str, Any] = {
            "in_shape": (cfg.embed_dim,),
            "out_shape": (cfg.mlp_size,),
            "in_names": ("embed",),
            "out_names": ("mlp",),
            "use_bias": cfg.mlp_bias,
            "cfg": cfg,
        }
        # Of the product of two halves one is drawn small, like what writes to the stream.
        small = cfg.mlp == "swiglu" and cfg.kernel_init == "takase"
        written = (2 * cfg.unfolded_layers) ** -0.5
        up = Projection(name="up", init_scale=written if small else 1.0, **inputs)(x)
        if cfg.mlp == "swiglu":
            hidden = jax.nn.silu(Projection(name="gate", **inputs)(x)) * up
        elif cfg.mlp == "relu":
            hidden = jax.nn.relu(up)
        else:
            hidden = jax.nn.gelu(up, approximate=cfg.mlp == "gelu_tanh")
        hidden = constrain(hidden, "batch", "sequence", "mlp")
        return Projection(
            name="down",
            in_shape=(cfg.mlp_size,),
            out_shape=(cfg.embed_dim,),
            in_names=("mlp",),
            out_names=("embed",),
            use_bias=cfg.mlp_bias,
            cfg=cfg,
            init_scale=written,
        )(hidden)


class Block(nn.Module):
    """One transformer block.

        pre_norm:  h = x + attention(norm(x));  y = h + feed_forward(norm(h))
        parallel:  y = x + attention(norm(x)) + feed_forward(norm(x))      (GPT-NeoX)
        sandwich:  h = norm(x + attention(norm(x)));  y = norm(h + feed_forward(norm(h)))
        post_norm: h = norm(x + attention(x));  y = norm(h + feed_forward(h))

    The norms after the sums of `sandwich` bound a state that passes a block again and again.

    Arguments and results as `Attention`'s, on the residual stream `[B, L, D]`.
    """

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        where: Sight,
        angles: Rotation | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, KeysValues | None]:
        cfg = self.cfg
        attention_norm = Norm(cfg, cfg.embed_dim, name="attention_norm")
        mlp_norm = Norm(cfg, cfg.embed_dim, name="mlp_norm")
        mlp = FeedForward(cfg, name="mlp")
        attended = x if cfg.block == "post_norm" else attention_norm(x)
        mixed, kv = Attention(cfg, name="attention")(attended, where, angles, cache)
        if cfg.parallel_residual:
            y = x + mixed + mlp(mlp_norm(x))
        elif cfg.block == "post_norm":
            y = attention_norm(x + mixed)
            y = mlp_norm(y + mlp(y))
        elif cfg.block == "sandwich":
            y = Norm(cfg, cfg.embed_dim, name="attention_post_norm")(x + mixed)
            y = Norm(cfg, cfg.embed_dim, name="mlp_post_norm")(y + mlp(mlp_norm(y)))
        else:
            y = x + mixed
            y = y + mlp(mlp_norm(y))
        return constrain(y, "batch", "sequence", None), kv
