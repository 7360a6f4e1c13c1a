"""Bidirectional transformer over image patches, shaped like DiT (Peebles and Xie 2023).

One module with two heads: `energy` gives one scalar per image (the image model of Energy-Based
Transformers, arXiv 2507.02092), `image` a prediction of the image's shape (a diffusion model).
"""

# Dimension key: B images, S image side, C channels, N patches, D width, P pixel values of a patch.

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.models.config import TransformerConfig, check_choices
from jaxlib_methods.models.layers import Attention, FeedForward, Projection, layer_norm, parameter
from jaxlib_methods.models.partitioning import constrain
from jaxlib_methods.models.transformer import REMAT_POLICIES

NORM_EPS = 1e-6
LEVEL_FEATURES = 256  # sines and cosines of a noise level
_OF_TEXT = ("vocab_size", "max_length")  # set by a run's data, whatever the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchTransformerConfig:
    """Sizes of a `PatchTransformer`.

    mlp_dim: None is four times the width. head: `energy`, one scalar per image, conditioned on
    one learned vector; `image`, a value per pixel and channel, conditioned on a noise level.
    """

    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    mlp_dim: int | None = None
    image_size: int = 32
    channels: int = 3
    patch_size: int = 4
    head: Literal["energy", "image"] = "energy"
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("image_size", "channels", "patch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.embed_dim % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} must be a multiple of 4: sines and cosines of a "
                "patch's row and column"
            )
        _ = self.trunk  # validates the rest

    @classmethod
    def of(cls, model: TransformerConfig, **fields: Any) -> "PatchTransformerConfig":
        """The sizes of a run's model with the fields of an image.

        Raises ValueError where the run's model asks for what these blocks do not have.
        """
        plain = TransformerConfig()
        names = ("num_layers", "embed_dim", "num_heads", "mlp_dim")
        names += ("compute_dtype", "param_dtype", "remat")
        unread = {field.name for field in dataclasses.fields(model)} - {*names, *_OF_TEXT}
        for name in sorted(unread):
            if getattr(model, name) != getattr(plain, name):
                raise ValueError(
                    f"model.{name}={getattr(model, name)} has no meaning in a patch transformer; "
                    "leave it out"
                )
        return cls(**{name: getattr(model, name) for name in names}, **fields)

    @property
    def trunk(self) -> TransformerConfig:
        """What the layers shared with the language models are made from."""
        return TransformerConfig(
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim or 4 * self.embed_dim,
            mlp="gelu_tanh",
            positions="learned",  # added in front of the blocks: nothing is rotated
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            compute_dtype=self.compute_dtype,
            param_dtype=self.param_dtype,
            remat=self.remat,
        )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Pixel values of a patch."""
        return self.patch_size**2 * self.channels


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """`[B, S, S, C]` to `[B, N, P]`: patches row by row, pixels row by row within each."""
    B, S, _, C = images.shape
    grid = S // patch_size
    x = images.reshape(B, grid, patch_size, grid, patch_size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, grid * grid, patch_size**2 * C)


def unpatchify(patches: jax.Array, patch_size: int) -> jax.Array:
    """The inverse of `patchify`: `[B, N, P]` to `[B, S, S, C]`."""
    B, N, P = patches.shape
    grid, C = round(N**0.5), P // patch_size**2
    x = patches.reshape(B, grid, grid, patch_size, patch_size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, grid * patch_size, grid * patch_size, C)


def position_table(grid: int, width: int) -> np.ndarray:
    """Fixed 2-D positions of `grid * grid` patches, float64 `[N, D]`, D a multiple of 4.

    A quarter of the features each: sin(row w), cos(row w), sin(column w), cos(column w) with
    w_i = 10000^(-4 i / D).
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) * 4 / width)
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    angles = [place[:, None] * frequencies for place in (rows, columns)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)


def level_features(levels: jax.Array, size: int = LEVEL_FEATURES) -> jax.Array:
    """Cosines, then sines, of noise levels: `[B]` to float32 `[B, size]`."""
    frequencies = 10_000.0 ** (-np.arange(size // 2) * 2 / size)
    angles = levels.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`norm(x) * (1 + scale) + shift`, the norm without parameters of its own.

    x: `[B, N, D]`; shift, scale: `[B or 1, D]`.
    """
    width = x.shape[-1]
    normed = layer_norm(x, jnp.ones(width, x.dtype), jnp.zeros(width, x.dtype), eps=NORM_EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


class _PatchEmbedding(nn.Module):
    """The linear map of a patch's pixels to the width, Xavier-uniform."""

    cfg: PatchTransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, trunk = self.cfg, self.cfg.trunk
        shape, init = (cfg.patch_values, cfg.embed_dim), nn.initializers.xavier_uniform()
        kernel = parameter(self, "kernel", init, shape, ("norm", "embed"), trunk)
        zeros = nn.initializers.zeros
        bias = parameter(self, "bias", zeros, (cfg.embed_dim,), ("norm",), trunk)
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None, None]


def _linear(
    cfg: TransformerConfig,
    name: str,
    sizes: tuple[int, int],
    names: tuple[str, str],
    *,
    use_bias: bool = True,
    **fields: Any,
) -> Projection:
    return Projection(
        in_shape=sizes[:1],
        out_shape=sizes[1:],
        in_names=names[:1],
        out_names=names[1:],
        cfg=cfg,
        name=name,
        use_bias=use_bias,
        **fields,
    )


class _Modulation(nn.Module):
    """`[B or 1, D]` to `parts` vectors of the width each, zero at first (adaLN-Zero)."""

    cfg: TransformerConfig
    parts: int

    @nn.compact
    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        width = self.cfg.embed_dim
        vectors = Projection(
            in_shape=(width,),
            out_shape=(self.parts, width),
            in_names=("embed",),
            out_names=("norm", "mlp"),
            use_bias=True,
            cfg=self.cfg,
            init_scale=0.0,
            name="linear",
        )(jax.nn.silu(condition))
        vectors = constrain(vectors, "batch", None, None)
        return [vectors[:, i] for i in range(self.parts)]


class PatchBlock(nn.Module):
    """One block: attention over all patches, then a feed-forward, both modulated and gated.

        h = x + gate_1 * attention(modulate(x, shift_1, scale_1))
        y = h + gate_2 * feed_forward(modulate(h, shift_2, scale_2))

    x: `[B, N, D]`; condition: `[B or 1, D]`. Shifts, scales and gates are linear in silu(condition)
    and zero at first, so that a new block is the identity.
    """

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        cfg = self.cfg
        modulation = _Modulation(cfg, 6, name="modulation")(condition)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation
        everything = jnp.ones((1, x.shape[1], x.shape[1]), bool)
        attend = Attention(cfg, name="attention")
        mixed, _ = attend(modulate(x, shift_1, scale_1), everything, None, None)
        x = x + gate_1[:, None] * mixed
        x = x + gate_2[:, None] * FeedForward(cfg, name="mlp")(modulate(x, shift_2, scale_2))
        return constrain(x, "batch", "sequence", None)


class PatchTransformer(nn.Module):
    """Maps images, and for the head `image` their noise levels, to energies or images."""

    cfg: PatchTransformerConfig

    @nn.compact
    def __call__(self, images: jax.Array, levels: jax.Array | None = None) -> jax.Array:
        """images: `[B, S, S, C]`; levels: `[B]`, of the head `image` alone.

        Returns `[B]` energies, the mean over the patches of one scalar each, or `[B, S, S, C]`;
        float32 or better. A new model gives zero.
        """
        cfg, trunk = self.cfg, self.cfg.trunk
        dtype = jnp.dtype(cfg.compute_dtype)
        table = position_table(cfg.image_size // cfg.patch_size, cfg.embed_dim)
        x = _PatchEmbedding(cfg, name="patches")(patchify(images, cfg.patch_size).astype(dtype))
        x = constrain(x + jnp.asarray(table, dtype)[None], "batch", "sequence", None)
        condition = self._condition(levels)
        x = self._blocks(x, condition)
        shift, scale = _Modulation(trunk, 2, name="final_modulation")(condition)
        x = modulate(x, shift, scale)
        energy = cfg.head == "energy"
        sizes = (cfg.embed_dim, 1 if energy else cfg.patch_values)
        values = _linear(
            trunk,
            "head",
            sizes,
            ("embed", "norm"),
            use_bias=not energy,  # a constant in the energy changes nothing
            init_scale=0.0,
            output="wide",
        )(x)
        return values[..., 0].mean(axis=1) if energy else unpatchify(values, cfg.patch_size)

    def _condition(self, levels: jax.Array | None) -> jax.Array:
        cfg, trunk = self.cfg, self.cfg.trunk
        width, dtype = cfg.embed_dim, jnp.dtype(cfg.compute_dtype)
        if (levels is None) != (cfg.head == "energy"):
            raise ValueError("levels belong to the head 'image', and it needs them")
        if levels is None:
            init = nn.initializers.normal(stddev=1.0)
            vector = parameter(self, "condition", init, (width,), ("norm",), trunk)
            return vector.astype(dtype)[None]
        features = level_features(levels).astype(dtype)
        hidden = _linear(trunk, "level_in", (LEVEL_FEATURES, width), ("embed", "mlp"))(features)
        return _linear(trunk, "level_out", (width, width), ("mlp", "embed"))(jax.nn.silu(hidden))

    def _blocks(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        cfg = self.cfg
        block_class = PatchBlock
        if cfg.remat != "none":
            policy = REMAT_POLICIES[cfg.remat]
            block_class = nn.remat(PatchBlock, policy=policy, prevent_cse=False)

        def body(block: PatchBlock, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x, condition), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(block_class(cfg.trunk, name="blocks"), x, None)[0]


def init_params(cfg: PatchTransformerConfig, key: jax.Array) -> dict:
    """Parameters of `PatchTransformer(cfg)`, boxed with logical axis names."""
    images = jnp.zeros((1, cfg.image_size, cfg.image_size, cfg.channels))
    levels = None if cfg.head == "energy" else jnp.zeros(1)
    return dict(PatchTransformer(cfg).init(key, images, levels)["params"])


def forward(
    cfg: PatchTransformerConfig,
    params: Mapping[str, Any],
    images: jax.Array,
    levels: jax.Array | None = None,
) -> jax.Array:
    """`PatchTransformer(cfg)` as a function of its parameters; see its `__call__`."""
    return cast(jax.Array, PatchTransformer(cfg).apply({"params": params}, images, levels))
