"""The configuration that every method which restores images shares."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxlib_methods.models.config import TransformerConfig, check_choices
from jaxlib_methods.models.patch_transformer import PatchTransformerConfig
from jaxlib_methods.tasks.corruption import DIFFUSION_STEPS
from jaxlib_methods.tasks.images import ImageDataset

Task = Literal["denoise", "mask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestorationConfig:
    """Which images, cut into which patches, and what is done to them.

    task: `denoise` adds noise to all of an image; `mask` replaces some of its patches by noise.
    image_size: pixels to a side. channels: 3 for colour, 1 for grey. patch_size: pixels to a side.
    noise_level: step of the linear schedule of 1000 steps at which noise is added, from 0; 99 is
        the end of its first tenth. Of the task `denoise`.
    mask_share: share of the patches that the task `mask` replaces.
    data_seed: another number is another set of images.
    """

    task: Task = "denoise"
    image_size: int = 32
    channels: Literal[1, 3] = 3
    patch_size: int = 4
    noise_level: int = 99
    mask_share: float = 0.5
    data_seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        require(
            0 <= self.noise_level < DIFFUSION_STEPS,
            f"noise_level={self.noise_level} must be between 0 and {DIFFUSION_STEPS - 1}",
        )
        require(0 < self.mask_share < 1, f"mask_share={self.mask_share} must be between 0 and 1")
        require(self.data_seed >= 0, f"data_seed={self.data_seed} must not be negative")
        _ = self.patch_config(TransformerConfig(), "energy")  # image_size and patch_size

    def patch_config(
        self, model: TransformerConfig, head: Literal["energy", "image"]
    ) -> PatchTransformerConfig:
        """The architecture: depth and widths of a run's model, over this image's patches."""
        sizes = {n: getattr(self, n) for n in ("image_size", "channels", "patch_size")}
        return PatchTransformerConfig.of(model, head=head, **sizes)

    def dataset(self) -> Callable[[Literal["train", "validation"]], ImageDataset]:
        """The images of a split, as `Method.dataset` wants it."""
        grid = self.image_size // self.patch_size

        def open_split(split: Literal["train", "validation"]) -> ImageDataset:
            fields: dict[str, Any] = {"size": self.image_size, "channels": self.channels}
            return ImageDataset(split, seed=self.data_seed, sequence_length=grid * grid, **fields)

        return open_split


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message where the condition does not hold."""
    if not condition:
        raise ValueError(message)
