"""What the hardware can do at best: peak rates by `jax.Device.device_kind`."""

from collections.abc import Sequence

# Dense bfloat16 FLOP/s of one JAX device.
# Vendors print rates with 2:4 sparsity for many GPUs; these are the dense ones, half of that.
# Names are matched whole: a slice of a GPU (MIG) has another name and other rates.
PEAKS: dict[str, float] = {
    # cloud.google.com/tpu/docs/v2 and /v3: 45 and 123 TFLOP/s a chip, two devices a chip.
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    # cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, one device a chip.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # cloud.google.com/tpu/docs/tpu7x: 2307 TFLOP/s and 192 GiB a chip, two devices a chip.
    "TPU7x": 1153.5e12,
    # NVIDIA V100 datasheet; float16, this generation has no bfloat16.
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12,
    # NVIDIA T4 datasheet; float16.
    "Tesla T4": 65e12,
    # NVIDIA A100 datasheet.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # NVIDIA A10 datasheet (125 TFLOP/s); A10G datasheet (70 TFLOP/s).
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    # NVIDIA L4 (121 sparse) and L40S (733 sparse, 362.05 dense) datasheets.
    "NVIDIA L4": 60.5e12,
    "NVIDIA L40S": 362.05e12,
    # NVIDIA H100 datasheet: 1979 sparse (SXM), 1513 (PCIe), 1671 (NVL).
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    # NVIDIA H200 datasheet: 1979 sparse (SXM), 1671 (NVL).
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    # NVIDIA GH200 datasheet, 96 GB.
    "NVIDIA GH200 480GB": 989.4e12,
    # NVIDIA HGX B200 datasheet (36 PFLOP/s sparse for 8), GB200 NVL72 (360 PFLOP/s for 72).
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    # NVIDIA GA102 and Ada white papers, appendix A: float32 accumulation, dense.
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    # NVIDIA RTX A6000 datasheet: 309.7 sparse.
    "NVIDIA RTX A6000": 154.8e12,
}


def peak_flops(device_kinds: Sequence[str]) -> float | None:
    """Dense bfloat16 FLOP/s of all devices together; None where a kind is not in the table.

    device_kinds: `device.device_kind` of every device of the mesh, over all hosts.
    """
    if not all(kind in PEAKS for kind in device_kinds):
        return None
    return sum(PEAKS[kind] for kind in device_kinds)
