"""Machines that are not here: the devices of a TPU topology, or of a mesh on the CPU."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

# libtpu asks the network which machine this is, and lets one process in at a time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_MIN_LOG_LEVEL": "1",
}

_GPUS = ("gpu", "cuda", "rocm", "a100", "h100", "h200", "b200", "gb200")


def devices_of(topology: str, *, num_slices: int = 1) -> Sequence[Any]:
    """Devices to compile for: `v5p:4x4x4`, what else libtpu knows, or `cpu:8`.

    num_slices: of a TPU, joined by the data-centre network. Nothing can be run on TPU devices.
    Raises ValueError for an unknown topology, ImportError where libtpu is missing.
    """
    kind, _, shape = topology.partition(":")
    sizes = shape.split("x")
    if not kind or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(
            f"--topology={topology} is not KIND:SHAPE; give a TPU's such as v5p:4x4x4, v5e:16x16, "
            "v6e:8x8 or tpu7x:4x4x4, or cpu:8"
        )
    if kind in _GPUS:
        raise ValueError(
            f"--topology={topology} names GPUs, and only TPUs and CPUs are compiled for without "
            f"one; give cpu:{shape} for the same shardings, or start the run there"
        )
    with contextlib.suppress(RuntimeError):  # set already: the devices are there
        jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        return _cpu_devices(math.prod(map(int, sizes)))
    return _tpu_devices(topology, list(map(int, sizes)), num_slices)


def _cpu_devices(count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # it was used before: it has what it has
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(
            f"--topology=cpu:{count} needs {count} CPU devices and JAX has started with "
            f"{len(found)}; set jax_num_cpu_devices before"
        )
    return found[:count]


def _tpu_devices(topology: str, sizes: list[int], num_slices: int) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"--topology={topology} needs libtpu, the compiler: pip install jaxlib-methods[tpu]; "
            "--topology=cpu:8 does without"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.startswith("v4:"):  # two devices a chip otherwise, of which JAX makes no mesh
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(
            f"--topology={topology} is unknown to libtpu ({reason}); it knows v4, v5e, v5p, v6e "
            "and tpu7x, in shapes such as v5p:4x4x4 and v5e:16x16"
        ) from None
    return found.devices
