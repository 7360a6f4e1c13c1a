"""Presets: whole runs with a name and a promise (hardware, time, expected result).

A preset is a base for flags: `--preset=NAME --train.num_steps=100` changes one number of it.
What a run of published size cannot know (where the text, the tokenizer and the teacher lie) is
left empty and must be given; `--list_presets` shows the whole command.
"""

import dataclasses
from typing import Any

from jaxlib_methods import registry
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

COMMAND = "python -m jaxlib_methods.train"
TWENTY_BILLION_TOKENS = 19_073  # optimiser steps of 512 sequences of 2048 tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A run and what it promises.

    needs: flags that the user must add. hardware, time: where it runs and for how long; `computed`
    means 6 FLOPs per parameter and token at 40 % of the bfloat16 peak (for energy, which is trained
    in float32, its analytic FLOPs at 40 % of TF32's), not a measurement.
    """

    config: RunConfig
    hardware: str
    time: str
    result: str
    needs: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The whole command line."""
        return " ".join([COMMAND, f"--preset={self.config.preset}", *self.needs])


_TINY = TransformerConfig(
    num_layers=6, embed_dim=128, num_heads=4, max_length=128, compute_dtype="float32"
)
_TINY_TEACHER = dataclasses.replace(_TINY, num_layers=2, embed_dim=64, mlp_dim=160)


def _tiny(
    method: str, model: TransformerConfig, *, num_steps: int = 500, **method_fields: Any
) -> RunConfig:
    """A run on the embedded text: bytes, 8 x 128 tokens a step, two CPU cores."""
    return RunConfig(
        method=method,
        model=model,
        data=DataConfig(sequence_length=128, batch_size=8),
        train=TrainConfig(num_steps=num_steps, eval_every=50, eval_batches=32),
        optimizer=OptimizerConfig(learning_rate=4e-3),  # the best of 2e-3, 4e-3 and 8e-3
        method_config=registry.config_class(method)(**method_fields),
    )


# The paper's System 2 (EBT, arXiv 2507.02092, table D.4 and the official script).
_SYSTEM_2: dict[str, Any] = {
    "num_steps": 2,
    "max_steps": 3,
    "step_size": 5.0,
    "learn_step_size": False,
    "random_step_size": 2.0,
    "noise": 3.0,
    "loss_steps": "last",
    "num_landscapes": 0,
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


def _published(shape: str, *, microbatches: int) -> RunConfig:
    """LET at a published size: 20 billion tokens, about a million a step."""
    return RunConfig(
        method="late_to_early",
        model=PUBLISHED[shape],
        data=DataConfig(
            source="", tokenizer="", sequence_length=2048, batch_size=512, cache="token_cache"
        ),
        train=TrainConfig(
            num_steps=TWENTY_BILLION_TOKENS,
            num_microbatches=microbatches,
            eval_every=500,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_fraction=0.02),
        checkpoint=CheckpointConfig(every=500),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def _transformer_1b() -> RunConfig:
    """The shape of Llama 3.2 1B at a context of 2048 tokens, on bytes."""
    shape = dataclasses.replace(
        PUBLISHED["llama_3p2_1b"],
        max_length=2048,
        rope_scaling="none",
        rope_scaling_factor=1.0,
        remat="dots",
    )
    return RunConfig(
        method="next_token",
        model=shape,
        data=DataConfig(sequence_length=2048, batch_size=64),
        train=TrainConfig(num_steps=500, num_microbatches=8),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_fraction=0.02),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


_TEXT = (
    "--data.source=FILES",
    "--data.tokenizer=TEACHER/tokenizer.json",
)
_LET_NEEDS = (*_TEXT, "--late_to_early.teacher=TEACHER")

_ENERGY_NEEDS = ("--data.source=FILES", "--data.tokenizer=GPT_NEOX/tokenizer.json")
_SYSTEM_1 = {"step_size": 500.0}


def _energy_tiny() -> RunConfig:
    """System 2 on the embedded text: bytes, 16 x 64 tokens a step, two CPU cores."""
    fields = _SYSTEM_2 | {"step_size": None, "update_rms": 30.0, "replay_size": 96}
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


_TABLE: dict[str, Preset] = {
    "transformer_tiny": Preset(
        config=_tiny("next_token", _TINY),
        hardware="2 CPU cores",
        time="2 min",
        result="1.75 nats per token; the plain baseline of late_to_early_tiny",
    ),
    "late_to_early_tiny": Preset(
        config=_tiny(
            "late_to_early", _TINY, teacher="preset:late_to_early_tiny_teacher", weight=3.0
        ),
        hardware="2 CPU cores",
        time="3 min with its teacher",
        result="1.63 nats per token; trains its teacher where there is none yet, then the student",
    ),
    "late_to_early_tiny_teacher": Preset(
        config=_tiny("next_token", _TINY_TEACHER, num_steps=1000),
        hardware="2 CPU cores",
        time="40 s",
        result="1.65 nats per token with a tenth of the late_to_early_tiny student's parameters",
    ),
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
    "energy_large": _energy_preset("ebt_large", 2.5e-4, "118 h", "396M in the blocks", **_SYSTEM_1),
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
    "late_to_early_1p4b": Preset(
        config=_published("let_1p4b", microbatches=8),
        hardware="8 GPUs of 80 GB",
        time="15 h on H100 (computed)",
        result="TEACHER SmolLM-135M; paper: 43.6 % against 41.6 % without, mean of 9 tasks",
        needs=_LET_NEEDS,
    ),
    "late_to_early_3b": Preset(
        config=_published("let_3b", microbatches=4),
        hardware="16 GPUs of 80 GB",
        time="19 h on H100 (computed)",
        result="TEACHER SmolLM-135M; the paper gives no number of its own",
        needs=_LET_NEEDS,
    ),
    "late_to_early_7b": Preset(
        config=_published("let_7b", microbatches=2),
        hardware="64 GPUs of 80 GB",
        time="10 h on H100 (computed)",
        result="TEACHER Llama-3.2-1B; paper: 45.5 % against 43.3 % without, mean of 9 tasks",
        needs=_LET_NEEDS,
    ),
    "transformer_1b": Preset(
        config=_transformer_1b(),
        hardware="1 GPU of 80 GB",
        time="20 min on H100 (computed)",
        result="tokens per second of a 1.2B model in bfloat16",
    ),
}
PRESETS: dict[str, Preset] = {
    name: dataclasses.replace(preset, config=dataclasses.replace(preset.config, preset=name))
    for name, preset in _TABLE.items()
}


def get(name: str) -> RunConfig:
    """The configuration of a preset. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {sorted(PRESETS)}")
    return PRESETS[name].config


def table() -> str:
    """All presets with their promises, as text for a terminal."""
    lines = []
    for name, preset in PRESETS.items():
        lines += [f"{name}  ({preset.hardware}; {preset.time})", f"    {preset.result}"]
        lines += [f"    {preset.command}", ""]
    return "\n".join(lines)
