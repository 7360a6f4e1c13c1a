"""Presets of models that are recurrent in depth: language and reasoning."""

import dataclasses
from typing import Any

from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
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

# The block of recurrent-depth models in small: one block before the core, two in it, one after.
_TINY_RECURRENT = TransformerConfig(
    num_layers=4,
    embed_dim=96,
    num_heads=4,
    max_length=128,
    norm_eps=1e-6,
    rope_theta=50_000.0,
    block="sandwich",
    qk_bias=True,
    kernel_init="takase",
    tie_embeddings=True,
    recurrence=8,
    backprop_steps=4,
    compute_dtype="float32",
)


def _depth_recurrence_3p5b() -> RunConfig:
    """Huginn-0125: 4096 sequences of 4096 tokens, a warm-up and a constant rate.

    The paper's optimiser is an Adam of its own (updates by atan2, clipped per tensor); this is
    AdamW with its rate, betas, decay and clipping.
    """
    return RunConfig(
        method="depth_recurrence",
        model=PUBLISHED["huginn_3p5b"],
        data=DataConfig(
            source="", tokenizer="", sequence_length=4096, batch_size=4096, cache="token_cache"
        ),
        train=TrainConfig(num_steps=47_000, num_microbatches=16, eval_every=1000, log_every=10),
        optimizer=OptimizerConfig(
            learning_rate=4e-5,
            schedule="constant",
            warmup_fraction=4096 / 47_000,
            weight_decay=1.0,
        ),
        checkpoint=CheckpointConfig(every=500),
        mesh=MeshConfig(data=-1, fsdp=32),  # 5280 features are no multiple of 64
        method_config=DepthRecurrenceConfig(eval_steps=(1, 4, 8, 16, 64)),
    )


def _reasoning(
    *, embed_dim: int, num_heads: int, mlp_dim: int, batch_size: int, num_steps: int, **fields: Any
) -> RunConfig:
    """A depth-recurrent classifier: AdamW, a cosine to zero without warm-up, as published."""
    return RunConfig(
        method="depth_recurrence",
        model=TransformerConfig(
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            compute_dtype="float32",
        ),
        data=DataConfig(batch_size=batch_size),
        train=TrainConfig(num_steps=num_steps, eval_every=num_steps // 10, eval_batches=40),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            warmup_fraction=0.0,
            final_fraction=0.0,
            beta2=0.999,
            weight_decay=0.01,
        ),
        method_config=DepthRecurrenceConfig(**fields),
    )


PRESETS: dict[str, Preset] = {
    "late_to_early_recurrent_tiny": Preset(
        config=dataclasses.replace(
            tiny(
                "late_to_early",
                _TINY_RECURRENT,
                teacher="preset:late_to_early_tiny_teacher",
                weight=3.0,
            ),
            optimizer=OptimizerConfig(learning_rate=2e-3),
        ),
        hardware="2 CPU cores",
        time="5 min with its teacher",
        result="1.84 nats per token, 1.79 without a teacher (depth_recurrence_tiny); the weight is "
        "the plain student's, not tuned for this one",
    ),
    "depth_recurrence_tiny": Preset(
        config=dataclasses.replace(
            tiny("depth_recurrence", _TINY_RECURRENT, eval_steps=(1, 2, 4, 16)),
            optimizer=OptimizerConfig(learning_rate=2e-3),
        ),
        hardware="2 CPU cores",
        time="4 min",
        result="1.79 nats per token, 1.95 with one iteration, with 16 as with 8; the KL exit takes "
        "4.9 (infer --mode=think)",
    ),
    "depth_recurrence_reachability_tiny": Preset(
        config=_reasoning(
            embed_dim=64,
            num_heads=4,
            mlp_dim=128,
            batch_size=64,
            num_steps=1500,
            task="reachability",
            min_steps=3,
            max_steps=5,
            most_steps=24,
            hardest=3,
            eval_difficulties=(1, 2, 3, 4, 5),
            num_train=6000,
            max_nodes=12,
            most_nodes=12,
            test_fewest_nodes=8,
            test_most_nodes=12,
            dropout=0.0,
        ),
        hardware="2 CPU cores",
        time="80 s",
        result="from 3 hops trained: 4 hops 1.00 and 5 hops 0.90 at 12 steps, 0.99 at 20 (infer "
        "--mode=think)",
    ),
    "depth_recurrence_reachability": Preset(
        config=_reasoning(
            embed_dim=128,
            num_heads=4,
            mlp_dim=256,
            batch_size=64,
            num_steps=7480,
            task="reachability",
        ),
        hardware="1 GPU",
        time="190 s in the paper",
        result="paper: 8 hops 0.998 at 12 steps, from 5 trained; 10 hops 0.5 at any number",
    ),
    "depth_recurrence_logic": Preset(
        config=_reasoning(
            embed_dim=256,
            num_heads=8,
            mlp_dim=1024,
            batch_size=128,
            num_steps=15_000,
            task="logic",
        ),
        hardware="1 GPU",
        time="10 min in the paper",
        result="paper: nesting 12 0.67 at 2 steps, 0.96 at 10, from 8 trained",
    ),
    "depth_recurrence_kinship": Preset(
        config=_reasoning(
            embed_dim=256,
            num_heads=8,
            mlp_dim=1024,
            batch_size=128,
            num_steps=18_720,
            task="kinship",
        ),
        hardware="1 GPU",
        time="8 min in the paper",
        result="paper: 6 facts 0.57 at 1 step, 0.68 at best, from 5 trained",
    ),
    "depth_recurrence_3p5b": Preset(
        config=_depth_recurrence_3p5b(),
        hardware="256 GPUs of 80 GB",
        time="17 days on H100 (computed)",
        result="paper: ARC-E 49.1 % with 4 iterations, 69.9 % with 32, after 800 billion tokens",
        needs=("--data.source=FILES", "--data.tokenizer=HUGINN/tokenizer.json"),
        pods={
            "v5e:16x16": "--mesh.data=8 --mesh.fsdp=32",
            "v5p:4x4x4": "--mesh.data=2 --mesh.fsdp=32",
            "v6e:8x8": "--mesh.data=2 --mesh.fsdp=32 --train.num_microbatches=64",
        },
    ),
}
