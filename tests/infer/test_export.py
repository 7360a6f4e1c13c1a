"""Exporting: what is written can be read back, by this library and by its rules."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.infer import export
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored, restore
from jaxlib_methods.models import language_model, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import checkpoint, run_record
from jaxlib_methods.train.tokenizer import ByteTokenizer


def asked(output: Path) -> InferConfig:
    return InferConfig(workdir="somewhere", mode="export", output=str(output))


def test_exported_folder_holds_the_same_model(restored_on_eight: Restored, tmp_path: Path) -> None:
    export.run(asked(tmp_path / "out"), restored_on_eight)
    found = checkpoint.load_pretrained(str(tmp_path / "out"), mesh=restored_on_eight.mesh)
    run_record.check_same_architecture(found.config, restored_on_eight.model, where="out")
    jax.tree.map(np.testing.assert_array_equal, found.params, restored_on_eight.params)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (0, [0])
    assert found.tokenizer == "bytes"  # which have no tokenizer.json
    again = restore(str(tmp_path / "out"), mesh=restored_on_eight.mesh)
    assert (again.first_token, again.stop_tokens) == (0, (0,))
    assert again.tokenizer.decode([104, 105]) == "hi"


def test_the_folder_appears_with_its_tokenizer(
    restored: Restored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, replace, appeared = tmp_path / "source", os.replace, []
    source.mkdir()
    (source / "tokenizer.json").write_bytes(b'{"\xc3\xa9": 0}')

    def look(partial: Path, folder: Path) -> None:
        appeared.extend(sorted(path.name for path in partial.iterdir()))
        replace(partial, folder)

    monkeypatch.setattr(os, "replace", look)
    config = InferConfig(workdir=str(source), mode="export", output=str(tmp_path / "out"))
    tokenizer = ByteTokenizer()
    tokenizer.fingerprint = "of a file"
    export.run(config, restored._replace(tokenizer=tokenizer))
    assert appeared == ["config.json", "model.safetensors", "tokenizer.json"]
    written = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert written == (source / "tokenizer.json").read_bytes()


def test_nothing_is_overwritten(restored: Restored, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists"):
        export.run(asked(tmp_path), restored)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_export_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="needs --output"):
        InferConfig(workdir="somewhere", mode="export")


def test_an_exported_recurrent_model_thinks_as_asked(restored: Restored, tmp_path: Path) -> None:
    model = TransformerConfig(
        num_layers=3,
        embed_dim=16,
        num_heads=2,
        mlp_dim=24,
        vocab_size=256,
        max_length=64,
        norm_eps=1e-6,
        block="sandwich",
        qk_bias=True,
        kernel_init="takase",
        tie_embeddings=True,
        recurrence=4,
        backprop_steps=2,
    )
    params = partitioning.unbox(language_model.init_params(model, jax.random.key(0)))
    export.run(asked(tmp_path / "out"), restored._replace(model=model, params=params))
    depth = {"num_steps": 2, "exit": "kl"}
    found = restore(str(tmp_path / "out"), mesh=restored.mesh, depth=depth)
    assert found.kind == "recurrent"
    expected = RecurrentModel(found.model, DepthConfig(num_steps=2, exit="kl"), seed=3)
    assert found._replace(seed=3).language_model == expected
    assert found.model.recurrence == 4
    with pytest.raises(ValueError, match=r"depth.min_steps=5 is more than the 4 iterations"):
        _ = found._replace(depth=DepthConfig(min_steps=5)).language_model
    with pytest.raises(ValueError, match=r"--think.noise is for an energy run; .* recurrent in"):
        restore(str(tmp_path / "out"), mesh=restored.mesh, think={"noise": 0.0})
