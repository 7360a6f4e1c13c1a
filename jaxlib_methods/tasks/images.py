"""Procedural images: coloured shapes and gratings on gradients, a pure function of an index."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

SPLITS = ("train", "validation")
VERSION = 1  # of the drawing: another number where the same index gives another image


class Images(NamedTuple):
    """A batch of images with all that is random about a task, so that a loss draws nothing.

    clean: float32 `[R, S, S, C]` in [-1, 1]. noise: float32 `[R, S, S, C]`, standard normal.
    seed: int32 `[R]`, not negative, for whatever else a task draws for an image. where: bool
    `[R]`, False behind the end of the validation split.
    """

    clean: np.ndarray
    noise: np.ndarray
    seed: np.ndarray
    where: np.ndarray


def random_of(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one image; no two of (seed, split, index) share them."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def draw_image(random: np.random.Generator, *, size: int, channels: int) -> np.ndarray:
    """One image, float32 `[size, size, channels]` in [-1, 1].

    Two to five discs, rotated rectangles and gratings of random colour, each in front of the one
    before, on a gradient between two colours. Edges are one pixel wide: a pixel near one says
    little without the shape that the edge belongs to.
    """
    x, y = _grid(size)
    image = _grating(random, x, y, channels, turns=(0.2, 0.5))
    for _ in range(random.integers(2, 6)):
        inside = _shape(random, x, y)[..., None]
        color = random.uniform(-1, 1, channels)
        if random.random() < 0.5:
            color = _grating(random, x, y, channels, turns=(1.0, 4.0))
        image = inside * color + (1 - inside) * image
    return image.astype(np.float32)


@functools.cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres between -1 and 1, each `[size, size]`: column, row."""
    ticks = (np.arange(size) + 0.5) * 2 / size - 1
    row, column = np.meshgrid(ticks, ticks, indexing="ij")
    return column, row


def _grating(
    random: np.random.Generator,
    x: np.ndarray,
    y: np.ndarray,
    channels: int,
    *,
    turns: tuple[float, float],
) -> np.ndarray:
    """A wave between two colours, `turns` periods to the image's side: a slow one is a gradient."""
    angle, phase = random.uniform(0, 2 * np.pi, 2)
    first, second = random.uniform(-1, 1, (2, channels))
    along = np.cos(angle) * x + np.sin(angle) * y
    wave = 0.5 + 0.5 * np.sin(np.pi * random.uniform(*turns) * along + phase)
    return first + (second - first) * wave[..., None]


def _shape(random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of each pixel that a disc or a rotated rectangle covers, `[size, size]`."""
    (dx, dy), angle = random.uniform(-0.8, 0.8, 2), random.uniform(0, np.pi)
    x, y = x - dx, y - dy
    if random.random() < 0.5:
        outside = np.hypot(x, y) - random.uniform(0.2, 0.7)
    else:
        u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        width, height = random.uniform(0.15, 0.7, 2)
        outside = np.maximum(np.abs(u) - width, np.abs(v) - height)
    return np.clip(0.5 - outside * len(x) / 2, 0.0, 1.0)


class ImageDataset:
    """The images of a split by index, as a `jaxlib_methods.method.Dataset`.

    Nothing is stored: the training split never repeats itself, and the noise of an image belongs
    to its index, so that every evaluation sees the same.
    """

    bytes_per_token: float | None = None

    def __init__(
        self,
        split: Literal["train", "validation"],
        *,
        size: int,
        channels: int,
        sequence_length: int,
        seed: int = 0,
        num_validation: int = 1024,
    ) -> None:
        """sequence_length: patches of an image. num_validation: images of that split."""
        self._split, self._seed = split, seed
        self._shape = (size, size, channels)
        self.sequence_length = sequence_length
        self.num_examples = num_validation if split == "validation" else 2**31
        parts = ("images", VERSION, split, self._shape, seed, self.num_examples)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def rows(self, indices: Sequence[int] | np.ndarray) -> Images:
        """The images at `indices`; behind the end of the validation split `where` is False."""
        shape = (len(indices), *self._shape)
        clean, noise = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        seed, where = np.zeros(shape[0], np.int32), np.zeros(shape[0], bool)
        for row, index in enumerate(indices):
            if index < self.num_examples:
                random = random_of(self._seed, self._split, int(index))
                clean[row] = draw_image(random, size=shape[1], channels=shape[3])
                noise[row] = random.standard_normal(self._shape, np.float32)
                seed[row], where[row] = random.integers(2**31), True
        return Images(clean, noise, seed, where)
