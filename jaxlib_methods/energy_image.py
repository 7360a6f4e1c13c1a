"""Energy-based transformer for images (EBT, arXiv 2507.02092): restore by descending an energy.

The energy of an image is one scalar. A spoiled image y_0 is restored by

    y_(k+1) = y_k - alpha * grad_y E(y_k),   k = 0 .. N - 1

and the loss compares y_N with the clean image; its gradient goes through the descent. A new model
has the energy zero everywhere: it leaves every image as it is.
"""

# Dimension key: R images, S image side, C channels.

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlib_methods import descent, image_flops, losses
from jaxlib_methods.energy_config import SMALLEST_STEP
from jaxlib_methods.method import Context, LossFn, Method, Metrics
from jaxlib_methods.models import patch_transformer
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.patch_transformer import PatchTransformerConfig
from jaxlib_methods.tasks import corruption
from jaxlib_methods.tasks.images import Images
from jaxlib_methods.tasks.restoration import RestorationConfig, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyImageConfig(RestorationConfig):
    """Which images, what is done to them, and how the energy is descended.

    task: `denoise` starts from the image with noise added everywhere; `mask` starts with noise in
        place of a share of the patches, the others stay as they are and count nothing.
    image_size: pixels to a side. channels: 3 for colour, 1 for grey. patch_size: pixels to a side.
    noise_level: step of the linear schedule of 1000 steps at which noise is added, from 0; 99 is
        the end of its first tenth (the paper's sigma of 0.1). Of the task `denoise`.
    mask_share: share of the patches that the task `mask` replaces.
    data_seed: another number is another set of images.
    num_descent_steps: N. The paper trains image models with 1.
    step_size: alpha, of energies that are means over patches; where it is learned, its start. The
        paper's is 3000, for images of 128 x 128.
    learn_step_size: train alpha too; below 0.0001 it counts as 0.0001.
    step_size_rate: factor on alpha's learning rate; none is 3 * step_size.
    loss_steps: which y_k are compared with the clean image, `last` or the mean of `all`.
    memory: of a descent step; `recompute` evaluates the energy once more in the backward pass,
        `save` keeps what it needs instead.
    """

    num_descent_steps: int = 1
    step_size: float = 300.0
    learn_step_size: bool = True
    step_size_rate: float | None = None
    loss_steps: Literal["last", "all"] = "last"
    memory: descent.Memory = "recompute"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_descent_steps >= 1,
            f"num_descent_steps={self.num_descent_steps} must be at least 1",
        )
        require(
            self.step_size >= SMALLEST_STEP,
            f"step_size={self.step_size} must be at least {SMALLEST_STEP}",
        )
        require(
            self.step_size_rate is None or self.step_size_rate >= 0,
            f"step_size_rate={self.step_size_rate} must not be negative",
        )

    @property
    def rate_factor(self) -> float:
        """Factor on the learning rate of alpha; Adam moves by the rate, whatever alpha's size."""
        return 3 * self.step_size if self.step_size_rate is None else self.step_size_rate


def init_params(model: TransformerConfig, cfg: EnergyImageConfig, key: jax.Array) -> dict:
    """The energy's parameters, boxed, and the learned step size as `step_size`."""
    params = patch_transformer.init_params(cfg.patch_config(model, "energy"), key)
    if cfg.learn_step_size:
        params["step_size"] = {"alpha": jnp.float32(cfg.step_size)}
    return params


def step_size(cfg: EnergyImageConfig, params: Any) -> jax.Array:
    """The step size in force, scalar."""
    if not cfg.learn_step_size:
        return jnp.float32(cfg.step_size)
    return jnp.maximum(params["step_size"]["alpha"], SMALLEST_STEP)


def spoil(cfg: RestorationConfig, batch: Images) -> tuple[jax.Array, jax.Array]:
    """Where the descent begins and which values it is judged by.

    Returns y_0 `[R, S, S, C]` and bool of its shape: False where nothing is to be restored.
    """
    clean, noise = jnp.asarray(batch.clean), jnp.asarray(batch.noise)
    judged = jnp.broadcast_to(jnp.asarray(batch.where)[:, None, None, None], clean.shape)
    if cfg.task == "denoise":
        levels = jnp.full(clean.shape[0], cfg.noise_level)
        return corruption.add_noise(clean, noise, levels), judged
    marked = corruption.draw_patches(
        jnp.asarray(batch.seed),
        grid=cfg.image_size // cfg.patch_size,
        patch_size=cfg.patch_size,
        share=cfg.mask_share,
    )
    return jnp.where(marked, noise, clean), judged & marked


@functools.cache
def energy_of(cfg: PatchTransformerConfig) -> descent.Energy:
    """`energy(params, context, images) -> [R]`, for `descent`; context: `free` and `start`.

    free: bool `[R, S, S, C]`, the values that may move; the others are those of start.
    """

    def energy(params: Any, context: Any, images: jax.Array) -> jax.Array:
        held = jnp.where(context["free"], images, context["start"])
        return patch_transformer.forward(cfg, params, held)

    return energy


def restore(
    cfg: EnergyImageConfig,
    model: PatchTransformerConfig,
    params: Any,
    start: jax.Array,
    free: jax.Array,
    *,
    num_steps: int | None = None,
) -> descent.Trajectory:
    """Descends from `start`, `[R, S, S, C]`, moving the values that are `free` (bool).

    num_steps: None takes the configuration's.
    """
    context = {"free": free, "start": jax.lax.stop_gradient(start)}
    return descent.descend(
        energy_of(model),
        {name: leaves for name, leaves in params.items() if name != "step_size"},
        context,
        start,
        step_size=step_size(cfg, params),
        num_steps=cfg.num_descent_steps if num_steps is None else num_steps,
        memory=cfg.memory,
    )


def quality(result: jax.Array, start: jax.Array, clean: jax.Array, *, judged: jax.Array) -> Metrics:
    """`loss`, smooth L1 per judged value; `psnr` and `noisy_psnr` in decibels, per image."""
    loss = losses.masked_sum(losses.smooth_l1(result, clean, where=judged), where=judged)
    images = judged.any(axis=(1, 2, 3))
    found = {"loss": loss}
    for name, image in (("psnr", result), ("noisy_psnr", start)):
        decibels = corruption.psnr(corruption.squared_error(image, clean, where=judged))
        found[name] = losses.masked_sum(decibels, where=images)
    return found


def make_loss(
    cfg: EnergyImageConfig, model: PatchTransformerConfig, *, last_energy: bool = False
) -> LossFn:
    """Smooth L1 after the descent. It draws nothing: what is random belongs to the batch.

    Metrics: those of `quality`, `energy_first` (mean over images, before the first step) and, with
    `last_energy`, `energy_last` (after the last one; costs a forward pass), `step_size`.
    """

    def loss(
        params: Any, extra: Any, batch: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step, key
        start, judged = spoil(cfg, batch)
        images = jnp.asarray(batch.where)
        # Padding moves too, towards nothing: what it becomes is deleted below.
        free = judged | ~images[:, None, None, None]
        path = restore(cfg, model, params, start, free)
        clean, result = jnp.asarray(batch.clean), path.candidates[-1]
        metrics = quality(result, start, clean, judged=judged)
        scalar = losses.mean(*metrics["loss"])
        if cfg.loss_steps == "all":
            errors = [losses.smooth_l1(y, clean, where=judged).sum() for y in path.candidates]
            scalar = sum(errors) / len(errors) / jnp.maximum(metrics["loss"][1], 1)
        stop = jax.lax.stop_gradient
        metrics["energy_first"] = losses.masked_sum(stop(path.energies[0]), where=images)
        if last_energy:
            weights = {name: leaves for name, leaves in params.items() if name != "step_size"}
            last = energy_of(model)(weights, {"free": free, "start": start}, result)
            metrics["energy_last"] = losses.masked_sum(last, where=images)
        metrics["step_size"] = (stop(step_size(cfg, params)), jnp.ones(()))
        return jnp.asarray(scalar), metrics

    return loss


def make(cfg: EnergyImageConfig, context: Context) -> Method:
    """The image model of EBT as a `Method`."""
    model = cfg.patch_config(context.model, "energy")
    return Method(
        init_params=functools.partial(init_params, context.model, cfg),
        init=lambda key: (),
        loss=make_loss(cfg, model),
        flops_per_token=image_flops.energy_train_flops(
            model, num_steps=cfg.num_descent_steps, memory=cfg.memory
        ),
        evaluate=make_loss(cfg, model, last_energy=True),
        rate_factors={"step_size": cfg.rate_factor} if cfg.learn_step_size else {},
        dataset=cfg.dataset(),
        length_flag="(energy_image.image_size / patch_size)^2",
    )
