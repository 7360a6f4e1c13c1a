"""Recurrent-depth models: published folders and runs as finished models."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.late_to_early import LateToEarlyConfig
from jaxlib_methods.models import huggingface, language_model, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import checkpoint, loop, run_record
from jaxlib_methods.train.config import RunConfig

SIZES = {"num_layers": 3, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "max_length": 16}
SANDWICH = {"block": "sandwich", "qk_bias": True, "tie_embeddings": True, "norm_eps": 1e-6}
RECURRENT = TransformerConfig(**SIZES, **SANDWICH, recurrence=2, backprop_steps=1)


def write_recurrent(folder):
    """A folder in the published format, and what is in it."""
    boxed = jax.eval_shape(lambda: language_model.init_params(RECURRENT, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), partitioning.unbox(boxed)
    )
    huggingface.save_params(folder, params, RECURRENT)
    return params


def test_how_long_a_model_iterates_is_no_part_of_its_architecture():
    other = dataclasses.replace(
        RECURRENT, recurrence=8, backprop_steps=4, recurrence_sampling="fixed", kernel_init="takase"
    )
    run_record.check_same_architecture(other, RECURRENT, where="w")
    for change, message in (
        ({"recurrence": 0, "backprop_steps": None}, r"model\.recurrence=0, this run has 2"),
        ({"injection": "add"}, r"model\.injection=add, this run has linear"),
        ({"prelude_layers": 0}, r"model\.prelude_layers=0, this run has 1"),
        ({"qk_bias": False}, r"model\.qk_bias=False, this run has True"),
        ({"block": "pre_norm"}, r"model\.block=pre_norm, this run has sandwich"),
    ):
        changed = dataclasses.replace(RECURRENT, **change)
        with pytest.raises(ValueError, match=message):
            run_record.check_same_architecture(changed, RECURRENT, where="w")
    # Of a plain model they say nothing.
    plain = dataclasses.replace(RECURRENT, recurrence=0, backprop_steps=None)
    idle = dataclasses.replace(plain, injection="add", prelude_layers=0, coda_layers=0)
    run_record.check_same_architecture(idle, plain, where="w")


def test_a_recurrent_folder_is_a_finished_model(tmp_path):
    params = write_recurrent(tmp_path / "huginn")
    found = checkpoint.load_pretrained(str(tmp_path / "huginn"), weights=False)
    assert found.params is None
    run_record.check_same_architecture(found.config, RECURRENT, where="huginn")
    assert (found.config.recurrence, found.config.backprop_steps) == (2, 1)
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    found = checkpoint.load_pretrained(str(tmp_path / "huginn"), mesh=mesh, dtype="bfloat16")
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, found.params, want)
    query = found.params["core"]["blocks"]["attention"]["query"]["kernel"]
    assert query.sharding.spec == partitioning.logical_spec(("layers", "embed", "heads", None))


@pytest.mark.usefixtures("compile_once", "one_device")
def test_a_recurrent_folder_gives_weights_and_teaches(tmp_path, tiny, read_metrics):
    params = write_recurrent(tmp_path / "huginn")
    folder = str(tmp_path / "huginn")
    config = tiny(
        tmp_path / "run",
        method="late_to_early",
        method_config=LateToEarlyConfig(teacher=folder, stop_step=1),
        init_from=folder,
        num_steps=1,
        learning_rate=1e-12,
        **SIZES,
        **SANDWICH,
        recurrence=3,
    )
    loop.train(loop.prepare(config), stop=threading.Event(), started=0.0)
    found = checkpoint.load_pretrained(config.workdir, mesh=partitioning.make_mesh()).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, params)
    first = read_metrics(tmp_path / "run")[0]
    assert first["train/teacher_loss"] == pytest.approx(first["train/loss"], rel=0.2)


def test_a_depth_recurrence_run_is_a_language_model_where_it_learns_language():
    reasoning = DepthRecurrenceConfig(task="reachability")
    for method_config, expected in ((DepthRecurrenceConfig(), True), (reasoning, False)):
        config = RunConfig(method="depth_recurrence", method_config=method_config)
        assert checkpoint.is_language_model(config) is expected
    assert checkpoint.is_language_model(RunConfig(method="next_token"))
    assert not checkpoint.is_language_model(RunConfig(method="energy"))
