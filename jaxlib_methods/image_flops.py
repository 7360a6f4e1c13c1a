"""Floating-point operations of the image methods, per patch, analytic.

A multiply and an add count as two. Checked against `flops.count_dot_flops` without remat.
"""

from jaxlib_methods.descent import Memory
from jaxlib_methods.models.patch_transformer import LEVEL_FEATURES, PatchTransformerConfig


def forward_flops(cfg: PatchTransformerConfig) -> tuple[float, float]:
    """(matmuls with weights, matmuls of attention) of a forward pass, FLOPs per patch.

        2 * (layers * (4 D^2 + 2 D F) + P D + D out),   4 * layers * D * patches

    P: pixel values of a patch; out: 1 for an energy, P for an image. The modulations of the head
    `image`, once an image, are shared out over its patches; those of an energy are computed once
    a batch and left out.
    """
    width, patches = cfg.embed_dim, cfg.num_patches
    hidden = cfg.trunk.mlp_size
    out = 1 if cfg.head == "energy" else cfg.patch_values
    weights = cfg.num_layers * (4 * width**2 + 2 * width * hidden) + width * cfg.patch_values
    weights += width * out
    if cfg.head == "image":
        modulations = (6 * cfg.num_layers + 2) * width**2
        weights += (modulations + LEVEL_FEATURES * width + width**2) / patches
    return 2.0 * weights, 4.0 * cfg.num_layers * width * patches


def energy_train_flops(cfg: PatchTransformerConfig, *, num_steps: int, memory: Memory) -> float:
    """One training step through `num_steps` descent steps, FLOPs per patch.

    With W and A of `forward_flops`, a descent step is a forward and the backward to the image,
    and its own backward pass costs as much twice:

        (2 W + 3 A) + (4 W + 6 A)

    `memory="recompute"` evaluates the energy and its gradient again for it, but for the weights'
    own products: 2 W + 3 A more.
    """
    weights, attention = forward_flops(cfg)
    step = 6 * weights + 9 * attention
    if memory == "recompute":
        step += 2 * weights + 3 * attention
    return num_steps * step


def diffusion_train_flops(cfg: PatchTransformerConfig) -> float:
    """One training step of a noise predictor, FLOPs per patch.

    Three times the forward, without the gradients of its two inputs, pixels and level.
    """
    inputs = cfg.patch_values * cfg.embed_dim + LEVEL_FEATURES * cfg.embed_dim / cfg.num_patches
    return 3 * sum(forward_flops(cfg)) - 2.0 * inputs
