"""The transformer over patches: pieces by hand, what a new model gives, and what sees what."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.models import partitioning
from jaxlib_methods.models import patch_transformer as pt
from jaxlib_methods.models.config import TransformerConfig

B, S, C, P = 3, 6, 3, 2
ENERGY = pt.PatchTransformerConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, image_size=S, channels=C, patch_size=P
)
IMAGE = dataclasses.replace(ENERGY, head="image")
LEVELS = jnp.array([0, 7, 99])
forward = jax.jit(pt.forward, static_argnums=0)


def images(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, S, S, C))


@functools.cache
def new_params(cfg: pt.PatchTransformerConfig) -> dict:
    return jax.jit(lambda: _new_params(cfg))()


def _new_params(cfg: pt.PatchTransformerConfig) -> dict:
    return partitioning.unbox(pt.init_params(cfg, jax.random.key(0)))


def moved_params(cfg: pt.PatchTransformerConfig, seed: int = 1) -> dict:
    """Parameters of which none is zero."""
    leaves, treedef = jax.tree.flatten(new_params(cfg))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return treedef.unflatten(moved)


def test_patches_by_hand_and_back():
    picture = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    patches = pt.patchify(jnp.asarray(picture), 2)
    assert patches.shape == (2, 4, 12)
    np.testing.assert_array_equal(patches[1, 2], picture[1, 2:4, 0:2].reshape(-1))
    np.testing.assert_array_equal(pt.unpatchify(patches, 2), picture)


def test_positions_by_hand():
    table = pt.position_table(3, 8)
    row, column = 2, 1
    slow = 10_000.0**-0.5
    expected = [
        math.sin(row), math.sin(row * slow), math.cos(row), math.cos(row * slow),
        math.sin(column), math.sin(column * slow), math.cos(column), math.cos(column * slow),
    ]  # fmt: skip
    np.testing.assert_allclose(table[row * 3 + column], expected, rtol=1e-12)


def test_level_features_by_hand():
    got = pt.level_features(jnp.array([3]), 4)
    slow = 3 * 10_000.0**-0.5
    expected = [[math.cos(3), math.cos(slow), math.sin(3), math.sin(slow)]]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_modulation_by_hand():
    # (1, 3) has mean 2 and deviation 1: normed (-1, 1).
    x, shift, scale = jnp.array([[[1.0, 3.0]]]), jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(pt.modulate(x, shift, scale), [[[-1.5, 1.5]]], rtol=1e-5)


def test_a_new_model_gives_zero_and_its_energy_has_no_slope():
    params = new_params(ENERGY)
    assert not forward(ENERGY, params, images()).any()
    slope = jax.jit(jax.grad(lambda x: pt.forward(ENERGY, params, x).sum()))(images())
    assert not slope.any()
    noise = forward(IMAGE, new_params(IMAGE), images(), LEVELS)
    assert noise.shape == (B, S, S, C)
    assert not noise.any()


def test_a_new_block_is_the_identity():
    block = pt.PatchBlock(ENERGY.trunk)
    x, condition = jax.random.normal(jax.random.key(0), (B, 9, 16)), jnp.ones((1, 16))
    params = partitioning.unbox(block.init(jax.random.key(1), x, condition))
    np.testing.assert_array_equal(block.apply(params, x, condition), x)


def test_an_image_has_one_energy_of_its_own_and_sees_all_of_itself():
    params, x = moved_params(ENERGY), images()
    energies = forward(ENERGY, params, x)
    assert energies.shape == (B,)
    other = forward(ENERGY, params, x.at[1, 5, 5, 2].add(1.0))
    assert other[1] != energies[1]
    np.testing.assert_allclose(other[jnp.array([0, 2])], energies[jnp.array([0, 2])], rtol=1e-6)


def test_every_pixel_of_the_prediction_depends_on_every_pixel_and_on_the_level():
    params, x = moved_params(IMAGE), images()
    before = forward(IMAGE, params, x, LEVELS)
    after = forward(IMAGE, params, x.at[:, 0, 0, 0].add(1.0), LEVELS)
    assert bool((before != after).all())
    level = forward(IMAGE, params, x, LEVELS.at[2].set(98))
    np.testing.assert_allclose(level[:2], before[:2], rtol=1e-5, atol=1e-6)
    assert bool((level[2] != before[2]).all())


def test_patches_know_their_place():
    params, x = moved_params(ENERGY), images()
    swapped = x.at[:, :2, :2].set(x[:, 4:, 4:]).at[:, 4:, 4:].set(x[:, :2, :2])
    moved = forward(ENERGY, params, swapped) - forward(ENERGY, params, x)
    assert float(jnp.abs(moved).min()) > 1e-4


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_number(remat):
    cfg, params = dataclasses.replace(ENERGY, remat=remat), moved_params(ENERGY)

    def slope(cfg):
        return jax.jit(jax.grad(lambda x: pt.forward(cfg, params, x).sum()))(images())

    np.testing.assert_allclose(slope(cfg), slope(ENERGY), rtol=1e-5, atol=1e-7)


def test_half_precision_sums_the_energy_in_float32():
    cfg = dataclasses.replace(ENERGY, compute_dtype="bfloat16")
    got = forward(cfg, moved_params(ENERGY), images())
    assert got.dtype == jnp.float32
    expected = forward(ENERGY, moved_params(ENERGY), images())
    np.testing.assert_allclose(got, expected, rtol=0.1, atol=0.05)


def test_the_head_decides_whether_there_are_levels():
    for cfg, levels in ((ENERGY, LEVELS), (IMAGE, None)):
        with pytest.raises(ValueError, match="levels belong to the head 'image'"):
            forward(cfg, new_params(cfg), images(), levels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 4}, "image_size 6 is not a multiple of patch_size 4"),
        ({"patch_size": 0}, "patch_size 0 must be at least 1"),
        ({"embed_dim": 18}, "embed_dim 18 must be a multiple of 4"),
        ({"num_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
        ({"head": "logits"}, "head 'logits' is unknown"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ENERGY, **fields)


def test_the_patch_embedding_is_drawn_as_published():
    wide = dataclasses.replace(ENERGY, embed_dim=64)
    kernel = new_params(wide)["patches"]["kernel"]
    bound = math.sqrt(6 / (P * P * C + 64))  # Xavier-uniform
    assert 0.97 * bound < float(jnp.abs(kernel).max()) <= bound
    np.testing.assert_allclose(jnp.std(kernel), bound / math.sqrt(3), rtol=0.06)


@pytest.mark.parametrize(
    "change", [{"qkv_bias": True}, {"rope_theta": 5.0}, {"loss_implementation": "logits"}]
)
def test_what_images_do_not_read_is_refused(change):
    model = dataclasses.replace(TransformerConfig(vocab_size=300, max_length=9), **change)
    with pytest.raises(
        ValueError, match=f"model.{next(iter(change))}=.* has no meaning in a patch"
    ):
        pt.PatchTransformerConfig.of(model)


def test_sizes_of_a_run():
    model = TransformerConfig(num_layers=3, embed_dim=32, num_heads=8, remat="full")
    cfg = pt.PatchTransformerConfig.of(model, image_size=8, channels=1, patch_size=2)
    assert (cfg.num_layers, cfg.embed_dim, cfg.num_heads, cfg.remat) == (3, 32, 8, "full")
    assert cfg.trunk.mlp_size == 128
    assert (cfg.num_patches, cfg.patch_values) == (16, 4)
