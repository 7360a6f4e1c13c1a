"""A finished model as a folder that transformers, and this library, can load."""

from pathlib import Path
from typing import Any

from etils import epath

from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import huggingface
from jaxlib_methods.train import checkpoint


def check(config: InferConfig, restored: Restored) -> None:
    """Raises FileExistsError where `output` has files."""
    del restored
    assert config.output is not None
    if huggingface.is_taken(Path(config.output)):
        raise FileExistsError(
            f"--output={config.output} already exists; give a new or an empty folder"
        )


def run(config: InferConfig, restored: Restored) -> None:
    """Writes safetensors, config.json and the tokenizer to `output`, a new folder.

    A byte model has no tokenizer.json; its config.json says so, for this library.
    Raises FileExistsError where the folder has files, ValueError where no family of transformers
    can express the model.
    """
    assert config.output is not None
    tokens: dict[str, Any] = {
        "bos_token_id": restored.first_token,
        "eos_token_id": list(restored.stop_tokens),
    }
    files = {}
    if restored.tokenizer.fingerprint == "bytes":
        tokens[checkpoint.TOKENIZER_KEY] = "bytes"
    else:
        name = config.workdir if restored.config is None else restored.config.data.tokenizer
        source = epath.Path(name).expanduser()
        source = source / "tokenizer.json" if source.is_dir() else source
        files["tokenizer.json"] = source.read_bytes()
    huggingface.save_params(
        config.output, restored.params, restored.model, extra_config=tokens, extra_files=files
    )
    print(f"{config.workdir} exported to {config.output}")
