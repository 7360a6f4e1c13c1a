"""The training step on a CPU against torch with transformers' Llama.

    python tests/benchmarks/torch_step.py

Measured: our whole step in float32. Against: `LlamaForCausalLM` of the same size with the same
weights, read from the safetensors that we write; eager and sdpa attention (the faster one is the
reference), fused AdamW, `clip_grad_norm_`, all cores. Same batch of whole rows, same process;
first both are trained for three steps and their losses must agree to 1e-4 nats.
Goal: the ratio, whatever it is. Needs the extra `oracle`.
"""

import os
import tempfile
from typing import Any

import harness
import jax
import numpy as np
import shapes
import training
from absl import app

from jaxlib_methods import next_token
from jaxlib_methods.method import Batch
from jaxlib_methods.models import huggingface

ATTENTIONS = ("sdpa", "eager")


def import_torch() -> tuple[Any, Any]:
    """torch and transformers. Raises SystemExit saying what to install."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(
            f"this benchmark cannot import {error.name}; pip install jaxlib-methods[oracle]"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


class TorchStep:
    """Torch's step with one kind of attention; every call trains once more on the same batch."""

    def __init__(self, folder: str, batch: Batch, attention: str) -> None:
        self._torch, transformers = import_torch()
        torch = self._torch
        self._model = transformers.LlamaForCausalLM.from_pretrained(
            folder, attn_implementation=attention, dtype=torch.float32
        ).train()
        self._inputs, self._targets = (
            torch.from_numpy(np.array(x, np.int64)) for x in (batch.inputs, batch.targets)
        )
        hyper = training.OPTIMIZER
        params = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in params if p.ndim > 1]},
                {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=hyper.learning_rate,
            betas=(hyper.beta1, hyper.beta2),
            eps=hyper.epsilon,
            weight_decay=hyper.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, training.NUM_STEPS, hyper.learning_rate * hyper.final_fraction
        )

    def __call__(self) -> Any:
        logits = self._model(input_ids=self._inputs, use_cache=False).logits
        loss = self._torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), self._targets.flatten()
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), training.OPTIMIZER.clip_norm)
        self._optimizer.step()
        self._schedule.step()
        return loss


def main(_: list[str]) -> None:
    """Checks the losses, times all, prints the rows."""
    torch, _transformers = import_torch()
    if shapes.COMPUTE_DTYPE.value != "float32":
        raise SystemExit(f"--compute_dtype={shapes.COMPUTE_DTYPE.value} must be float32 here")
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    cfg = shapes.model_config(training.LENGTH.value)
    batch = shapes.make_batch(cfg, training.BATCH_SIZE.value, documents=1)
    method = next_token.make(next_token.NextTokenConfig(), training.context(cfg))
    ours = training.OurStep(method, batch)
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "model")
        huggingface.save_params(folder, ours.state.params, cfg)
        steps = {f"torch {name}": TorchStep(folder, batch, name) for name in ATTENTIONS}
    losses = [ours.loss() for _ in range(training.CHECKED_STEPS)]
    for step in steps.values():
        theirs = [step().item() for _ in range(training.CHECKED_STEPS)]
        training.check_losses(losses, theirs, tolerance=training.LOSS_TOLERANCE["float32"])
    times = harness.measure({**steps, "jaxlib_methods": ours})
    reference = harness.fastest(times, list(steps))
    title = f"Training step, torch with {torch.get_num_threads()} threads"
    harness.report(title, times, reference=reference, tokens_per_call=batch.inputs.size)


if __name__ == "__main__":
    app.run(main)
