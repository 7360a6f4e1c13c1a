"""Saving, restoring, refusing: the checkpoints of a run, without training one."""

import dataclasses
import json
import logging
import re
import shutil
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from jaxlib_methods import replay
from jaxlib_methods.models import huggingface, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.huggingface import config_to_huggingface
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.train import checkpoint, run_record
from jaxlib_methods.train.checkpoint import Checkpoints
from jaxlib_methods.train.config import (
    DataConfig,
    RunConfig,
)
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState, shardings_of

MODEL = TransformerConfig(
    vocab_size=11, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=8, max_length=8
)
RUN = RunConfig(model=MODEL, data=DataConfig(sequence_length=8), workdir="w")
RECORD = Record(RUN, "bytes", "corpus")
OPTIMIZER = optax.adamw(0.1)


def mesh_of(*sizes):
    return partitioning.make_mesh(**dict(zip(partitioning.MESH_AXES, sizes, strict=True)))


def abstract_on(mesh, *, added=False, stored=False):
    """An abstract state over a mesh, with a parameter or a state of the method's where asked."""
    boxed = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    params, places = partitioning.unbox(boxed), partitioning.param_shardings(boxed, mesh)
    if added:
        params["alignment"] = {"kernel": jax.ShapeDtypeStruct((3, 16), jnp.float32)}
        places["alignment"] = {"kernel": partitioning.replicated(mesh)}
    opt_state = jax.eval_shape(OPTIMIZER.init, params)
    opt_places = partitioning.shardings_like_params(opt_state, params, places, mesh)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    places = TrainState(partitioning.replicated(mesh), places, opt_places)
    if stored:
        boxed = replay.empty(jax.ShapeDtypeStruct((8, 5), jnp.float32), num_slots=3)
        state = state._replace(method_state=partitioning.unbox(boxed))
        places = places._replace(method_state=partitioning.param_shardings(boxed, mesh))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def numbered(abstract, *, step, first=0.0):
    """A state in which every number is another one."""

    def fill(leaf):
        nonlocal first
        values = first + np.arange(leaf.size).reshape(leaf.shape)
        first += leaf.size
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract)._replace(
        step=jax.device_put(jnp.int32(step), abstract.step.sharding)
    )


def save(workdir, *steps, keep=3, record=RECORD, **options):
    """A workdir with checkpoints of these steps."""
    run_record.write_config(workdir, record)
    abstract = abstract_on(mesh_of(1, 8, 1, 1), **options)
    with Checkpoints(workdir, keep=keep, record=record) as checkpoints:
        for step in steps:
            checkpoints.save(numbered(abstract, step=step))
    return abstract


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_restore_on_another_mesh_is_exact(tmp_path):
    abstract = save(tmp_path, 4, added=True)
    other = abstract_on(mesh_of(2, 2, 2, 1), added=True)
    with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
        assert checkpoints.latest_step == 4
        got = checkpoints.restore(other)
    assert_same(got, numbered(abstract, step=4))
    assert jax.tree.map(lambda x: x.sharding, got) == shardings_of(other)
    kernel = got.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == abstract.params["blocks"]["mlp"]["up"]["kernel"].sharding.spec
    assert kernel.sharding.mesh.shape["tensor"] == 2


def test_the_state_of_a_method_is_restored_on_another_mesh(tmp_path):
    save(tmp_path, 4, stored=True)
    other = abstract_on(mesh_of(2, 2, 2, 1), stored=True)
    with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
        got = checkpoints.restore(other)
    assert_same(got, numbered(other, step=4))
    records = got.method_state.records
    assert records.sharding == other.method_state.records.sharding
    assert records.sharding.shard_shape(records.shape) == (3, 2, 5)
    assert len(np.unique(records)) == records.size
    # Inference needs none of it.
    found = checkpoint.load_pretrained(str(tmp_path), mesh=mesh_of(2, 2, 2, 1))
    assert_same(found.params, got.params)


def test_a_checkpoint_without_a_state_of_the_method_is_whole(tmp_path):
    abstract = save(tmp_path, 4)
    with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
        assert checkpoints.restore(abstract).method_state == ()


def save_energy_run(workdir, mesh):
    """A run of the energy method at step 4; its record and its parameters."""
    config = dataclasses.replace(RUN, method="energy", method_config=None)
    record = RECORD._replace(config=config)
    shapes = checkpoint.abstract_run_params(config, mesh)
    abstract = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(mesh)), shapes, {}
    )
    state = numbered(abstract, step=4)
    run_record.write_config(workdir, record)
    with Checkpoints(workdir, keep=1, record=record) as checkpoints:
        checkpoints.save(state)
    return record, state.params


def test_an_energy_run_keeps_all_its_parameters_for_inference(tmp_path):
    record, params = save_energy_run(tmp_path, mesh_of(1, 8, 1, 1))
    assert {"energy_head", "candidate_embedding", "step_size", "step_unit"} <= set(params)
    assert "head" not in params
    abstract = checkpoint.abstract_run_params(record.config, mesh_of(2, 2, 2, 1))
    with checkpoint.ocp.training.Checkpointer(tmp_path / "checkpoints") as saved:
        got = saved.load_checkpointables(4, {"params": abstract})["params"]
    assert_same(got, params)
    assert got["blocks"]["mlp"]["up"]["kernel"].sharding.mesh.shape["tensor"] == 2


def test_an_energy_run_is_no_plain_model(tmp_path):
    save_energy_run(tmp_path, mesh_of(1, 8, 1, 1))
    with pytest.raises(ValueError, match="of the method energy, not a plain transformer") as said:
        checkpoint.load_pretrained(str(tmp_path), weights=False)
    assert "\n" not in str(said.value)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    abstract = abstract_on(mesh_of(1, 8, 1, 1))
    later = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = numbered(abstract, step=0)
    expected = [jax.device_get(state)]
    with Checkpoints(tmp_path, keep=9, record=RECORD) as checkpoints:
        for _ in range(3):
            checkpoints.save(state)
            state = later(state)
            expected.append(jax.device_get(state))
    for step in range(3):
        with checkpoint.ocp.training.Checkpointer(tmp_path / "checkpoints") as saved:
            optimizer = {"state": abstract.opt_state, "step": abstract.step, "method_params": {}}
            got = saved.load_checkpointables(
                step, {"params": abstract.params, "optimizer": optimizer}
            )
        assert_same(got["params"], expected[step].params)
        assert_same(got["optimizer"]["state"], expected[step].opt_state)


def test_keeps_the_newest_and_saves_a_step_once(tmp_path):
    save(tmp_path, 1, 2, 3, 3, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    abstract = save(tmp_path, 4)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "4", folder / "5.orbax-checkpoint-tmp")
    shutil.rmtree(folder / "5.orbax-checkpoint-tmp" / "params")
    assert run_record.has_checkpoint(tmp_path)
    with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
        assert checkpoints.latest_step == 4
        assert_same(checkpoints.restore(abstract), numbered(abstract, step=4))
    (folder / "4").rename(folder / "4.orbax-checkpoint-tmp")
    assert not run_record.has_checkpoint(tmp_path)
    with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
        assert checkpoints.latest_step is None


def damage(path, data, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        flipped = bytes(byte ^ 255 for byte in data[middle : middle + 4])
        path.write_bytes(data[:middle] + flipped + data[middle + 4 :])


def test_a_damaged_checkpoint_is_named_or_read_as_it_was(tmp_path):
    """Every file of a checkpoint, missing, cut short or with four bytes flipped."""
    abstract = save(tmp_path, 3, 4)
    newest = tmp_path / "checkpoints" / "4"
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    refusal = (
        r"the checkpoint \S+/checkpoints/4 cannot be read: .+; move that folder elsewhere to go on "
        "from step 3, the newest before it"
    )
    refused = set()
    for path in files:
        if "optimizer" in path.parts:  # written and read as `params` is
            continue
        whole = path.read_bytes()
        for how in ("missing", "cut", "flipped"):
            damage(path, whole, how)
            message = None
            with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
                try:
                    assert_same(checkpoints.restore(abstract), numbered(abstract, step=4))
                except ValueError as error:
                    message = str(error)
            if message is not None:
                assert re.fullmatch(refusal, message)
                refused.add((path.name, how))
        path.write_bytes(whole)
    for how in ("missing", "cut", "flipped"):
        assert {("manifest.ocdbt", how), ("_METADATA", how)} <= refused
    newest.rename(tmp_path / "elsewhere")
    with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
        assert_same(checkpoints.restore(abstract), numbered(abstract, step=3))


def change_record(workdir, step, change):
    """Writes another record into a checkpoint; without one, leaves it as an older version's."""
    path = workdir / "checkpoints" / str(step) / run_record.METADATA_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"custom_metadata": change(values["custom_metadata"])}))


OTHER_RECORDS = [
    (lambda v: v | {"format": 99}, r"/4/_CHECKPOINT_METADATA has format 99, .* install a newer"),
    (lambda v: v | {"format": None}, r"/4/_CHECKPOINT_METADATA has a format that is not a whole"),
    (lambda v: v | {"run": v["run"] | {"seed": 7}}, r"/4 belongs to a run with seed=7, this run"),
    (lambda v: v | {"corpus": "other"}, r"the corpus has changed since the checkpoint \S+/4 was"),
    (lambda v: [1], r"the checkpoint \S+/4 cannot be read: its _CHECKPOINT_METADATA is damaged"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_RECORDS)
def test_a_checkpoint_of_another_run_is_refused_and_left(tmp_path, change, message):
    abstract = save(tmp_path, 3, 4)
    change_record(tmp_path, 4, change)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def restore():
        with Checkpoints(tmp_path, keep=1, record=RECORD) as checkpoints:
            checkpoints.restore(abstract)

    for load in (restore, lambda: checkpoint.restore_run(tmp_path, abstract, RECORD)):
        with pytest.raises(ValueError, match=message) as said:
            load()
        assert "\n" not in str(said.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_without_a_record_is_restored(tmp_path):
    abstract = save(tmp_path, 4)
    change_record(tmp_path, 4, lambda v: {})
    with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
        assert_same(checkpoints.restore(abstract), numbered(abstract, step=4))


def test_metadata_nested_too_deeply_are_named(tmp_path):
    save(tmp_path, 3, 4)
    (tmp_path / "checkpoints" / "3" / run_record.METADATA_FILE).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"the checkpoint \S+/3 cannot be read: .*; move that"):
        Checkpoints(tmp_path, keep=3, record=RECORD)
    with pytest.raises(ValueError, match=r"the checkpoint \S+/3 cannot be read: .*; move that"):
        checkpoint.load_pretrained(str(tmp_path), mesh=mesh_of(8, 1, 1, 1))


def test_a_checkpoint_under_another_step_is_refused(tmp_path):
    abstract = save(tmp_path, 4)
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "checkpoints" / "6")
    with (
        Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints,
        pytest.raises(ValueError, match=r"the checkpoint \S+/6 is one of step 4; give its folder"),
    ):
        checkpoints.restore(abstract)


def test_another_run_s_checkpoint_of_the_same_step_is_another_version(tmp_path):
    def version(name):
        return checkpoint.load_pretrained(str(tmp_path / name), weights=False).version

    for name, seed in (("one", 1), ("other", 2)):
        config = dataclasses.replace(RUN, seed=seed)
        (tmp_path / name).mkdir()
        save(tmp_path / name, 4, record=RECORD._replace(config=config))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert version("one").startswith("step 4, ")
    assert version("one") == version("copy") != version("other")
    (tmp_path / "copy" / "checkpoints" / "4" / run_record.METADATA_FILE).unlink()
    assert version("copy") == "step 4"


def test_reads_that_orbax_left_are_freed_with_the_error():
    reads = weakref.WeakSet()

    class Pause:
        def __await__(self):
            yield

    class Damaged:
        checkpoints = (SimpleNamespace(step=4),)
        directory = "w/checkpoints"

        def load_checkpointables(self, step, abstract):
            async def read():
                try:
                    await Pause()
                finally:
                    raise RuntimeError("the loop is closed")

            waiting = [read() for _ in range(3)]
            waiting[0].send(None)
            reads.update(waiting)
            raise RuntimeError("cut short")

    with pytest.raises(ValueError, match=r"w/checkpoints/4 cannot be read: cut short; .*the start"):
        checkpoint.load(cast("ocp.training.Checkpointer", Damaged()), None, {})
    assert not reads


def test_what_reads_and_writes_say_after_their_end_is_not_passed_on(tmp_path, monkeypatch, caplog):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    late, other = (
        cast(Any, SimpleNamespace(exc_value=RuntimeError(text)))
        for text in ("Event loop is closed", "other")
    )
    for _ in range(2):
        with Checkpoints(tmp_path, keep=3, record=RECORD):
            hook = sys.unraisablehook
            checkpoint._drop_reads(None)
            assert sys.unraisablehook is hook
            sys.unraisablehook(late)
            sys.unraisablehook(other)
    assert said == [other, other]
    assert hook.args == (said.append,)  # type: ignore[attr-defined]
    for task in ("<Task defined at /orbax/checkpoint/x.py>", "<Task of another>"):
        logging.getLogger("asyncio").error("never retrieved %s", task, exc_info=ValueError("cut"))
    assert [record.args for record in caplog.records] == [("<Task of another>",)]


def test_a_save_that_fails_is_one_oserror(tmp_path, monkeypatch):
    abstract = save(tmp_path, 1)

    def fail():
        raise ValueError("no space")

    with Checkpoints(tmp_path, keep=3, record=RECORD) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "wait", fail)
        with pytest.raises(OSError, match=r"could not be written to .*: no space; .* are kept"):
            checkpoints.save(numbered(abstract, step=2))
        assert checkpoints.latest_step == 1


def test_parameters_that_a_method_adds_are_kept_apart(tmp_path):
    abstract = save(tmp_path, 4, added=True)
    found = checkpoint.load_pretrained(str(tmp_path), mesh=mesh_of(2, 2, 2, 1))
    expected = numbered(abstract, step=4).params
    assert expected.pop("alignment")
    assert_same(found.params, expected)
    assert (found.config, found.tokenizer) == (MODEL, "bytes")


def test_load_pretrained_casts_and_reads_the_configuration_alone(tmp_path):
    save(tmp_path, 4)
    found = checkpoint.load_pretrained(str(tmp_path), mesh=mesh_of(8, 1, 1, 1), dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.params)} == {"bfloat16"}
    assert checkpoint.load_pretrained(str(tmp_path), weights=False).params is None


def make_huggingface(folder, *, weights):
    folder.mkdir()
    values = config_to_huggingface(dataclasses.replace(MODEL, mlp_dim=128))
    (folder / "config.json").write_text(json.dumps(values))
    if weights:
        save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


def test_a_model_without_weights_is_found_out_without_a_device(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model: there is no config\.json"):
        checkpoint.load_pretrained(str(tmp_path), weights=False)
    run_record.write_config(tmp_path, RECORD)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet; let it finish first"):
        checkpoint.load_pretrained(str(tmp_path), weights=False)
    bare = make_huggingface(tmp_path / "bare", weights=False)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        checkpoint.load_pretrained(str(bare), weights=False)
    other = make_huggingface(tmp_path / "other", weights=True)
    with pytest.raises(ValueError, match="does not hold this model: its 1 tensors are too few"):
        checkpoint.load_pretrained(str(other), weights=False)


def test_other_weights_of_a_folder_are_another_version(tmp_path):
    one, other = (make_huggingface(tmp_path / name, weights=True) for name in ("one", "other"))
    assert huggingface.weights_version(one) == huggingface.weights_version(other)
    tail = {"lm_head.weight": np.array([[0, 0], [0, 1]], np.float32)}
    save_file(tail, other / "model.safetensors")
    assert huggingface.weights_version(one) != huggingface.weights_version(other)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_a_save_leaves_no_descriptor_and_no_thread_behind(tmp_path):
    abstract = abstract_on(mesh_of(1, 8, 1, 1))
    before, held = set(threading.enumerate()), []
    with Checkpoints(tmp_path, keep=1, record=RECORD) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(numbered(abstract, step=step))
            checkpoints.wait()
            held.append(len(list(Path("/proc/self/fd").iterdir())))
            new = set(threading.enumerate()) - before
            assert not [thread for thread in new if "_run_loop" in thread.name]
    assert held[-1] < held[0] + 6  # each save would leave three
