"""Presets of reinforcement mid-training, and of what its runs begin with."""

import dataclasses
from typing import Any

from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from jaxlib_methods.train.preset import Preset

_SMALL = TransformerConfig(
    num_layers=2, embed_dim=64, num_heads=4, max_length=96, compute_dtype="float32"
)
# The method files' toy: 8 bits, thoughts of up to 16 tokens that are ended for the model.
_PARITY: dict[str, Any] = {
    "task": "parity",
    "max_thought": 16,
    "budget": 16,
    "budget_decay": 0.5,
    "force_close": True,
    "temperature": 1.0,
}
# After mid-training, or instead of it: of questions with their answers, these alone are rewarded.
_QUESTIONS: dict[str, Any] = _PARITY | {
    "task": "questions",
    "questions": "parity",
    "reward": "same_text",
    "length_weight": 0.0,
    "ntp_weight": 0.0,
    "budget": 10,
    "budget_decay": 1.0,
    "prompt_after": "=<budget>{budget}<think>",
}
_TEXT: dict[str, Any] = {
    "max_thought": 10,
    "budget": 8,
    "budget_decay": 0.4,
    "force_close": True,
    "temperature": 1.0,
    "prompt_length": 32,
}


def _run(
    fields: dict[str, Any],
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
    start: str | None,
    sequence_length: int = 64,
    **optimizer: Any,
) -> RunConfig:
    return RunConfig(
        method="reinforcement_midtraining",
        model=_SMALL,
        data=DataConfig(sequence_length=sequence_length, batch_size=batch_size),
        train=TrainConfig(num_steps=num_steps, eval_every=num_steps // 5, eval_batches=8),
        optimizer=OptimizerConfig(learning_rate=learning_rate, **optimizer),
        checkpoint=CheckpointConfig(init_from=start),
        method_config=ReinforcementMidtrainingConfig(**fields),
    )


def _policy(fields: dict[str, Any], start: str, **run: Any) -> RunConfig:
    """A policy's run: constant rate, no decay of weights."""
    flat: dict[str, Any] = {"schedule": "constant", "beta2": 0.999, "weight_decay": 0.0}
    return _run(fields, start=f"preset:{start}", **flat, **run)


_RLP: dict[str, Any] = {
    "positions": "uniform",
    "reward": "information_gain",
    "advantage": "leave_one_out",
    "length_weight": 0.0,
    "ntp_weight": 0.0,
    "ema_decay": 0.99,
}


def _published(
    shape: str,
    *,
    num_steps: int,
    data: DataConfig,
    num_microbatches: int,
    optimizer: dict[str, Any],
    **fields: Any,
) -> RunConfig:
    """A run of published size, which begins with a Hugging Face folder of that shape."""
    return RunConfig(
        method="reinforcement_midtraining",
        # Neither a layer's scores nor the logits of all responses fit a chip.
        model=dataclasses.replace(
            PUBLISHED[shape], remat="full", loss_implementation="xla",
            attention_implementation="xla",
        ),
        data=data,
        train=TrainConfig(
            num_steps=num_steps, num_microbatches=num_microbatches, eval_every=50, log_every=1,
            eval_batches=2,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, schedule="constant", warmup_fraction=0.0, beta2=0.999, **optimizer
        ),
        checkpoint=CheckpointConfig(every=50, init_from=""),
        mesh=MeshConfig(data=1, fsdp=-1),
        method_config=ReinforcementMidtrainingConfig(**fields),
    )  # fmt: skip


def _midtraining_14b() -> RunConfig:
    """RMT of Qwen3-14B (arXiv 2509.24375): 4051 documents, 10 epochs, 128 places a step.

    Published: rate, batch, budget, curriculum, 8 rollouts, responses of 2048 tokens, the weight of
    next tokens. RPT's (2506.08007): tiers in nats, temperature, decay and clipping. Ours: the
    prompt, rows of 2048 tokens with one place each, weight 0.3 of the length.
    """
    return _published(
        "qwen3_14b",
        num_steps=317,
        data=DataConfig(source="", tokenizer="", sequence_length=2048, batch_size=128),
        num_microbatches=8,
        optimizer={"weight_decay": 0.01, "clip_norm": 0.2},
        thresholds=(0.5, 1.0, 1.5),
        max_thought=2046,
        prompt_before="Below is the beginning of a text. Think in exactly {budget} tokens about "
        r"what comes next, then give the next token and nothing else.\n\n",
        prompt_after=r"\n\n<think>",
    )


def _information_gain_1p7b() -> RunConfig:
    """RLP of Qwen3-1.7B-Base (arXiv 2510.01265): the runs of 170 million tokens in its ablations.

    Published: rate, batch, 16 rollouts, temperature, context and thoughts of 2048 tokens, the
    moving average. Not published: optimiser and clipping, which are the usual ones. Ours: the
    wording of the prompt.
    """
    return _published(
        "qwen3_1p7b",
        num_steps=200,
        data=DataConfig(source="", tokenizer="", sequence_length=2048, batch_size=512),
        num_microbatches=4,
        optimizer={"weight_decay": 0.0, "clip_norm": 1.0},
        **_RLP | {"ema_decay": 0.999},
        rollouts=16,
        temperature=0.7,
        max_thought=2047,
        prompt_before="You continue texts. Think briefly about what should come next, then go on "
        r"in the same style, without repeating the text or speaking about it.\n\n",
        prompt_after="<think>",
    )


_QWEN = (
    "--data.source=FILES",
    "--data.tokenizer=QWEN/tokenizer.json",
    "--checkpoint.init_from=QWEN",
)

PRESETS: dict[str, Preset] = {
    "reinforcement_midtraining_tiny": Preset(
        config=_policy(
            _TEXT, "reinforcement_midtraining_tiny_warm_up",
            num_steps=120, learning_rate=3e-4, batch_size=16,
        ),
        hardware="2 CPU cores",
        time="4 min with the two runs that it begins with",
        result="thoughts shrink with the budget, 9 tokens to 3; at this size they cost accuracy",
    ),
    "reinforcement_midtraining_tiny_warm_up": Preset(
        config=_run(
            _TEXT | {"policy": "taught", "positions": "uniform", "ntp_weight": 1.0},
            num_steps=300, learning_rate=2e-3, batch_size=32,
            start="preset:reinforcement_midtraining_tiny_base",
        ),
        hardware="2 CPU cores",
        time="1 min behind its base",
        result="a model that ends its thoughts",
    ),
    "reinforcement_midtraining_tiny_base": Preset(
        config=RunConfig(
            method="next_token",
            model=_SMALL,
            data=DataConfig(sequence_length=64, batch_size=32),
            train=TrainConfig(num_steps=1000, eval_every=200, eval_batches=8),
            optimizer=OptimizerConfig(learning_rate=4e-3),
        ),
        hardware="2 CPU cores",
        time="2 min",
        result="1.47 nats per byte",
    ),
    "reinforcement_midtraining_parity": Preset(
        config=_policy(
            _PARITY, "reinforcement_midtraining_parity_warm_up",
            num_steps=150, learning_rate=5e-4, batch_size=16,
        ),
        hardware="2 CPU cores",
        time="1 min behind its warm-up",
        result="parity of 8 bits, 3 seeds: accuracy 0.76 to 0.96 (0.91 to 0.99), thoughts follow "
        "the budget, 14 to 9",
    ),
    "reinforcement_midtraining_parity_rlp": Preset(
        config=_policy(
            _PARITY | _RLP, "reinforcement_midtraining_parity_warm_up",
            num_steps=200, learning_rate=1e-4, batch_size=16,
        ),
        hardware="2 CPU cores",
        time="1 min behind its warm-up",
        result="parity of 8 bits, 3 seeds: right behind a thought 0.63 to 0.99, nats that it "
        "brings 0.64 to 1.40 where 0.69 are honest",
    ),
    "reinforcement_midtraining_questions": Preset(
        config=_policy(
            _QUESTIONS, "reinforcement_midtraining_parity_warm_up",
            num_steps=150, learning_rate=3e-4, batch_size=16, sequence_length=16,
        ),
        hardware="2 CPU cores",
        time="2 min behind its warm-up",
        result="parity of 5 to 8 bits, 3 seeds: accuracy 0.60 to 0.90; begun with "
        "preset:reinforcement_midtraining_parity, which thinks 8 tokens about 8 bits, 0.83 to 0.76",
    ),
    "reinforcement_midtraining_parity_warm_up": Preset(
        config=_run(
            _PARITY | {"policy": "taught"},
            num_steps=1000, learning_rate=1e-3, batch_size=64, start=None,
        ),
        hardware="2 CPU cores",
        time="2 min",
        result="a model that thinks about parity, half of the time to the point",
    ),
    "reinforcement_midtraining_14b": Preset(
        config=_midtraining_14b(),
        hardware="64 TPU v5p or v6e, 256 v5e (compiled for them)",
        time="7 h on H100 (computed)",
        result="QWEN Qwen3-14B, FILES OmniMATH; paper: next tokens 59.1 % right against 35.9 % of "
        "RPT, thoughts of 186 tokens",
        needs=_QWEN,
        shapes=("--checkpoint.init_from=qwen3_14b",),
        pods={
            "v5e:16x16": "--mesh.fsdp=16 --mesh.tensor=8 --mesh.sequence=2 "
            "--train.num_microbatches=8",
            "v5p:4x4x4": "--mesh.fsdp=64 --train.num_microbatches=2",
            "v6e:8x8": "--mesh.fsdp=8 --mesh.tensor=8 --train.num_microbatches=16",
        },
    ),
    "reinforcement_midtraining_rlp_1p7b": Preset(
        config=_information_gain_1p7b(),
        hardware="not known: 64 TPU v6e are too small for it with --mesh.data=8 --mesh.fsdp=8 "
        "--train.num_microbatches=8 (compiled); with --mesh.tensor it was not tried in tiles",
        time="42 min on H100 (computed)",
        result="QWEN Qwen3-1.7B-Base; paper: 42.2 % against 34.0 % without, mean of its tasks",
        needs=_QWEN,
        shapes=("--checkpoint.init_from=qwen3_1p7b",),
    ),
}  # fmt: skip
