"""Restores images with a run of `energy_image` or `diffusion_image`: a table and a picture.

Error against forward passes, at the level of noise that the run was trained on and at one twice
as high: more passes are more descent steps of an energy, or more steps of a diffusion. The
baseline that `--compare` has trained beside the run is measured with it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxlib_methods import diffusion_image, energy_image
from jaxlib_methods.energy_image import EnergyImageConfig
from jaxlib_methods.infer import restore
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.tasks import corruption
from jaxlib_methods.tasks.images import Images
from jaxlib_methods.tasks.restoration import RestorationConfig
from jaxlib_methods.train import run_record

PASSES = (1, 2, 3, 5, 10)
NUM_IMAGES = 128
NUM_DRAWN = 6


class Quality(NamedTuple):
    """Mean over images after some forward passes; 0 passes is the noisy image itself.

    mse: in steps of 0 to 255, clamped. psnr: in decibels, the mean over images.
    """

    model: str
    noise_level: int
    passes: int
    mse: float
    psnr: float


def noise_levels(cfg: RestorationConfig) -> tuple[int, int]:
    """The level of training, and the one after twice as many steps: 99 and 199."""
    twice = 2 * cfg.noise_level + 1
    return cfg.noise_level, min(twice, corruption.DIFFUSION_STEPS - 1)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("noise_level", "num_steps"))
def candidates(
    model: Any, cfg: Any, params: Any, noisy: jax.Array, *, noise_level: int, num_steps: int
) -> jax.Array:
    """What a model has made of noisy images `[R, S, S, C]` after each pass, `[K, R, S, S, C]`.

    model, cfg: the run's `TransformerConfig` and `EnergyImageConfig` or `DiffusionImageConfig`.
    num_steps: K. A descent goes on from step to step; a diffusion of K steps is another one for
    each K, and only its last image is its result.
    """
    if isinstance(cfg, EnergyImageConfig):
        shape = cfg.patch_config(model, "energy")
        free = jnp.ones(noisy.shape, bool)
        path = energy_image.restore(cfg, shape, params, noisy, free, num_steps=num_steps)
        return path.candidates
    shape = cfg.patch_config(model, "image")
    return diffusion_image.restore(
        shape, params, noisy, noise_level=noise_level, num_steps=num_steps
    )


def after_passes(
    restored: Restored, noisy: jax.Array, *, noise_level: int, passes: Sequence[int] = PASSES
) -> dict[int, jax.Array]:
    """Number of forward passes -> images `[R, S, S, C]`."""
    assert restored.config is not None
    cfg = restored.config.method_config
    run = functools.partial(
        candidates, restored.model, cfg, restored.params, noisy, noise_level=noise_level
    )
    if isinstance(cfg, EnergyImageConfig):
        path = run(num_steps=max(passes))
        return {count: path[count - 1] for count in passes}
    possible = [count for count in passes if count <= noise_level + 1]
    return {count: run(num_steps=count)[-1] for count in possible}


def measure(
    runs: Mapping[str, Restored], images: Images, *, passes: Sequence[int] = PASSES
) -> list[Quality]:
    """Error against forward passes of each run, at both levels of noise."""
    rows: list[Quality] = []
    clean, noise = jnp.asarray(images.clean), jnp.asarray(images.noise)
    where = jnp.ones(clean.shape, bool)
    for name, restored in runs.items():
        assert restored.config is not None
        with jax.set_mesh(restored.mesh):
            for level in noise_levels(restored.config.method_config):
                noisy = corruption.add_noise(clean, noise, jnp.full(len(clean), level))
                found = after_passes(restored, noisy, noise_level=level, passes=passes)
                for count, result in {0: noisy, **found}.items():
                    error = corruption.squared_error(result, clean, where=where)
                    psnr = float(corruption.psnr(error).mean())
                    rows.append(Quality(name, level, count, float(error.mean()), psnr))
    return rows


def table(rows: Sequence[Quality]) -> str:
    """The rows as aligned text."""
    lines = ["model            noise level  passes     mse   psnr"]
    lines += [
        f"{model:<15}  {level:>11}  {passes:>6}  {mse:>6.1f}  {psnr:>5.2f}"
        for model, level, passes, mse, psnr in rows
    ]
    return "\n".join(lines)


def draw(
    runs: Mapping[str, Restored],
    images: Images,
    path: epath.PathLike,
    *,
    passes: Sequence[int] = PASSES,
) -> None:
    """Draws clean, noisy and restored images, a row for each run, level and image.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install jaxlib-methods[plot]") from error
    clean, noise = jnp.asarray(images.clean), jnp.asarray(images.noise)
    shown: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    for name, restored in runs.items():
        assert restored.config is not None
        with jax.set_mesh(restored.mesh):
            for level in noise_levels(restored.config.method_config):
                noisy = corruption.add_noise(clean, noise, jnp.full(len(clean), level))
                found = after_passes(restored, noisy, noise_level=level, passes=passes)
                columns = {"clean": clean, "noisy": noisy}
                columns |= {f"after {count}": result for count, result in found.items()}
                strips = [(title, _strip(image)) for title, image in columns.items()]
                shown.append((f"{name}\nlevel {level}", strips))
    width = max(len(strips) for _, strips in shown)
    height = -(-len(images.clean) // 2) + 0.4  # inches: images stand in two columns
    figure = Figure(figsize=(2 * width, height * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), width, squeeze=False)
    for row, (label, strips) in zip(panels, shown, strict=True):
        for panel in row:
            panel.set_xticks([])
            panel.set_yticks([])
        for panel, (title, strip) in zip(row, strips, strict=False):
            panel.imshow(strip, interpolation="nearest")
            panel.set_title(title, fontsize=9)
        row[0].set_ylabel(label)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=100)


def _strip(images: jax.Array) -> np.ndarray:
    """Images under each other in two columns, `[., ., 3]` between 0 and 1."""
    pixels = np.clip((np.asarray(images) + 1) / 2, 0, 1)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    halves = [np.concatenate(list(half)) for half in np.array_split(pixels, 2) if len(half)]
    height = min(len(half) for half in halves)
    return np.concatenate([half[:height] for half in halves], axis=1)


def with_baseline(workdir: str, restored: Restored, *, mesh: Mesh) -> dict[str, Restored]:
    """Method -> the run, and the baseline beside it where `--compare` has trained one."""
    assert restored.config is not None
    runs = {restored.config.method: restored}
    folder = epath.Path(workdir).expanduser() / "baseline"
    if run_record.read_record(folder) is not None and run_record.has_checkpoint(folder):
        found = restore.restore(str(folder), mesh=mesh)
        assert found.config is not None
        runs[found.config.method] = found
    return runs


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError for a run of another method or of masked patches."""
    method = None if restored.config is None else restored.config.method_config
    if not isinstance(method, RestorationConfig):
        raise ValueError(
            f"{config.workdir} does not denoise images; give a run of energy_image or "
            "diffusion_image"
        )
    if method.task != "denoise":
        raise ValueError(f"{config.workdir} was trained with task={method.task}, not to denoise")


def run(config: InferConfig, restored: Restored) -> None:
    """Measures what the flags ask for; prints a table, and with `output` writes JSON and a PNG."""
    assert restored.config is not None
    method = restored.config.method_config
    assert isinstance(method, RestorationConfig)
    runs = with_baseline(config.workdir, restored, mesh=restored.mesh)
    dataset = method.dataset()("validation")
    rows = measure(runs, dataset.rows(range(NUM_IMAGES)))
    print(table(rows))
    if config.output:
        path = epath.Path(config.output).expanduser()
        picture = path.with_suffix(".png")
        values = {"workdir": config.workdir, "step": restored.step}
        path.write_text(json.dumps(values | {"rows": [row._asdict() for row in rows]}) + "\n")
        draw(runs, dataset.rows(range(NUM_DRAWN)), picture)
        print(f"written: {path} and {picture}")
