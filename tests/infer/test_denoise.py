"""Denoising with finished models: what is measured, drawn and refused."""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import registry
from jaxlib_methods.diffusion_image import DiffusionImageConfig
from jaxlib_methods.energy_image import EnergyImageConfig
from jaxlib_methods.infer import denoise
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.tasks import corruption
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.tokenizer import ByteTokenizer

MODEL = TransformerConfig(
    num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, compute_dtype="float32"
)
SIZES: dict[str, Any] = {"image_size": 8, "patch_size": 4, "channels": 1}
ENERGY = EnergyImageConfig(**SIZES, step_size=50.0)
PASSES = (1, 3)


@functools.cache
def restored(cfg: Any, *, moved: bool = True) -> Restored:
    """A model of one device, new or with every parameter moved, as it would be restored."""
    method = "energy_image" if isinstance(cfg, EnergyImageConfig) else "diffusion_image"
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])

    @jax.jit
    def make() -> Any:
        params = partitioning.unbox(registry.init_model(method, MODEL, cfg, jax.random.key(0)))
        step_size = {name: x for name, x in params.items() if name == "step_size"}
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        size = 0.2 if moved else 0.0
        parts = zip(leaves, keys, strict=True)
        return treedef.unflatten(
            [x + size * jax.random.normal(k, x.shape) for x, k in parts]
        ) | step_size  # fmt: skip

    run = RunConfig(method=method, model=MODEL, method_config=cfg)
    return Restored(run, MODEL, make(), ByteTokenizer(), 5, mesh, 0, (0,))


def images(cfg: Any) -> Any:
    return cfg.dataset()("validation").rows(range(4))


def test_levels_are_the_run_s_and_twice_as_many_steps():
    assert denoise.noise_levels(ENERGY) == (99, 199)
    assert denoise.noise_levels(dataclasses.replace(ENERGY, noise_level=800)) == (800, 999)


def test_the_table_by_hand_for_a_model_that_changes_nothing():
    batch = images(ENERGY)
    rows = denoise.measure({"new": restored(ENERGY, moved=False)}, batch, passes=PASSES)
    assert [(row.noise_level, row.passes) for row in rows] == [
        (99, 0), (99, 1), (99, 3), (199, 0), (199, 1), (199, 3),
    ]  # fmt: skip
    for level, three in ((99, rows[:3]), (199, rows[3:])):
        share = corruption.alpha_bars()[level]
        noisy = np.sqrt(share) * batch.clean + np.sqrt(1 - share) * batch.noise
        error = (np.clip(noisy, -1, 1) - batch.clean) * 127.5
        mse = np.square(error).mean(axis=(1, 2, 3))
        for row in three:
            assert row.mse == pytest.approx(mse.mean(), rel=1e-4)
            assert row.psnr == pytest.approx((10 * np.log10(255**2 / mse)).mean(), rel=1e-4)
    assert rows[3].mse > 1.5 * rows[0].mse
    lines = denoise.table(rows).splitlines()
    assert lines[0].split() == ["model", "noise", "level", "passes", "mse", "psnr"]
    assert lines[6].split() == ["new", "199", "3", f"{rows[5].mse:.1f}", f"{rows[5].psnr:.2f}"]
    assert len({len(line) for line in lines}) == 1


def test_a_descent_goes_on_and_a_diffusion_begins_anew():
    batch = images(ENERGY)
    noisy = corruption.add_noise(
        jnp.asarray(batch.clean), jnp.asarray(batch.noise), jnp.full(4, 99)
    )  # fmt: skip
    energy = restored(ENERGY)
    found = denoise.after_passes(energy, noisy, noise_level=99, passes=PASSES)
    again = denoise.after_passes(energy, found[1], noise_level=99, passes=(2,))
    assert float(jnp.abs(found[3] - found[1]).max()) > 1e-3
    np.testing.assert_allclose(again[2], found[3], rtol=1e-4, atol=1e-5)
    diffusion = restored(DiffusionImageConfig(**SIZES))
    one, three = denoise.after_passes(diffusion, noisy, noise_level=99, passes=PASSES).values()
    assert float(jnp.abs(one - three).max()) > 1e-3
    few = denoise.after_passes(diffusion, noisy, noise_level=1, passes=(1, 3))
    assert list(few) == [1], "there are no more levels than noise_level + 1"


def test_run_writes_the_table_the_numbers_and_the_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="extra `plot` is not installed")
    monkeypatch.setattr(denoise, "NUM_IMAGES", 4)
    monkeypatch.setattr(denoise, "NUM_DRAWN", 2)
    for function in (denoise.measure, denoise.draw):
        quick = functools.partial(function, passes=PASSES)
        monkeypatch.setattr(denoise, function.__name__, quick)
    output = tmp_path / "out.json"
    asked = InferConfig(workdir=str(tmp_path), mode="denoise", output=str(output))
    denoise.run(asked, restored(ENERGY))
    printed = capsys.readouterr().out
    values = json.loads(output.read_text())
    assert values["step"] == 5
    assert len(values["rows"]) == 6
    assert {row["model"] for row in values["rows"]} == {"energy_image"}
    assert f"{values['rows'][1]['psnr']:.2f}" in printed
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_baseline_beside_a_run_is_measured_with_it(tmp_path, monkeypatch):
    energy, diffusion = restored(ENERGY), restored(DiffusionImageConfig(**SIZES))
    assert list(denoise.with_baseline(str(tmp_path), energy, mesh=energy.mesh)) == ["energy_image"]
    asked = []

    def restore(workdir: str, *, mesh: Any) -> Restored:
        asked.append(workdir)
        return diffusion

    monkeypatch.setattr(denoise.restore, "restore", restore)
    monkeypatch.setattr(denoise.run_record, "read_record", lambda folder: object())
    monkeypatch.setattr(denoise.run_record, "has_checkpoint", lambda folder: True)
    found = denoise.with_baseline(str(tmp_path), energy, mesh=energy.mesh)
    assert list(found) == ["energy_image", "diffusion_image"]
    assert asked == [str(tmp_path / "baseline")]


def test_other_runs_are_refused(tmp_path):
    asked = InferConfig(workdir="runs/a", mode="denoise")
    text = restored(ENERGY)._replace(config=RunConfig())
    with pytest.raises(ValueError, match="runs/a does not denoise images; give a run of energy_"):
        denoise.check(asked, text)
    with pytest.raises(ValueError, match="runs/a does not denoise images"):
        denoise.check(asked, text._replace(config=None))
    masked = RunConfig(method="energy_image", method_config=EnergyImageConfig(task="mask"))
    with pytest.raises(ValueError, match="was trained with task=mask, not to denoise"):
        denoise.check(asked, text._replace(config=masked))


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install jaxlib-methods\[plot\]"):
        denoise.draw({}, images(ENERGY), tmp_path / "a.png")
