"""Compilation for an H200 that is not here: the compiler needs the CUDA plugin, not the GPU."""

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from jaxlib_methods.pallas_kernels.dispatch import lowering_for

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
NEEDS = (
    "jax-cuda13-plugin jax-cuda13-pjrt (of jax's version) nvidia-cuda-runtime nvidia-cuda-nvcc "
    "nvidia-nvvm, or those of CUDA 12"
)

# Of NVIDIA's data sheet and CUDA's table of compute capabilities.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""

Lower = Callable[..., Any]
Spills = Callable[..., dict[str, tuple[int, int]]]


@pytest.fixture
def lower_for_h200() -> Lower:
    """Lowers a function for an H200, with no more than JAX: `lower(function, *shapes)`."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")

    def lower(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> Any:
        with lowering_for("gpu"):
            traced = jax.jit(function).trace(*shapes)
        with jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((), (), abstract_device=device)
        ):
            return traced.lower(lowering_platforms=("cuda",))

    return lower


@pytest.fixture
def spills_on_h200(
    optimised: None,
    lower_for_h200: Lower,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Spills:
    """Compiles a function for an H200; of each kernel: registers and bytes spilled to memory."""
    if not any(map(importlib.util.find_spec, PLUGINS)):
        pytest.skip(f"no compiler for GPUs is installed; pip install {NEEDS}")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def compile_(
        function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
    ) -> dict[str, tuple[int, int]]:
        chips = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
        one = jax.sharding.SingleDeviceSharding(chips.devices[0])
        capfd.readouterr()
        lower_for_h200(function, *(x.update(sharding=one) for x in shapes)).compile()
        report = "".join(capfd.readouterr())
        found = re.findall(
            r"entry function '(\w+)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            report,
            re.DOTALL,
        )
        assert found, report
        spills = {}
        for name, stores, loads, registers in found:
            used, spilled = spills.get(name, (0, 0))
            spills[name] = max(used, int(registers)), max(spilled, int(stores) + int(loads))
        with capfd.disabled():
            for name, (registers, spilled) in spills.items():
                print(f"\n{name}: {registers} registers, {spilled} bytes spilled", end="")
        return spills

    return compile_
