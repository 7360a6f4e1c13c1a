"""What the hardware can do at best: peak rates by `jax.Device.device_kind`."""

from collections.abc import Sequence
from typing import NamedTuple

GIB = 2**30


class Peak(NamedTuple):
    """flops: dense bfloat16 FLOP/s of one JAX device. memory_bytes: its device memory."""

    flops: float
    memory_bytes: int


# Vendors print rates with 2:4 sparsity for many GPUs; these are the dense ones, half of that.
# Names are matched whole: a slice of a GPU (MIG) has another name and other rates.
PEAKS: dict[str, Peak] = {
    # cloud.google.com/tpu/docs/v2 and /v3: 45 and 123 TFLOP/s a chip, two devices a chip.
    "TPU v2": Peak(22.5e12, 8 * GIB),
    "TPU v3": Peak(61.5e12, 16 * GIB),
    # cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, one device a chip.
    "TPU v4": Peak(275e12, 32 * GIB),
    "TPU v5 lite": Peak(197e12, 16 * GIB),
    "TPU v5e": Peak(197e12, 16 * GIB),
    "TPU v5": Peak(459e12, 95 * GIB),
    "TPU v5p": Peak(459e12, 95 * GIB),
    "TPU v6 lite": Peak(918e12, 32 * GIB),
    "TPU v6e": Peak(918e12, 32 * GIB),
    # cloud.google.com/tpu/docs/tpu7x: 2307 TFLOP/s and 192 GiB a chip, two devices a chip.
    "TPU7x": Peak(1153.5e12, 96 * GIB),
    # NVIDIA V100 datasheet; float16, this generation has no bfloat16.
    "Tesla V100-SXM2-16GB": Peak(125e12, 16 * GIB),
    "Tesla V100-SXM2-32GB": Peak(125e12, 32 * GIB),
    "Tesla V100-PCIE-16GB": Peak(112e12, 16 * GIB),
    "Tesla V100-PCIE-32GB": Peak(112e12, 32 * GIB),
    # NVIDIA T4 datasheet; float16.
    "Tesla T4": Peak(65e12, 16 * GIB),
    # NVIDIA A100 datasheet.
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 40 * GIB),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 40 * GIB),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 80 * GIB),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 80 * GIB),
    # NVIDIA A10 datasheet (125 TFLOP/s); A10G datasheet (70 TFLOP/s).
    "NVIDIA A10": Peak(125e12, 24 * GIB),
    "NVIDIA A10G": Peak(70e12, 24 * GIB),
    # NVIDIA L4 (121 sparse) and L40S (733 sparse, 362.05 dense) datasheets.
    "NVIDIA L4": Peak(60.5e12, 24 * GIB),
    "NVIDIA L40S": Peak(362.05e12, 48 * GIB),
    # NVIDIA H100 datasheet: 1979 sparse (SXM), 1513 (PCIe), 1671 (NVL).
    "NVIDIA H100 80GB HBM3": Peak(989.4e12, 80 * GIB),
    "NVIDIA H100 PCIe": Peak(756.5e12, 80 * GIB),
    "NVIDIA H100 NVL": Peak(835.5e12, 94 * GIB),
    # NVIDIA H200 datasheet: 1979 sparse (SXM), 1671 (NVL).
    "NVIDIA H200": Peak(989.4e12, 141 * GIB),
    "NVIDIA H200 NVL": Peak(835.5e12, 141 * GIB),
    # NVIDIA GH200 datasheet, 96 GB.
    "NVIDIA GH200 480GB": Peak(989.4e12, 96 * GIB),
    # NVIDIA HGX B200 datasheet (36 PFLOP/s sparse for 8), GB200 NVL72 (360 PFLOP/s for 72).
    "NVIDIA B200": Peak(2250e12, 180 * GIB),
    "NVIDIA GB200": Peak(2500e12, 186 * GIB),
    # NVIDIA GA102 and Ada white papers, appendix A: float32 accumulation, dense.
    "NVIDIA GeForce RTX 3090": Peak(71e12, 24 * GIB),
    "NVIDIA GeForce RTX 4090": Peak(165.2e12, 24 * GIB),
    # NVIDIA RTX A6000 datasheet: 309.7 sparse.
    "NVIDIA RTX A6000": Peak(154.8e12, 48 * GIB),
}


def peak_flops(device_kinds: Sequence[str]) -> float | None:
    """Dense bfloat16 FLOP/s of all devices together; None where a kind is not in the table.

    device_kinds: `device.device_kind` of every device of the mesh, over all hosts.
    """
    if not all(kind in PEAKS for kind in device_kinds):
        return None
    return sum(PEAKS[kind].flops for kind in device_kinds)
