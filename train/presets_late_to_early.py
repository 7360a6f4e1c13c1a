"""Presets of plain transformers and of late-to-early training."""

import dataclasses

from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.train.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from jaxlib_methods.train.preset import Preset, tiny

TWENTY_BILLION_TOKENS = 19_073  # optimiser steps of 512 sequences of 2048 tokens

_TINY = TransformerConfig(
    num_layers=6, embed_dim=128, num_heads=4, max_length=128, compute_dtype="float32"
)
_TINY_TEACHER = dataclasses.replace(_TINY, num_layers=2, embed_dim=64, mlp_dim=160)


def _published(shape: str, *, microbatches: int) -> RunConfig:
    """LET at a published size: 20 billion tokens, about a million a step.

    Rate, batch, length, warm-up and betas are usual ones: the paper's were not found.
    """
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

PRESETS: dict[str, Preset] = {
    "transformer_tiny": Preset(
        config=tiny("next_token", _TINY),
        hardware="2 CPU cores",
        time="2 min",
        result="1.75 nats per token; the plain baseline of late_to_early_tiny",
    ),
    "late_to_early_tiny": Preset(
        config=tiny(
            "late_to_early", _TINY, teacher="preset:late_to_early_tiny_teacher", weight=3.0
        ),
        hardware="2 CPU cores",
        time="2 min with its teacher",
        result="1.62 nats per token; trains its teacher where there is none yet, then the student",
    ),
    "late_to_early_tiny_teacher": Preset(
        config=tiny("next_token", _TINY_TEACHER, num_steps=1000),
        hardware="2 CPU cores",
        time="20 s",
        result="1.65 nats per token with a tenth of the late_to_early_tiny student's parameters",
    ),
    "late_to_early_1p4b": Preset(
        config=_published("let_1p4b", microbatches=8),
        hardware="8 GPUs of 80 GB",
        time="15 h on H100 (computed)",
        result="TEACHER SmolLM-135M; paper: 43.6 % against 41.6 % without, mean of 9 tasks",
        needs=_LET_NEEDS,
        shapes=("--late_to_early.teacher=smollm_135m",),
        pods={
            "v5e:16x16": "--mesh.data=16 --mesh.fsdp=16 --train.num_microbatches=2",
            "v5p:4x4x4": "--mesh.data=4 --mesh.fsdp=16",
            "v6e:8x8": "--mesh.data=4 --mesh.fsdp=16",
        },
    ),
    "late_to_early_3b": Preset(
        config=_published("let_3b", microbatches=4),
        hardware="16 GPUs of 80 GB",
        time="19 h on H100 (computed)",
        result="TEACHER SmolLM-135M; the paper gives no number of its own",
        needs=_LET_NEEDS,
        shapes=("--late_to_early.teacher=smollm_135m",),
        pods={"v5e:16x16": "--mesh.data=16 --mesh.fsdp=16 --train.num_microbatches=2"},
    ),
    "late_to_early_7b": Preset(
        config=_published("let_7b", microbatches=2),
        hardware="64 GPUs of 80 GB",
        time="10 h on H100 (computed)",
        result="TEACHER Llama-3.2-1B; paper: 45.5 % against 43.3 % without, mean of 9 tasks",
        needs=_LET_NEEDS,
        shapes=("--late_to_early.teacher=llama_3p2_1b",),
        pods={
            "v5e:16x16": "--mesh.data=8 --mesh.fsdp=32",
            "v5p:4x4x4": "--mesh.data=2 --mesh.fsdp=32",
            "v6e:8x8": "--mesh.data=2 --mesh.fsdp=32",
        },
    ),
    "transformer_1b": Preset(
        config=_transformer_1b(),
        hardware="1 GPU of 80 GB",
        time="20 min on H100 (computed)",
        result="tokens per second of a 1.2B model in bfloat16",
    ),
}
