"""One of several processes that load a checkpoint in parts and export it together.

`python huggingface_worker.py PORT NUM_PROCESSES RANK FROM TO` prints a JSON object: how many
elements of the checkpoint this process read, and how many there are.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

from jaxlib_methods.models import huggingface  # noqa: E402
from jaxlib_methods.models.partitioning import make_mesh, param_shardings  # noqa: E402
from jaxlib_methods.models.transformer import init_params  # noqa: E402


class CountingSlice:
    """A tensor on disk that counts the elements read from it."""

    num_read = 0

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> Any:
        got = self._tensor[index]
        CountingSlice.num_read += got.size
        return got

    def get_shape(self) -> list[int]:
        return self._tensor.get_shape()

    def get_dtype(self) -> str:
        return self._tensor.get_dtype()


def main(port: str, num_processes: int, rank: int, source: Path, target: Path) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes, rank)
    config_json = json.loads((source / "config.json").read_text())
    cfg = huggingface.config_from_huggingface(config_json)
    boxed = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    mesh = make_mesh(fsdp=4, tensor=2, data=1)

    opened = huggingface._open
    total = 0

    def open_counting(*arguments: Any) -> dict[str, Any]:
        nonlocal total
        tensors = opened(*arguments)
        total = sum(math.prod(tensor.get_shape()) for tensor in tensors.values())
        return {name: CountingSlice(tensor) for name, tensor in tensors.items()}

    huggingface._open = open_counting
    params = huggingface.load_params(source, cfg, shardings=param_shardings(boxed, mesh))
    family, files = config_json["model_type"], {"notes.txt": b"of all"}
    huggingface.save_params(target, params, cfg, family=family, extra_files=files)
    try:
        huggingface.save_params(target, params, cfg)
        refused = False
    except FileExistsError:
        refused = True
    print(json.dumps({"read": CountingSlice.num_read, "total": total, "refused": refused}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
