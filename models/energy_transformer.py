"""Energy-based transformer for text (EBT, arXiv 2507.02092): an energy for each candidate token.

Two streams go through the same blocks. The observed stream reads the tokens, causally, and never
sees a candidate: its keys and values are computed once and shared by all descent steps and all
candidates. The candidate stream holds one distribution over the vocabulary per predicted token;
each entry sees the observed tokens before it and itself, nothing else.
"""

# Dimension key: B batch, L observed tokens, R candidates, M keys, D width, V padded vocabulary,
# N landscapes.

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods.models.config import TransformerConfig, check_choices
from jaxlib_methods.models.layers import (
    Attention,
    FeedForward,
    Norm,
    Projection,
    Rotation,
    Table,
    rotation,
    write_slots,
)
from jaxlib_methods.models.partitioning import constrain, look_up
from jaxlib_methods.models.self_attention import Sight, attend, sight
from jaxlib_methods.models.transformer import REMAT_POLICIES
from jaxlib_methods.pallas_kernels.attention import SHARED_SEGMENT

LayerKeys = tuple[jax.Array, jax.Array]  # keys and values of one layer, each `[B, M, K, C]`


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyTransformerConfig:
    """An energy-based transformer on a trunk's sizes.

    num_landscapes: learned vectors, one of which stands before the tokens of each descent step
        (`time_embed` of the official code); the last one serves all later steps. 0: none.
    candidate_embedding: a distribution becomes a vector through its own matrix (`own`, as
        published) or through the token embedding (`token`).
    """

    trunk: TransformerConfig = TransformerConfig()  # noqa: RUF009 (it is frozen)
    num_landscapes: int = 0
    candidate_embedding: Literal["own", "token"] = "own"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.num_landscapes < 0:
            raise ValueError(f"num_landscapes {self.num_landscapes} must not be negative")
        wanted = {"positions": "rotary", "parallel_residual": False, "tie_embeddings": False}
        wanted |= {"block": "pre_norm", "qk_bias": False, "recurrence": 0}
        for name, value in wanted.items():
            if getattr(self.trunk, name) != value:
                raise ValueError(
                    f"model.{name}={getattr(self.trunk, name)} has no meaning in an energy "
                    f"transformer; set model.{name}={str(value).lower()}"
                )
        if self.trunk.loss_implementation not in ("auto", "logits"):
            raise ValueError(
                f"model.loss_implementation={self.trunk.loss_implementation} has no meaning in an "
                "energy transformer, whose predictions are logits; set it to auto or logits"
            )

    @property
    def shift(self) -> int:
        """Position of the first token: the landscape's vector takes 0."""
        return min(self.num_landscapes, 1)

    @property
    def blocks(self) -> TransformerConfig:
        """The trunk as the blocks are built: every kernel Xavier-normal."""
        return dataclasses.replace(self.trunk, kernel_init="xavier")


class Rows(NamedTuple):
    """Where candidates stand: int32 `[B, R]`, the position (counted from 0) and the segment of
    the last token that each may see. Several candidates may stand at one place."""

    positions: jax.Array
    segments: jax.Array


class ObservedCache(NamedTuple):
    """What candidates attend to.

    keys, values: `[num_layers, B, M, K, C]`, or with an axis of landscapes in front; positions,
    segments: int32 `[B, M]`, segment 0 marks an empty slot; length: int32 scalar, the next free
    slot, common to the batch.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array
    length: jax.Array

    @property
    def num_slots(self) -> int:
        """M: how many tokens, the landscape's vector with them, the cache can hold."""
        return self.positions.shape[1]


class StreamBlock(nn.Module):
    """A trunk's sequential block, for either stream."""

    cfg: TransformerConfig

    def setup(self) -> None:
        cfg = self.cfg
        self.attention_norm = Norm(cfg, cfg.embed_dim)
        self.attention = Attention(cfg)
        self.mlp_norm = Norm(cfg, cfg.embed_dim)
        self.mlp = FeedForward(cfg)

    def observe(
        self, x: jax.Array, where: Sight, angles: Rotation, layer: LayerKeys, slot: jax.Array
    ) -> tuple[jax.Array, LayerKeys]:
        """The observed stream `[B, L, D]`; its keys and values are written from `slot` on."""
        query, *new = self.attention.heads(self.attention_norm(x), angles)
        key, value = (write_slots(*each, slot) for each in zip(layer, new, strict=True))
        return self._feed_forward(x, attend(self.cfg, query, key, value, where)), (key, value)

    def judge(self, x: jax.Array, where: Sight, angles: Rotation, layer: LayerKeys) -> jax.Array:
        """The candidate stream `[B, R, D]`, over the keys and values of this layer."""
        query, *own = self.attention.heads(self.attention_norm(x), angles)
        mixed = attend(self.cfg, query, *layer, where, own=(own[0], own[1]))
        return self._feed_forward(x, mixed)

    def _feed_forward(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        x = x + self.attention.output(mixed)
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "sequence", None)


class EnergyTransformer(nn.Module):
    """Tokens and candidate distributions to energies; `observe`, then `judge`."""

    cfg: EnergyTransformerConfig

    def setup(self) -> None:
        cfg = self.cfg.blocks
        table = (cfg.padded_vocab_size, cfg.embed_dim)
        self.embedding = Table(cfg, table, cfg.vocab_size, "vocab", stddev=1.0)
        if self.cfg.candidate_embedding == "own":
            stddev = (2 / (cfg.vocab_size + cfg.embed_dim)) ** 0.5
            self.candidate_embedding = Table(cfg, table, cfg.vocab_size, "vocab", stddev=stddev)
        if self.cfg.num_landscapes:
            count = self.cfg.num_landscapes
            shape = (count, cfg.embed_dim)
            self.landscapes = Table(cfg, shape, count, "table_rows", stddev=1.0)
        self.blocks = StreamBlock(cfg)
        self.final_norm = Norm(cfg, cfg.embed_dim)
        self.energy_head = Projection(
            in_shape=(cfg.embed_dim,),
            out_shape=(1,),
            in_names=("embed",),
            out_names=("norm",),
            use_bias=False,  # a constant would change neither predictions nor gradients
            cfg=cfg,
            output="wide",
        )

    def begin(self, cache: ObservedCache, landscape: jax.Array) -> ObservedCache:
        """Puts the landscape's vector into an empty cache, at position 0, for all documents.

        landscape: int32 scalar. Without landscapes the cache stays empty.
        """
        if not self.cfg.num_landscapes:
            return cache
        vector = self.landscapes().astype(self.cfg.trunk.compute_dtype)[landscape]
        x = jnp.broadcast_to(vector[None, None], (cache.positions.shape[0], 1, vector.shape[0]))
        zeros = jnp.zeros(x.shape[:2], jnp.int32)
        return self._append(x, Rows(zeros, zeros + SHARED_SEGMENT), cache)

    def observe(
        self, tokens: jax.Array, positions: jax.Array, segments: jax.Array, cache: ObservedCache
    ) -> ObservedCache:
        """Appends tokens `[B, L]` to a cache that `begin` has been given."""
        dtype = jnp.dtype(self.cfg.trunk.compute_dtype)
        x = look_up(self.embedding(), tokens, "vocab", dtype=dtype)
        x = constrain(x, "batch", "sequence", None)
        return self._append(x, Rows(positions + self.cfg.shift, segments), cache)

    def judge(self, candidates: jax.Array, rows: Rows, cache: ObservedCache) -> jax.Array:
        """Energies `[B, R]`, float32 or better, of the candidates `[B, R, V]` in their rows."""
        rows = rows._replace(positions=rows.positions + self.cfg.shift)
        # A candidate is rotated like the token that it predicts.
        angles = rotation(rows.positions + 1, self.cfg.blocks)
        own = self.cfg.candidate_embedding == "own"
        table = self.candidate_embedding() if own else self.embedding()
        table = table.astype(self.cfg.trunk.compute_dtype)
        x = constrain(candidates.astype(table.dtype) @ table, "batch", "sequence", None)

        where = sight(self.cfg.trunk, *rows, cache.positions, cache.segments, twice=True)

        def body(block: StreamBlock, x: jax.Array, layer: LayerKeys) -> tuple[jax.Array, None]:
            return block.judge(x, where, angles, layer), None

        x, _ = self._scan(body)(self.blocks, x, (cache.keys, cache.values))
        return self.energy_head(self.final_norm(x))[..., 0]

    def _append(self, x: jax.Array, rows: Rows, cache: ObservedCache) -> ObservedCache:
        angles = rotation(rows.positions, self.cfg.blocks)
        positions = write_slots(cache.positions, rows.positions, cache.length)
        segments = write_slots(cache.segments, rows.segments, cache.length)

        where = sight(self.cfg.trunk, *rows, positions, segments, twice=True)

        def body(block: StreamBlock, x: jax.Array, layer: LayerKeys) -> tuple[jax.Array, LayerKeys]:
            return block.observe(x, where, angles, layer, cache.length)

        _, (keys, values) = self._scan(body)(self.blocks, x, (cache.keys, cache.values))
        return ObservedCache(keys, values, positions, segments, cache.length + x.shape[1])

    def _scan(self, body: Callable[..., Any]) -> Callable[..., Any]:
        cfg = self.cfg.trunk
        if cfg.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        return nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )


def empty_cache(cfg: EnergyTransformerConfig, batch_size: int, length: int) -> ObservedCache:
    """A cache with room for `length` tokens and the landscape's vector.

    Under a mesh the batch is cut over (data, fsdp) and the key heads over tensor.
    """
    trunk, slots = cfg.trunk, (batch_size, length + cfg.shift)
    shape = (trunk.num_layers, *slots, trunk.kv_heads, trunk.head_size)

    def empty() -> jax.Array:
        zeros = jnp.zeros(shape, jnp.dtype(trunk.compute_dtype))
        return constrain(zeros, "layers", "batch", None, "kv_heads", None)

    def unset() -> jax.Array:
        return constrain(jnp.zeros(slots, jnp.int32), "batch", None)

    # Each its own array: the state is donated, and a buffer can be donated only once.
    return ObservedCache(empty(), empty(), unset(), unset(), jnp.zeros((), jnp.int32))


def init_params(cfg: EnergyTransformerConfig, key: jax.Array) -> dict:
    """Parameters of `EnergyTransformer(cfg)`, boxed with logical axis names."""

    def whole(model: EnergyTransformer) -> jax.Array:
        one = jnp.ones((1, 1), jnp.int32)
        cache = model.begin(empty_cache(cfg, 1, 1), jnp.int32(0))
        cache = model.observe(one, one - 1, one, cache)
        candidates = jnp.zeros((1, 1, cfg.trunk.padded_vocab_size))
        return model.judge(candidates, Rows(one - 1, one), cache)

    return dict(EnergyTransformer(cfg).init(key, method=whole)["params"])


_BY_LANDSCAPE: Any = ObservedCache(0, 0, None, None, None)  # pyright: ignore[reportArgumentType]


def observe(
    cfg: EnergyTransformerConfig,
    params: Mapping[str, Any],
    tokens: jax.Array,
    *,
    positions: jax.Array,
    segments: jax.Array,
    cache: ObservedCache | None = None,
) -> ObservedCache:
    """Keys and values of the observed tokens, once for every landscape.

    tokens, positions, segments: int32 `[B, L]`, as `Transformer`'s. cache: what has been observed
    before, to append to; None begins. Returns a cache whose keys and values have a leading axis of
    landscapes, of size 1 where there are none.
    """

    def one(cache: ObservedCache) -> ObservedCache:
        model, seen = EnergyTransformer(cfg), (tokens, positions, segments, cache)
        return cast(ObservedCache, model.apply({"params": params}, *seen, method="observe"))

    if cache is None:
        cache = begin(cfg, params, batch_size=tokens.shape[0], length=tokens.shape[1])
    return jax.vmap(one, in_axes=(_BY_LANDSCAPE,), out_axes=_BY_LANDSCAPE)(cache)


def begin(
    cfg: EnergyTransformerConfig, params: Mapping[str, Any], *, batch_size: int, length: int
) -> ObservedCache:
    """A cache for `length` tokens that holds the landscapes' vectors and no token."""

    def one(landscape: jax.Array) -> ObservedCache:
        cache = empty_cache(cfg, batch_size, length)
        model = EnergyTransformer(cfg)
        return cast(
            ObservedCache, model.apply({"params": params}, cache, landscape, method="begin")
        )

    return jax.vmap(one, out_axes=_BY_LANDSCAPE)(jnp.arange(max(cfg.num_landscapes, 1)))


def landscape_at(cache: ObservedCache, step: jax.Array) -> ObservedCache:
    """The cache of the landscape of a descent step; the last one serves all later steps."""
    index = jnp.minimum(step, cache.keys.shape[0] - 1)
    return cache._replace(keys=cache.keys[index], values=cache.values[index])


def judge(
    cfg: EnergyTransformerConfig,
    params: Mapping[str, Any],
    candidates: jax.Array,
    rows: Rows,
    cache: ObservedCache,
) -> jax.Array:
    """Energies `[B, R]` of candidate distributions `[B, R, V]`; cache: of one landscape."""
    model = EnergyTransformer(cfg)
    energies = model.apply({"params": params}, candidates, rows, cache, method="judge")
    return cast(jax.Array, energies)
