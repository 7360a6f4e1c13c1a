"""A diffusion transformer that predicts the noise: the baseline of `energy_image`.

Trained on the noise levels 0 to `noise_level` of the linear schedule, as the diffusion transformer
that EBT's paper compares with. It restores an image of level t by K deterministic steps (DDIM,
Song et al. 2020) over the levels t = t_1 > .. > t_K:

    x' = (x - sqrt(1 - a_t) eps(x, t)) / sqrt(a_t)      the clean image as seen from here
    x  = sqrt(a_s) x' + sqrt(1 - a_s) eps(x, t)         at the next level s; after the last, x'

Patches that are replaced by noise have no level in between: there the same transformer predicts
the missing pixels themselves, in one pass.
"""

# Dimension key: R images, S image side, C channels.

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import image_flops, losses
from jaxlib_methods.energy_image import quality, spoil
from jaxlib_methods.method import Context, LossFn, Method, Metrics
from jaxlib_methods.models import patch_transformer
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.patch_transformer import PatchTransformerConfig
from jaxlib_methods.tasks import corruption
from jaxlib_methods.tasks.restoration import RestorationConfig, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionImageConfig(RestorationConfig):
    """Which images, how noisy they may be, and in how many steps they are restored.

    task: `denoise` predicts the noise; `mask` predicts the patches that noise has replaced.
    image_size: pixels to a side. channels: 3 for colour, 1 for grey. patch_size: pixels to a side.
    noise_level: the highest level of training, and the one that validation restores from. Of the
        task `denoise`.
    mask_share: share of the patches that the task `mask` replaces.
    data_seed: another number is another set of images.
    num_denoise_steps: K, of validation in the task `denoise`. 1 minimises the squared
        error; more give sharper images.
    """

    num_denoise_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.num_denoise_steps <= self.noise_level + 1,
            f"num_denoise_steps={self.num_denoise_steps} must be between 1 and the "
            f"{self.noise_level + 1} noise levels",
        )


def init_params(model: TransformerConfig, cfg: DiffusionImageConfig, key: jax.Array) -> dict:
    """The parameters of the model, boxed."""
    return patch_transformer.init_params(cfg.patch_config(model, "image"), key)


def restore(
    model: PatchTransformerConfig,
    params: Any,
    noisy: jax.Array,
    *,
    noise_level: int,
    num_steps: int,
) -> jax.Array:
    """Restores images of one level in `num_steps` forward passes.

    noisy: `[R, S, S, C]`. Returns the clean image as seen after each pass, `[K, R, S, S, C]`.
    """
    levels = np.linspace(noise_level, 0, num_steps + 1)[:-1].round().astype(np.int32)
    kept, added = corruption.scales(levels, noisy.dtype)
    # Behind the last level there is no noise.
    next_kept, next_added = jnp.append(kept[1:], 1.0), jnp.append(added[1:], 0.0)

    def body(x: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        level, kept, added, next_kept, next_added = at
        noise = patch_transformer.forward(model, params, x, jnp.full(x.shape[0], level))
        clean = (x - added * noise) / kept
        return next_kept * clean + next_added * noise, clean

    steps = (jnp.asarray(levels), kept, added, next_kept, next_added)
    return jax.lax.scan(body, noisy, steps)[1]


def make_loss(cfg: DiffusionImageConfig, model: PatchTransformerConfig) -> LossFn:
    """Mean squared error of the predicted noise, at a level drawn for each image from its seed.

    Metrics: `noise_loss`, what is minimised, and those of `quality` for the clean image as seen
    from the drawn level in one pass, which is an easier task than validation's.
    """

    def loss(
        params: Any, extra: Any, batch: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step, key
        clean, noise = jnp.asarray(batch.clean), jnp.asarray(batch.noise)
        keys = corruption.keys_of(jnp.asarray(batch.seed))
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, cfg.noise_level + 1))
        levels = draw(keys)
        noisy = corruption.add_noise(clean, noise, levels)
        found = patch_transformer.forward(model, params, noisy, levels)
        judged = jnp.broadcast_to(jnp.asarray(batch.where)[:, None, None, None], clean.shape)
        error = losses.masked_sum(jnp.square(found - noise), where=judged)
        kept, added = (s[:, None, None, None] for s in corruption.scales(levels, clean.dtype))
        result = (noisy - added * found) / kept
        metrics = quality(jax.lax.stop_gradient(result), noisy, clean, judged=judged)
        return losses.mean(*error), metrics | {"noise_loss": error}

    return loss


def make_regression(cfg: DiffusionImageConfig, model: PatchTransformerConfig) -> LossFn:
    """Mean squared error of the pixels of the replaced patches; the metrics of `quality`."""

    def loss(
        params: Any, extra: Any, batch: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step, key
        start, judged = spoil(cfg, batch)
        clean = jnp.asarray(batch.clean)
        levels = jnp.full(clean.shape[0], corruption.DIFFUSION_STEPS - 1)
        found = patch_transformer.forward(model, params, start, levels)
        error = losses.masked_sum(jnp.square(found - clean), where=judged)
        result = jax.lax.stop_gradient(jnp.where(judged, found, start))
        return losses.mean(*error), quality(result, start, clean, judged=judged)

    return loss


def make_evaluation(cfg: DiffusionImageConfig, model: PatchTransformerConfig) -> LossFn:
    """The metrics of `quality` after restoring from `noise_level`, as `energy_image` does."""

    def evaluate(
        params: Any, extra: Any, batch: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step, key
        noisy, judged = spoil(cfg, batch)
        steps: dict[str, int] = {
            "noise_level": cfg.noise_level,
            "num_steps": cfg.num_denoise_steps,
        }
        result = restore(model, params, noisy, **steps)[-1]
        metrics = quality(result, noisy, jnp.asarray(batch.clean), judged=judged)
        return losses.mean(*metrics["loss"]), metrics

    return evaluate


def make(cfg: DiffusionImageConfig, context: Context) -> Method:
    """The diffusion transformer as a `Method`."""
    model = cfg.patch_config(context.model, "image")

    def init(key: jax.Array) -> dict:
        return init_params(context.model, cfg, key)

    masked = cfg.task == "mask"
    return Method(
        init_params=init,
        init=lambda key: (),
        loss=make_regression(cfg, model) if masked else make_loss(cfg, model),
        flops_per_token=image_flops.diffusion_train_flops(model),
        evaluate=None if masked else make_evaluation(cfg, model),
        dataset=cfg.dataset(),
        length_flag="(diffusion_image.image_size / patch_size)^2",
    )
