"""Exporting: what is written can be read back, by this library and by its rules."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlib_methods.infer import export
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored, restore
from jaxlib_methods.train import checkpoint


def asked(output: Path) -> InferConfig:
    return InferConfig(workdir="somewhere", mode="export", output=str(output))


def test_exported_folder_holds_the_same_model(restored_on_eight: Restored, tmp_path: Path) -> None:
    export.run(asked(tmp_path / "out"), restored_on_eight)
    found = checkpoint.load_pretrained(str(tmp_path / "out"), mesh=restored_on_eight.mesh)
    checkpoint.check_same_architecture(found.config, restored_on_eight.model, where="out")
    jax.tree.map(np.testing.assert_array_equal, found.params, restored_on_eight.params)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (0, [0])
    assert found.tokenizer == "bytes"  # which have no tokenizer.json
    again = restore(str(tmp_path / "out"), mesh=restored_on_eight.mesh)
    assert (again.first_token, again.stop_tokens) == (0, (0,))
    assert again.tokenizer.decode([104, 105]) == "hi"


def test_nothing_is_overwritten(restored: Restored, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists"):
        export.run(asked(tmp_path), restored)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_export_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="needs --output"):
        InferConfig(workdir="somewhere", mode="export")
