"""Runs on examples that are not text: batches, baseline, records and the final table."""

import json
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlib_methods.diffusion_image import DiffusionImageConfig
from jaxlib_methods.energy_image import EnergyImageConfig
from jaxlib_methods.models import partitioning
from jaxlib_methods.next_token import NextTokenConfig
from jaxlib_methods.tasks.images import ImageDataset
from jaxlib_methods.train import data, loop, plots, prepare, report, run_record

SPEC = partitioning.batch_spec()
TINY = EnergyImageConfig(image_size=8, patch_size=4, channels=1, step_size=40.0)


class Rows(NamedTuple):
    tokens: np.ndarray
    pixels: np.ndarray
    table: np.ndarray
    number: np.ndarray


class Counted:
    """Rows whose numbers say where they come from; nothing of it is text."""

    num_examples, sequence_length = 20, 4
    bytes_per_token: float | None = None
    fingerprint = "counted"

    def rows(self, indices) -> Rows:
        index = np.asarray(indices)
        tokens = (10 * index[:, None] + np.arange(4)).astype(np.int32)
        pixels = index[:, None, None] + np.arange(6, dtype=np.float32).reshape(2, 3)
        table = index[:, None] + np.arange(3, dtype=np.float32)
        return Rows(tokens, pixels, table, index.astype(np.int32))


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"data": 2, "fsdp": 2, "sequence": 2}, {"fsdp": 4, "data": 1, "tensor": 2}],
)
def test_fields_of_any_rank_are_cut_by_rows_and_tokens_by_sequence_too(sizes):
    mesh = partitioning.make_mesh(**sizes)
    expected = Counted().rows(range(16, 24))
    batches = data.device_batches(Counted(), batch_size=8, mesh=mesh, spec=SPEC, start_step=2)
    got = next(batches)
    batches.close()
    assert isinstance(got, Rows)
    for name in Rows._fields:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    by_rows = PartitionSpec(("data", "fsdp"))
    specs: Any = {name: array.sharding.spec for name, array in got._asdict().items()}
    assert specs == {"tokens": SPEC, "pixels": by_rows, "table": by_rows, "number": by_rows}


def test_validation_ends_in_rows_that_count_nothing():
    dataset = ImageDataset("validation", size=4, channels=1, sequence_length=4, num_validation=5)
    mesh = partitioning.make_mesh(devices=jax.devices()[:2])
    first, last = data.validation_batches(
        dataset, batch_size=4, max_batches=9, mesh=mesh, spec=SPEC
    )
    assert first.where.tolist() == [True] * 4
    assert last.where.tolist() == [True, False, False, False]
    np.testing.assert_array_equal(last.clean[0], dataset.rows([4]).clean[0])


def test_the_baseline_keeps_the_fields_that_it_shares(tiny, tmp_path):
    method = EnergyImageConfig(image_size=16, noise_level=9, num_descent_steps=3, data_seed=4)
    run = tiny(tmp_path, method="energy_image", method_config=method, compare=True)
    baseline = prepare.plan(run)["baseline"]
    assert baseline.method == "diffusion_image"
    assert baseline.method_config == DiffusionImageConfig(image_size=16, noise_level=9, data_seed=4)
    assert prepare.baseline_of(tiny(tmp_path)).method_config == NextTokenConfig()


def test_a_baseline_has_none_itself(tiny, tmp_path):
    with pytest.raises(ValueError, match="the baseline diffusion_image, which this run is itself"):
        prepare.plan(tiny(tmp_path, method="diffusion_image", compare=True))


def test_a_run_on_images_needs_no_text(tiny, tmp_path):
    run = tiny(tmp_path, method="energy_image", method_config=TINY, source="nowhere", vocab_size=7)
    prepared = prepare.prepare(run)
    assert prepared.dataset.sequence_length == 4
    assert prepared.record.corpus == prepared.dataset.fingerprint
    assert prepared.validation.fingerprint != prepared.dataset.fingerprint
    with pytest.raises(ValueError, match="ends below"):
        prepare.prepare(tiny(tmp_path, source="nowhere", vocab_size=7))


def test_weights_of_a_language_model_are_refused(tiny, tmp_path):
    run = tiny(tmp_path, method="energy_image", method_config=TINY, init_from="somewhere")
    with pytest.raises(ValueError, match=r"init_from=somewhere .* energy_image trains another"):
        prepare.prepare(run)


def test_a_run_trains_resumes_and_ends_in_a_table(tiny, tmp_path, one_device, compile_once, capsys):
    def run(workdir, num_steps):
        loop.run(
            tiny(workdir, method="energy_image", method_config=TINY, compare=True,
                 num_steps=num_steps, schedule="constant", warmup_fraction=0.0)
        )  # fmt: skip
        return capsys.readouterr()

    whole = run(tmp_path / "whole", 4)
    lines = whole.out.splitlines()
    assert " ".join(lines[0].split()) == (
        "run parameters steps loss bits per byte alignment cosine time"
    )
    assert [line.split()[0] for line in lines[1:3]] == ["energy_image", "baseline"]
    assert lines[1].split()[4] == "-"
    assert "nats" not in whole.out
    run(tmp_path / "parts", 2)
    assert "continuing from step 2" in run(tmp_path / "parts", 4).err
    curves = [
        plots.read_curves(tmp_path / name / "metrics.jsonl")["validation/loss"]
        for name in ("whole", "parts")
    ]
    assert curves[0][1][-1] == curves[1][1][-1]
    record = run_record.read_record(tmp_path / "whole")
    assert record is not None
    assert record.config.method_config == TINY


def test_the_words_of_a_loss_without_unit(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "validation/loss": loss, "train/elapsed_secs": 1.0}) + "\n"
            for step, loss in ((10, 0.5), (20, 0.25))
        )
    )
    summary = report.summarise(tmp_path, num_params=3, bytes_per_token=None, stop_step=None)
    assert summary.bits_per_byte is None
    assert report.compare("energy_image", summary, summary) == (
        "energy_image reached the baseline's final validation loss of 0.2500 after 20 of the "
        "baseline's 20 steps (1.00x)"
    )
    text = report.summarise(tmp_path, num_params=3, bytes_per_token=2.0, stop_step=None)
    assert text.bits_per_byte == pytest.approx(0.125 / math.log(2))
