"""Procedural images, their dataset, and what is done to them."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.tasks import corruption, images
from jaxlib_methods.tasks.images import ImageDataset


def dataset(split: Literal["train", "validation"] = "train", **fields: Any) -> ImageDataset:
    return ImageDataset(split, **{"size": 12, "channels": 3, "sequence_length": 9} | fields)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_in_range_varied_and_of_the_right_shape(channels):
    rows = dataset(channels=channels).rows(range(50))
    assert rows.clean.shape == rows.noise.shape == (50, 12, 12, channels)
    assert rows.clean.dtype == rows.noise.dtype == np.float32
    assert np.abs(rows.clean).max() <= 1
    assert rows.clean.std(axis=0).min() > 0.3  # between images, at every pixel
    neighbours = np.abs(np.diff(rows.clean, axis=1))
    assert np.median(neighbours) < 0.1 < 0.5 < neighbours.max()  # smooth, with edges


def test_noise_is_standard_normal_and_seeds_are_not_negative():
    rows = dataset().rows(range(100))
    assert abs(rows.noise.mean()) < 0.02
    assert abs(rows.noise.std() - 1) < 0.02
    assert rows.seed.min() >= 0
    assert len(set(rows.seed.tolist())) == 100


def test_an_image_is_a_function_of_its_index_alone():
    first, again = dataset().rows([3, 7, 5]), dataset().rows(np.array([5, 3]))
    for name in images.Images._fields:
        np.testing.assert_array_equal(getattr(first, name)[[2, 0]], getattr(again, name))


def test_splits_and_seeds_share_no_image():
    seen = [dataset(), dataset("validation"), dataset(seed=1), dataset("validation", seed=1)]
    everything = [image.tobytes() for part in seen for image in part.rows(range(30)).clean]
    assert len(set(everything)) == 120
    assert len({part.fingerprint for part in seen}) == 4
    assert dataset().fingerprint == dataset().fingerprint
    assert dataset(size=16).fingerprint != dataset().fingerprint


def test_behind_the_validation_split_rows_count_nothing():
    rows = dataset("validation", num_validation=5).rows([4, 5, 9])
    assert rows.where.tolist() == [True, False, False]
    assert rows.clean[0].any()
    assert not rows.clean[1:].any()
    assert dataset(num_validation=5).rows([9]).where.all(), "the training split is endless"


def test_noise_levels_by_hand():
    shares = corruption.alpha_bars()
    assert shares.shape == (1000,)
    assert shares[0] == pytest.approx(1 - 1e-4)
    second = 1e-4 + (0.02 - 1e-4) / 999
    assert shares[1] == pytest.approx((1 - 1e-4) * (1 - second))
    clean, noise = jnp.ones((2, 1, 1, 1)), jnp.full((2, 1, 1, 1), 2.0)
    got = corruption.add_noise(clean, noise, jnp.array([1, 99]))
    for value, level in zip(got.ravel(), (1, 99), strict=True):
        a = shares[level]
        assert float(value) == pytest.approx(math.sqrt(a) + 2 * math.sqrt(1 - a), rel=1e-6)


def test_marked_patches():
    seeds = jnp.arange(200)
    marked = corruption.draw_patches(seeds, grid=3, patch_size=2, share=0.5)
    assert marked.shape == (200, 6, 6, 1)
    cells = np.asarray(marked).reshape(200, 3, 2, 3, 2)
    assert (cells == cells[:, :, :1, :, :1]).all(), "patches are marked as a whole"
    cells = cells[:, :, 0, :, 0]
    assert (cells.sum(axis=(1, 2)) == 4).all()  # round(4.5) is even
    assert np.abs(cells.mean(axis=0) - 4 / 9).max() < 0.12  # no place is preferred
    again = corruption.draw_patches(seeds[5:6], grid=3, patch_size=2, share=0.5)
    np.testing.assert_array_equal(again[0], marked[5])
    for share, count in ((0.01, 1), (0.99, 8)):
        few = corruption.draw_patches(seeds[:2], grid=3, patch_size=1, share=share)
        assert few.sum(axis=(1, 2, 3)).tolist() == [count, count]


def test_psnr_by_hand():
    clean = jnp.zeros((2, 2, 2, 1))
    # 0.2 of the range [-1, 1] is 25.5 of 255: an error of 25.5^2, 20 decibels. 5 is clamped to 1.
    prediction = clean.at[0].set(0.2).at[1, 0, 0].set(5.0)
    where = jnp.ones((2, 2, 2, 1), bool)
    error = corruption.squared_error(prediction, clean, where=where)
    np.testing.assert_allclose(error, [25.5**2, 127.5**2 / 4], rtol=1e-6)
    np.testing.assert_allclose(corruption.psnr(error)[0], 20.0, rtol=1e-6)
    without = corruption.squared_error(prediction, clean, where=where.at[1, 0, 0].set(False))
    assert without[1] == 0
    nothing = corruption.squared_error(prediction, clean, where=jnp.zeros_like(where))
    assert not nothing.any()
    assert bool(jnp.isfinite(corruption.psnr(nothing)).all())


def test_keys_are_those_of_the_seeds():
    got = jax.random.key_data(corruption.keys_of(jnp.array([3, 8])))
    np.testing.assert_array_equal(got[1], jax.random.key_data(jax.random.key(8)))
