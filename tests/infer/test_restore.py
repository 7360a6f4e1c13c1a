"""Restoring: runs and Hugging Face folders, any checkpoint, any mesh, and the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.sharding import Mesh

from jaxlib_methods.infer import config
from jaxlib_methods.infer.__main__ import main
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.generate import generate
from jaxlib_methods.infer.restore import Restored, restore
from jaxlib_methods.models import huggingface, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.train import run_record
from jaxlib_methods.train.checkpoint import Checkpoints
from jaxlib_methods.train.config import DataConfig, RunConfig
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState

GREEDY = SamplingConfig(temperature=0.0)
TOO_LATE = {"exit": "kl", "min_steps": 9}


def one_device() -> Mesh:
    return partitioning.make_mesh(devices=jax.devices()[:1])


def assert_same(got: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture(scope="module")
def workdir(restored_on_eight: Restored, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with the checkpoints 10 and 20, saved from eight devices; 20 has all weights halved."""
    folder = str(tmp_path_factory.mktemp("run"))
    run = RunConfig(model=restored_on_eight.model, data=DataConfig(sequence_length=64))
    record = Record(run, restored_on_eight.tokenizer.fingerprint, "corpus")
    run_record.write_config(folder, record)
    with Checkpoints(folder, keep=2, record=record) as checkpoints:
        for step, scale in ((10, 1.0), (20, 0.5)):
            params = jax.tree.map(lambda p, s=scale: s * p, restored_on_eight.params)
            checkpoints.save(TrainState(jnp.array(step), params, {"count": jnp.array(step)}))
    return folder


def test_a_run_on_another_mesh(workdir: str, restored: Restored):
    mesh = partitioning.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    newest = restore(workdir, mesh=mesh)
    assert newest.step == 20
    assert newest.config is not None
    assert newest.model == newest.config.model == restored.model
    assert_same(newest.params, jax.tree.map(lambda p: 0.5 * p, restored.params))
    table = newest.params["embedding"]["table"]
    assert table.addressable_shards[0].data.shape == (table.shape[0] // 2, table.shape[1] // 2)
    older = restore(workdir, mesh=one_device(), step=10)
    assert older.step == 10
    assert_same(older.params, restored.params)
    assert (older.first_token, older.stop_tokens) == (0, (0,))
    settings: dict[str, Any] = {"max_new_tokens": 8, "sampling": GREEDY}
    assert generate(older, ["def "], **settings) == generate(restored, ["def "], **settings)


def test_what_is_not_there_is_named(workdir: str, tmp_path: Path):
    with pytest.raises(ValueError, match="no checkpoint of step 15; there are 10, 20"):
        restore(workdir, mesh=one_device(), step=15)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        restore(str(tmp_path), mesh=one_device())
    with pytest.raises(ValueError, match=r"--step=3 is for a run; .* holds no checkpoints"):
        restore(str(tmp_path), mesh=one_device(), step=3)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no run: it has no config.json"):
        restore(str(tmp_path), mesh=one_device())
    record = run_record.read_record(workdir)
    assert record is not None
    run_record.write_config(tmp_path, record)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        restore(str(tmp_path), mesh=one_device())
    run_record.write_config(tmp_path, record._replace(tokenizer="another"))
    with pytest.raises(ValueError, match=r"data.tokenizer=bytes has changed"):
        restore(str(tmp_path), mesh=one_device())


def write_tokenizer(path: Path) -> None:
    """Bytes as a `tokenizer.json`: the ids 0 and 1 are special, then one id per byte."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a"], trainer)
    made.save(str(path))


@pytest.mark.parametrize(
    ("extra", "first_token", "stop_tokens"),
    [
        ({"bos_token_id": 0, "eos_token_id": 1}, 0, (1,)),
        ({"bos_token_id": None, "eos_token_id": [1, 7]}, 1, (1, 7)),
        ({}, 1, (1,)),  # the tokenizer's own end of text
    ],
)
def test_a_hugging_face_folder(
    restored: Restored,
    tmp_path: Path,
    extra: dict[str, Any],
    first_token: int,
    stop_tokens: tuple[int, ...],
):
    folder = tmp_path / "model"
    huggingface.save_params(folder, restored.params, restored.model, extra_config=extra)
    write_tokenizer(folder / "tokenizer.json")
    got = restore(str(folder), mesh=one_device())
    assert (got.config, got.step) == (None, None)
    assert (got.first_token, got.stop_tokens) == (first_token, stop_tokens)
    assert dataclasses.replace(got.model, compute_dtype="float32") == restored.model
    assert_same(got.params, restored.params)
    assert got.tokenizer.decode(got.tokenizer.encode("naïve")) == "naïve"


@pytest.mark.parametrize(
    ("mode", "flags", "message"),
    [
        ("denoise", {}, "--mode=denoise is for a run on images; WORKDIR is a language model that"),
        ("generate", {"think": {"noise": 0.0}}, "--think.noise is for an energy run"),
        ("generate", {"depth": TOO_LATE}, "depth.min_steps=9 is more than the 4 iterations"),
        ("evaluate", {"depth": TOO_LATE}, "depth.min_steps=9 is more than the 4 iterations"),
        ("generate", {"depth": {"sampler": "parallel"}}, "reads drafts again, which a model of i"),
        ("evaluate", {"depth": {"state_scale": 0.5}}, "state_scale=0.5 has no meaning for a model"),
        ("think", {"depth": TOO_LATE}, None),
        ("export", {}, None),
        ("generate", {"depth": {"sampler": "continuous"}}, None),
        ("evaluate", {"step": 5}, "has no checkpoint of step 5; there are 1"),
        ("evaluate", {"data": {"source": "/nope"}}, "/nope does not exist; a data source is"),
        ("think", {"data": {"validation_source": "/nope"}}, "/nope does not exist; a data source"),
        ("evaluate", {"data": {"batch_size": 0}}, "data.batch_size=0 must be at least 1"),
        ("think", {"data": {"sequence_length": 9999}}, "data.sequence_length=9999 is longer than"),
        ("generate", {"max_new_tokens": 9999}, "max_new_tokens=9999 exceed the model's context"),
        ("generate", {"prompt_file": "/nope"}, "--prompt_file=/nope cannot be read: [Errno 2]"),
        ("generate", {"output": "WORKDIR"}, "--output=WORKDIR is a folder; give the name of a f"),
        ("think", {"output": "WORKDIR/config.json/a"}, "a cannot be written: [Errno 17] File ex"),
        ("export", {"output": "WORKDIR"}, "--output=WORKDIR already exists; give a new or an em"),
        ("export", {"output": "WORKDIR/config.json/a"}, "a cannot be written: [Errno 17] File e"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_its_weights_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: Any,
    flags: dict[str, Any],
    message: str | None,
):
    """The folder holds the record of a run and the name of a checkpoint; no mesh can be made."""
    cfg = TransformerConfig(
        num_layers=3, embed_dim=16, num_heads=2, recurrence=4, injection="none", block="sandwich"
    )
    run_record.write_config(tmp_path, Record(RunConfig(model=cfg), "bytes", "corpus"))
    (run_record.checkpoints_folder(tmp_path) / "1").mkdir(parents=True)
    given: dict[str, Any] = {"output": "WORKDIR/new/out", **flags}
    if mode == "generate":
        given["prompt"] = ("x",)
    output = given.pop("output").replace("WORKDIR", str(tmp_path))
    asked = InferConfig(workdir=str(tmp_path), mode=mode, output=output, **given)

    def make_mesh(**_: int) -> None:
        raise OSError("a device is touched")

    monkeypatch.setattr(config, "from_flags", lambda: asked)
    monkeypatch.setattr(partitioning, "make_mesh", make_mesh)
    with pytest.raises(SystemExit):
        main([])
    expected = (message or "a device is touched").replace("WORKDIR", str(tmp_path))
    assert expected in capsys.readouterr().err


def infer(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxlib_methods.infer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_generates(workdir: str, restored: Restored, tmp_path: Path):
    path = tmp_path / "out.jsonl"
    options = ("--prompt=def ", "--temperature=0", "--max_new_tokens=8", f"--output={path}")
    done = infer(f"--workdir={workdir}", "--step=10", *options)
    assert done.returncode == 0, done.stderr
    expected = generate(restored, ["def "], max_new_tokens=8, sampling=GREEDY)[0]
    assert json.loads(path.read_text())["tokens"] == expected.tokens
    assert done.stdout == f"def {expected.text}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=x"], "error: nothing to restore: give --workdir"),
        (["--workdir=WORKDIR", "--prompt=x", "--step=11"], "no checkpoint of step 11"),
        (["--workdir=WORKDIR", "--prompt=x", "--max_new_tokens=99"], "max_new_tokens=99 exceed"),
    ],
)
def test_the_command_line_explains_mistakes(workdir: str, arguments: list[str], message: str):
    done = infer(*(a.replace("WORKDIR", workdir) for a in arguments))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == done.stderr.count("\n") == 1
