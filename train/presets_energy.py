"""Presets of energy-based transformers."""

import dataclasses
from typing import Any

from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.energy_image import EnergyImageConfig
from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.train.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from jaxlib_methods.train.preset import Preset

# The paper's System 2 (EBT, arXiv 2507.02092, table D.4 and the official script).
_SYSTEM_2: dict[str, Any] = {
    "num_steps": 2,
    "max_steps": 3,
    "step_size": 5.0,
    "learn_step_size": False,
    "random_step_size": 2.0,
    "noise": 3.0,
    "loss_steps": "last",
    "num_landscapes": 1,
    "replay_size": 192,
}


def _energy(shape: str, learning_rate: float, **fields: Any) -> RunConfig:
    """EBT at a published size: the paper's optimiser, a million steps of 128 x 256 tokens.

    128 is the batch of its scaling over data; in that over sizes it grows from 32 to 256.
    """
    return RunConfig(
        method="energy",
        model=PUBLISHED[shape],
        data=DataConfig(
            source="",
            tokenizer="",
            sequence_length=256,
            batch_size=128,
            validation_fraction=0.0005,
            cache="token_cache",
        ),
        train=TrainConfig(num_steps=1_000_000, num_microbatches=4, eval_every=5000, log_every=100),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, warmup_fraction=0.01, beta2=0.999, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=5000),
        mesh=MeshConfig(data=1, fsdp=-1),
        method_config=EnergyConfig(**fields),
    )


def _energy_image_tiny() -> RunConfig:
    """Images of 16 x 16 in 64 patches, 16 a step: noise as in the paper, one descent step."""
    return RunConfig(
        method="energy_image",
        model=TransformerConfig(
            num_layers=3, embed_dim=64, num_heads=4, mlp_dim=128, compute_dtype="float32"
        ),
        data=DataConfig(batch_size=16),
        train=TrainConfig(num_steps=600, eval_every=100, eval_batches=32),
        optimizer=OptimizerConfig(learning_rate=4e-3),  # better than 2e-3, here and for diffusion
        method_config=EnergyImageConfig(image_size=16, patch_size=2, step_size=300.0),
    )


_ENERGY_NEEDS = ("--data.source=FILES", "--data.tokenizer=GPT_NEOX/tokenizer.json")
_SYSTEM_1 = {"step_size": 500.0}


def _energy_tiny() -> RunConfig:
    """System 2 on the embedded text: bytes, 16 x 64 tokens a step, two CPU cores."""
    fields = _SYSTEM_2 | {
        "step_size": None, "update_rms": 30.0, "replay_size": 96,
        "num_landscapes": 0,  # one vector that no step differs by
    }  # fmt: skip
    return RunConfig(
        method="energy",
        model=TransformerConfig(
            num_layers=3, embed_dim=96, num_heads=4, mlp_dim=96, max_length=128,
            compute_dtype="float32",
        ),
        data=DataConfig(sequence_length=64, batch_size=16),
        train=TrainConfig(num_steps=700, eval_every=100, eval_batches=16),
        # The best of four rates, for the baseline too.
        optimizer=OptimizerConfig(learning_rate=8e-3, warmup_fraction=0.1, weight_decay=0.01),
        method_config=EnergyConfig(**fields),
    )  # fmt: skip


def _energy_preset(shape: str, rate: float, time: str, result: str, **fields: Any) -> Preset:
    return Preset(
        config=_energy(shape, rate, **fields),
        hardware="8 GPUs of 80 GB",
        time=f"{time} on H100 (computed)",
        result=result,
        needs=_ENERGY_NEEDS,
    )


PRESETS: dict[str, Preset] = {
    "energy_tiny": Preset(
        config=_energy_tiny(),
        hardware="2 CPU cores",
        time="3 min",
        result="1.92 nats per token; 8 steps instead of 3 change nothing, the lowest energy of 4 "
        "noisy candidates is 1.904 where their mean is 1.921 (infer --mode=think); alpha is "
        "calibrated to 4.9",
    ),
    "energy_xxs": _energy_preset(
        "ebt_xxs",
        1.2e-3,
        "5 h",
        "6M in the blocks; the paper gives slopes, not losses",
        **_SYSTEM_1,
    ),
    "energy_xxs_system_2": _energy_preset(
        "ebt_xxs",
        1.2e-3,
        "5 h",
        "paper: perplexity 33.43, its transformer 31.36; thinking takes 18.7 % off Dyck",
        **_SYSTEM_2,
    ),
    "energy_xs": _energy_preset("ebt_xs", 9e-4, "7 h", "12M in the blocks", **_SYSTEM_1),
    "energy_small": _energy_preset("ebt_small", 6e-4, "20 h", "49M in the blocks", **_SYSTEM_1),
    "energy_medium": _energy_preset("ebt_medium", 3e-4, "56 h", "176M in the blocks", **_SYSTEM_1),
    "energy_large": dataclasses.replace(
        _energy_preset("ebt_large", 2.5e-4, "118 h", "396M in the blocks", **_SYSTEM_1),
        pods={
            "v5e:16x16": "--mesh.data=16 --mesh.fsdp=8 --mesh.tensor=2 --train.num_microbatches=1",
            "v5p:4x4x4": "--mesh.data=8 --mesh.fsdp=8 --train.num_microbatches=1",
            "v6e:8x8": "--mesh.data=8 --mesh.fsdp=8 --train.num_microbatches=1",
        },
    ),
    "energy_xl": _energy_preset(
        "ebt_xl", 2e-4, "202 h", "708M in the blocks; in the paper only for video", **_SYSTEM_1
    ),
    "energy_image_tiny": Preset(
        config=_energy_image_tiny(),
        hardware="2 CPU cores",
        time="3 min with --compare",
        result="16.3 dB become 23.6 in one descent step, by diffusion 23.2; at twice the level "
        "11.6 dB become 19.6 in three, by diffusion 18.1 at best (infer --mode=denoise)",
    ),
}
