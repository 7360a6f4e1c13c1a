"""The image model of EBT and its diffusion baseline, as methods."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import diffusion_image, energy_image, flops, losses
from jaxlib_methods.diffusion_image import DiffusionImageConfig
from jaxlib_methods.energy_image import EnergyImageConfig
from jaxlib_methods.method import Context, Method
from jaxlib_methods.models import partitioning, patch_transformer
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.tasks import corruption
from jaxlib_methods.tasks.images import Images

MODEL = TransformerConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, compute_dtype="float32"
)
SIZES: dict[str, Any] = {"image_size": 8, "patch_size": 2, "channels": 1}
CFG = EnergyImageConfig(**SIZES, step_size=40.0)
NOISE = DiffusionImageConfig(**SIZES)
STEP: dict[str, Any] = {"step": jnp.int32(0), "key": jax.random.key(0)}


def no_teacher(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
    raise AssertionError(f"read {source}")


def build(cfg: Any, model: TransformerConfig = MODEL) -> Method:
    make: Any = energy_image.make if isinstance(cfg, EnergyImageConfig) else diffusion_image.make
    return make(
        cfg,
        Context(
            model=model,
            num_steps=5,
            sequence_length=16,
            batch_size=4,
            tokenizer="bytes",
            load_pretrained=no_teacher,
        ),
    )


def batch_of(cfg: Any, indices: Any = range(4), split: Any = "train") -> Images:
    return cfg.dataset()(split).rows(indices)


def new_params(method: Method) -> Any:
    return jax.jit(lambda: partitioning.unbox(method.init_params(jax.random.key(0))))()


def moved_params(method: Method) -> Any:
    """A model of which no parameter is zero; the step size stays."""

    @jax.jit
    def make() -> Any:
        leaves, treedef = jax.tree.flatten(
            partitioning.unbox(method.init_params(jax.random.key(0)))
        )
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return treedef.unflatten(
            [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        )

    return make() | {n: x for n, x in new_params(method).items() if n == "step_size"}


def metrics_of(method: Method, params: Any, batch: Images, *, evaluate: bool = True) -> Any:
    loss: Any = method.evaluate if evaluate else method.loss
    found = jax.jit(lambda params, batch: loss(params, (), batch, **STEP))(params, batch)
    return found[0], {name: float(s / n) for name, (s, n) in found[1].items()}


def test_smooth_l1_by_hand():
    prediction, target = jnp.array([0.5, -3.0, jnp.nan, 1.0]), jnp.array([0.0, 0.0, 0.0, 2.5])
    where = jnp.array([True, True, False, True])
    got = losses.smooth_l1(prediction, target, where=where)
    np.testing.assert_allclose(got, [0.125, 2.5, 0.0, 1.0])
    wide = losses.smooth_l1(prediction, target, beta=2.0, where=where)
    np.testing.assert_allclose(wide, [0.0625, 2.0, 0.0, 0.5625])
    slope = jax.grad(lambda x: losses.smooth_l1(x, target, where=where).sum())(prediction)
    np.testing.assert_allclose(slope, [0.5, -1.0, 0.0, -1.0])


@pytest.mark.parametrize("task", ["denoise", "mask"])
def test_a_new_model_leaves_every_image_exactly_as_it_is(task):
    cfg = dataclasses.replace(CFG, task=task, num_descent_steps=2)
    method, batch = build(cfg), batch_of(cfg)
    start, judged = energy_image.spoil(cfg, batch)
    model = cfg.patch_config(MODEL, "energy")
    path = energy_image.restore(cfg, model, new_params(method), start, judged)
    np.testing.assert_array_equal(path.candidates, jnp.stack([start, start]))
    _, metrics = metrics_of(method, new_params(method), batch)
    assert metrics["psnr"] == metrics["noisy_psnr"]
    assert metrics["energy_first"] == metrics["energy_last"] == 0
    assert metrics["step_size"] == 40


def test_a_step_is_y_minus_alpha_times_the_slope():
    method, batch = build(CFG), batch_of(CFG)
    params, model = moved_params(method), CFG.patch_config(MODEL, "energy")
    levels = jnp.full(4, 99)
    noisy = corruption.add_noise(jnp.asarray(batch.clean), jnp.asarray(batch.noise), levels)
    weights = {name: x for name, x in params.items() if name != "step_size"}
    slope = jax.jit(
        jax.grad(lambda y: patch_transformer.forward(model, weights, y).sum())
    )(noisy)  # fmt: skip
    by_hand = noisy - 40.0 * slope
    error = jnp.abs(by_hand - batch.clean)
    expected = jnp.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    scalar, metrics = metrics_of(method, params, batch)
    assert float(jnp.abs(slope).max()) > 1e-3
    assert float(scalar) == pytest.approx(float(expected), rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    mse = np.square(np.clip(by_hand, -1, 1) - batch.clean).mean(axis=(1, 2, 3)) * 127.5**2
    assert metrics["psnr"] == pytest.approx(np.mean(20 * np.log10(255 / np.sqrt(mse))), rel=1e-5)
    first = patch_transformer.forward(model, weights, noisy).mean()
    last = patch_transformer.forward(model, weights, by_hand).mean()
    assert metrics["energy_first"] == pytest.approx(float(first), rel=1e-4)
    assert metrics["energy_last"] == pytest.approx(float(last), rel=1e-4)


def test_only_masked_patches_are_judged_and_moved():
    cfg = dataclasses.replace(CFG, task="mask", mask_share=0.25, num_descent_steps=2)
    method, batch = build(cfg), batch_of(cfg)
    params, model = moved_params(method), cfg.patch_config(MODEL, "energy")
    start, judged = energy_image.spoil(cfg, batch)
    assert judged.mean() == 0.25
    np.testing.assert_array_equal(start, np.where(judged, batch.noise, batch.clean))
    path = energy_image.restore(cfg, model, params, start, judged)
    moved = path.candidates[-1] != start
    assert bool((moved == judged).all())
    scalar, metrics = metrics_of(method, params, batch)
    error = losses.smooth_l1(path.candidates[-1], jnp.asarray(batch.clean))
    assert float(scalar) == pytest.approx(float(error[judged].mean()), rel=1e-5)
    assert metrics["noisy_psnr"] < 15, "half of noise against an image, not diluted by the rest"
    # What stands under the mask in the clean image changes the target alone, not the start.
    other = batch._replace(clean=np.where(judged, -batch.clean, batch.clean))
    np.testing.assert_array_equal(energy_image.spoil(cfg, other)[0], start)


def test_padding_rows_do_not_exist():
    cfg = dataclasses.replace(CFG, task="mask")
    method, batch = build(cfg), batch_of(cfg)
    params = moved_params(method)
    where = np.array([True, True, False, False])
    junk = batch._replace(where=where, clean=np.where(where[:, None, None, None], batch.clean, 9))
    whole = batch_of(cfg, range(2))

    def run(batch: Images) -> Any:
        def scalar(params: Any) -> Any:
            return method.loss(params, (), batch, **STEP)

        return jax.jit(jax.grad(scalar, has_aux=True))(params)

    (grads, metrics), (expected, expected_metrics) = run(junk), run(whole)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), grads, expected
    )
    for name, pair in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-5)


def test_the_outer_gradient_is_the_slope_in_float64_by_both_policies():
    tiny = dataclasses.replace(
        MODEL, embed_dim=8, mlp_dim=8, compute_dtype="float64", param_dtype="float64"
    )
    with jax.enable_x64(True):
        batch = Images(*(np.asarray(x, np.float64) if x.dtype == np.float32 else x
                         for x in batch_of(CFG, range(2))))  # fmt: skip
        found = {}
        for memory in ("recompute", "save"):
            cfg = dataclasses.replace(CFG, num_descent_steps=2, memory=memory, loss_steps="all")
            method = build(cfg, tiny)
            params = jax.tree.map(lambda x: x.astype(jnp.float64), moved_params(method))
            scalar = jax.jit(lambda p, method=method: method.loss(p, (), batch, **STEP)[0])
            found[memory] = jax.jit(jax.grad(scalar))(params)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-12),
            found["recompute"], found["save"],
        )  # fmt: skip
        leaves, treedef = jax.tree.flatten(params)
        draw = np.random.default_rng(0)
        direction = treedef.unflatten([draw.normal(size=x.shape).astype(x.dtype) for x in leaves])

        def at(t: float) -> float:
            return float(scalar(jax.tree.map(lambda x, d: x + t * d, params, direction)))

        epsilon = 1e-5
        slope = (at(epsilon) - at(-epsilon)) / (2 * epsilon)
        pairs = zip(jax.tree.leaves(found["save"]), jax.tree.leaves(direction), strict=True)
        analytic = sum(float(jnp.vdot(g, d)) for g, d in pairs)
    assert abs(slope) > 1e-3
    assert analytic == pytest.approx(slope, rel=1e-4)


def test_loss_steps():
    cfg = dataclasses.replace(CFG, num_descent_steps=2, step_size=2.0)
    one = dataclasses.replace(cfg, num_descent_steps=1)
    params, batch = moved_params(build(cfg)), batch_of(cfg)
    of_all, metrics = metrics_of(build(dataclasses.replace(cfg, loss_steps="all")), params, batch)
    of_last, _ = metrics_of(build(cfg), params, batch)
    of_first, _ = metrics_of(build(one), params, batch)
    assert float(of_first) != float(of_last)
    assert float(of_all) == pytest.approx(float(of_first + of_last) / 2, rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(of_last), rel=1e-5)


def test_the_step_size_is_a_parameter_with_a_rate_of_its_own_and_a_floor():
    method = build(CFG)
    assert method.rate_factors == {"step_size": 120.0}
    fixed = build(dataclasses.replace(CFG, learn_step_size=False))
    assert fixed.rate_factors == {}
    assert "step_size" not in fixed.init_params(jax.random.key(0))
    given = build(dataclasses.replace(CFG, step_size_rate=5.0))
    assert given.rate_factors == {"step_size": 5.0}
    params = moved_params(method)
    below = params | {"step_size": {"alpha": jnp.float32(-3.0)}}
    assert metrics_of(method, below, batch_of(CFG))[1]["step_size"] == pytest.approx(1e-4)
    slope = jax.jit(jax.grad(lambda p: method.loss(p, (), batch_of(CFG), **STEP)[0]))(params)
    assert float(slope["step_size"]["alpha"]) != 0


def test_one_device_equals_eight():
    cfg = dataclasses.replace(CFG, num_descent_steps=2, loss_steps="all")
    method, batch = build(cfg), batch_of(cfg, range(8))
    params = moved_params(method)
    boxed = jax.eval_shape(method.init_params, jax.random.key(0))

    def on(devices: Any, **sizes: int) -> Any:
        mesh = partitioning.make_mesh(devices=devices, **sizes)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, partitioning.param_shardings(boxed, mesh))
            rows = jax.device_put(
                batch, jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
            )  # fmt: skip
            step = jax.jit(
                jax.value_and_grad(lambda p, b: method.loss(p, (), b, **STEP), has_aux=True)
            )
            return jax.device_get(step(placed, rows))

    (one, metrics), grads = on(jax.devices()[:1])
    (eight, same), other = on(jax.devices(), data=2, fsdp=2, tensor=2)
    assert one == pytest.approx(eight, rel=1e-5)
    for name, pair in metrics.items():
        np.testing.assert_allclose(same[name], pair, rtol=1e-4, atol=1e-6)
    # The keys' biases change nothing: what is computed as their gradient is rounding.
    biggest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6 * biggest), grads, other
    )


@pytest.mark.parametrize("memory", ["recompute", "save"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_flops_of_the_descent_are_those_counted(num_steps, memory):
    cfg = dataclasses.replace(CFG, num_descent_steps=num_steps, memory=memory)
    check_flops(build(cfg), cfg)


def test_flops_of_the_baseline_are_those_counted():
    check_flops(build(NOISE), NOISE)


def check_flops(method: Method, cfg: Any) -> None:
    batch = batch_of(cfg, range(8))
    params = jax.eval_shape(lambda: partitioning.unbox(method.init_params(jax.random.key(0))))
    counted = flops.count_dot_flops(
        jax.grad(lambda params: method.loss(params, (), batch, **STEP)[0]), params
    )
    assert counted / (8 * 16) == pytest.approx(method.flops_per_token, rel=0.01)


def test_diffusion_restores_what_a_perfect_prediction_allows(monkeypatch):
    batch = batch_of(NOISE)
    clean, noise = jnp.asarray(batch.clean), jnp.asarray(batch.noise)
    levels = []

    def perfect(cfg: Any, params: Any, x: jax.Array, level: jax.Array) -> jax.Array:
        del cfg, params
        levels.append(level)
        kept, added = (s[:, None, None, None] for s in corruption.scales(level, x.dtype))
        return (x - kept * clean) / added

    monkeypatch.setattr(patch_transformer, "forward", perfect)
    model = NOISE.patch_config(MODEL, "image")
    noisy = corruption.add_noise(clean, noise, jnp.full(4, 99))
    found = diffusion_image.restore(model, {}, noisy, noise_level=99, num_steps=3)
    assert found.shape == (3, *clean.shape)
    np.testing.assert_allclose(found, jnp.broadcast_to(clean, found.shape), atol=1e-4)
    assert len(levels) == 1, "one forward pass in the scanned body"


def test_diffusion_steps_by_hand(monkeypatch):
    # A model that always predicts 1, from level 99 in two steps: 99 and 50.
    monkeypatch.setattr(
        patch_transformer, "forward", lambda cfg, params, x, level: jnp.ones_like(x)
    )
    x = jnp.full((1, 8, 8, 1), 0.3)
    found = diffusion_image.restore(
        NOISE.patch_config(MODEL, "image"), {}, x, noise_level=99, num_steps=2
    )
    shares = corruption.alpha_bars()
    root = math.sqrt
    first = (0.3 - root(1 - shares[99])) / root(shares[99])
    middle = root(shares[50]) * first + root(1 - shares[50])
    second = (middle - root(1 - shares[50])) / root(shares[50])
    np.testing.assert_allclose(found[:, 0, 0, 0, 0], [first, second], rtol=1e-5)


def test_diffusion_learns_the_noise_at_levels_up_to_its_own():
    cfg = dataclasses.replace(NOISE, noise_level=3)
    method, batch = build(cfg), batch_of(cfg)
    scalar, metrics = metrics_of(method, new_params(method), batch, evaluate=False)
    assert float(scalar) == pytest.approx(np.square(batch.noise).mean(), rel=1e-5)
    assert metrics["noise_loss"] == pytest.approx(float(scalar), rel=1e-6)
    assert metrics["noisy_psnr"] > 30, "at most four levels of noise"
    _, at_99 = metrics_of(build(NOISE), new_params(build(NOISE)), batch)
    _, energy = metrics_of(build(CFG), new_params(build(CFG)), batch)
    assert at_99["noisy_psnr"] == energy["noisy_psnr"], "both are judged on the same images"


def test_the_baseline_of_masked_patches_predicts_them_in_one_pass():
    cfg = dataclasses.replace(NOISE, task="mask")
    method, batch = build(cfg), batch_of(cfg)
    params, model = moved_params(method), cfg.patch_config(MODEL, "image")
    start, judged = energy_image.spoil(cfg, batch)
    found = patch_transformer.forward(model, params, start, jnp.full(4, 999))
    scalar, metrics = metrics_of(method, params, batch, evaluate=False)
    assert method.evaluate is None
    assert float(scalar) == pytest.approx(
        float(np.square(found - batch.clean)[judged].mean()), rel=1e-4
    )
    error = losses.smooth_l1(found, jnp.asarray(batch.clean))[judged].mean()
    assert metrics["loss"] == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (EnergyImageConfig, {"num_descent_steps": 0}, "num_descent_steps=0 must be at least 1"),
        (EnergyImageConfig, {"step_size": -1.0}, "step_size=-1.0 must be at least 0.0001"),
        (EnergyImageConfig, {"step_size_rate": -1.0}, "step_size_rate=-1.0 must not be negative"),
        (EnergyImageConfig, {"mask_share": 1.0}, "mask_share=1.0 must be between 0 and 1"),
        (EnergyImageConfig, {"patch_size": 5}, "image_size 32 is not a multiple of patch_size 5"),
        (EnergyImageConfig, {"channels": 2}, "channels 2 is unknown; choose one of [1, 3]"),
        (EnergyImageConfig, {"noise_level": 1000}, "noise_level=1000 must be between 0 and 999"),
        (EnergyImageConfig, {"data_seed": -1}, "data_seed=-1 must not be negative"),
        (EnergyImageConfig, {"task": "sharpen"}, "task 'sharpen' is unknown"),
        (EnergyImageConfig, {"memory": "none"}, "memory 'none' is unknown"),
        (EnergyImageConfig, {"loss_steps": "first"}, "loss_steps 'first' is unknown"),
        (DiffusionImageConfig, {"num_denoise_steps": 101}, "between 1 and the 100 noise levels"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_in_one_line(config, fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is checked below
        config(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
