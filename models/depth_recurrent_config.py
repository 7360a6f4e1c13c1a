"""What a depth-recurrent transformer is made of; `depth_recurrent` is the model itself."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jaxlib_methods.models.config import TransformerConfig, check_choices

# What a run may say about the block; every other field of its model has to be the default.
TRUNK_FIELDS = ("embed_dim", "num_heads", "mlp_dim", "norm_eps", "rope_theta")
TRUNK_FIELDS += ("compute_dtype", "param_dtype", "remat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthRecurrentConfig:
    """A depth-recurrent transformer.

    trunk: widths, heads, activation, norms, dtypes and remat (of a step) of the block.
    vocab_size: tokens of the task, with padding, which is token 0.
    max_steps: rows of the depth embedding; no call takes more steps.
    readout: `endpoints`, the states of two tokens per example; `first`, that of token 0.
    roles: the two endpoints get a learned vector each.
    weights: `tied`, one block for all steps; `untied`, a block (and gate) of its own for each.
    gate, gate_bias: the update gate and its bias in a new model.
    layer_scale: the scale of both sub-layers in a new model; None leaves it out.
    depth_embedding: a learned vector per step, with deviation 1 or 0.02 in a new model.
    norm_placement: norms in front of the sub-layers, or behind their residual sums.
    dropout: share dropped of the embedding, of each sub-layer's output and in the readout.
    """

    trunk: TransformerConfig
    vocab_size: int
    max_steps: int = 20
    positions: Literal["none", "rotary"] = "none"
    readout: Literal["endpoints", "first"] = "endpoints"
    roles: bool = False
    weights: Literal["tied", "untied"] = "tied"
    gate: bool = True
    gate_bias: float = -2.0
    layer_scale: float | None = None
    depth_embedding: Literal["normal", "small", "none"] = "normal"
    norm_placement: Literal["pre", "post"] = "pre"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_choices(self)
        if self.vocab_size < 2:
            raise ValueError(
                f"vocab_size {self.vocab_size} must be at least 2: padding and a token"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps {self.max_steps} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")
        if self.trunk.parallel_residual:
            raise ValueError("parallel_residual has no meaning in a recurrent block; leave it out")
        if self.positions == "rotary" and (self.trunk.rotary_dim < 2 or self.trunk.rotary_dim % 2):
            raise ValueError(
                f"positions 'rotary' need heads of an even size, not {self.trunk.head_size}; "
                "change num_heads or embed_dim"
            )

    @classmethod
    def of(
        cls, model: TransformerConfig, *, activation: Literal["relu", "gelu"], **fields: Any
    ) -> "DepthRecurrentConfig":
        """The sizes of a run's model in the paper's block: LayerNorm and biases everywhere.

        Raises ValueError where the run's model asks for what this block does not have.
        """
        plain = TransformerConfig()
        ignored = ("vocab_size", "max_length")  # the task's
        for name in (field.name for field in dataclasses.fields(model)):
            value = getattr(model, name)
            if name not in TRUNK_FIELDS + ignored and value != getattr(plain, name):
                raise ValueError(
                    f"model.{name}={value} has no meaning in a depth-recurrent transformer; "
                    "leave it out"
                )
        sizes: dict[str, Any] = {name: getattr(model, name) for name in TRUNK_FIELDS}
        sizes["mlp_dim"] = model.mlp_dim or 4 * model.embed_dim
        trunk = TransformerConfig(
            num_layers=1,
            norm="layer_norm",
            mlp=activation,
            positions="learned",  # rotation, where there is one, is this model's own choice
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            **sizes,
        )
        return cls(trunk=trunk, **fields)

    @property
    def wide(self) -> jnp.dtype:
        """The state's dtype: float32 or better, so that small updates are not rounded away."""
        return jnp.promote_types(self.trunk.compute_dtype, jnp.float32)
