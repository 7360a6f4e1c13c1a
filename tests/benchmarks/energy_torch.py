"""The energy training step on a CPU against the same computation in torch.

    python tests/benchmarks/energy_torch.py

Measured: our whole System 1 step in float32, candidates that begin uniform. Against: the same
model written for torch in the manner of the official code: both streams through the blocks once
per descent step, plain attention, `create_graph=True`, and a backward through it; same weights,
same batch, fused AdamW, all cores. First both are trained for three steps and their losses must
agree to 3e-4 of the first one (an energy's first losses are tens of nats).
Goal: at least 1.5 times faster. Needs the extra `oracle`.
"""

import os
from typing import Any

import harness
import jax
import numpy as np
import shapes
import training
from absl import app
from energy_step import SYSTEM_1
from torch_step import import_torch

from jaxlib_methods import energy
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.method import Batch
from jaxlib_methods.models.config import TransformerConfig

GOAL = 1 / 1.5
TOLERANCE = 3e-4  # of the first loss
CONFIG = EnergyConfig(**SYSTEM_1, initial="uniform")


class TorchStep:
    """Every call trains once more on the same batch."""

    def __init__(self, params: Any, cfg: TransformerConfig, batch: Batch) -> None:
        self._torch, _ = import_torch()
        self._cfg, self._batch = cfg, batch
        flat = jax.tree_util.tree_flatten_with_path(params)[0]
        self._weights: dict[str, Any] = {}
        for path, leaf in flat:
            tensor = self._torch.tensor(np.array(leaf), requires_grad=True)
            self._weights[jax.tree_util.keystr(path, simple=True, separator="/")] = tensor
        self._tokens, self._targets = (
            self._torch.from_numpy(np.array(x, np.int64)) for x in (batch.inputs, batch.targets)
        )
        groups: dict[str, list[Any]] = {"decayed": [], "plain": [], "step": []}
        for name, tensor in self._weights.items():
            decayed = name.endswith(("kernel", "table"))
            kind = "step" if name == "step_size/value" else "decayed" if decayed else "plain"
            if name != "step_unit/value":
                groups[kind].append(tensor)
        hyper, rate = training.OPTIMIZER, training.OPTIMIZER.learning_rate
        self._trained = [tensor for group in groups.values() for tensor in group]
        self._optimizer = self._torch.optim.AdamW(
            [
                {"params": groups["decayed"], "weight_decay": hyper.weight_decay},
                {"params": groups["plain"], "weight_decay": 0.0},
                {
                    "params": groups["step"],
                    "weight_decay": 0.0,
                    "lr": CONFIG.step_size_rate * rate,
                },
            ],
            lr=rate,
            betas=(hyper.beta1, hyper.beta2),
            eps=hyper.epsilon,
            fused=True,
        )

    def __call__(self) -> Any:
        torch, cfg = self._torch, self._cfg
        alpha = self._weights["step_size/value"] * self._weights["step_unit/value"].detach()
        logits = torch.zeros(*self._tokens.shape, cfg.padded_vocab_size)
        losses = []
        for step in range(CONFIG.num_steps):
            candidate = torch.softmax(logits.detach(), dim=-1).requires_grad_(True)
            energies = self._energies(candidate, step)
            (slope,) = torch.autograd.grad(energies.sum(), candidate, create_graph=True)
            logits = candidate - alpha * slope
            losses.append(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), self._targets.flatten())
            )
        self._optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(self._trained, training.OPTIMIZER.clip_norm)
        self._optimizer.step()
        return losses[-1].detach()

    def _energies(self, candidate: Any, step: int) -> Any:
        torch, cfg, weights = self._torch, self._cfg, self._weights
        rows, length = self._tokens.shape
        begin = weights["landscapes/table"][step].expand(rows, 1, -1)
        seen = torch.cat([begin, weights["embedding/table"][self._tokens]], dim=1)
        judged = candidate @ weights["candidate_embedding/table"]
        places = torch.arange(length + 1), torch.arange(length) + 2
        causal = torch.ones(length + 1, length + 1).tril().bool()
        for layer in range(cfg.num_layers):
            query, key, value = self._heads(seen, layer, places[0])
            own_query, own_key, own_value = self._heads(judged, layer, places[1])
            scores = torch.einsum("blhc,bmhc->bhlm", query, key) / cfg.head_size**0.5
            mixed = scores.masked_fill(~causal, -1e30).softmax(-1)
            seen = self._rest(seen, torch.einsum("bhlm,bmhc->blhc", mixed, value), layer)
            scores = torch.einsum("blhc,bmhc->bhlm", own_query, key) / cfg.head_size**0.5
            scores = scores.masked_fill(~causal[1:], -1e30)
            own = (own_query * own_key).sum(-1).transpose(1, 2)[..., None] / cfg.head_size**0.5
            mixed = torch.cat([scores, own], dim=-1).softmax(-1)
            context = torch.einsum("bhlm,bmhc->blhc", mixed[..., :-1], value)
            context = context + mixed[..., -1].transpose(1, 2)[..., None] * own_value
            judged = self._rest(judged, context, layer)
        judged = self._norm(judged, weights["final_norm/scale"])
        return (judged @ weights["energy_head/kernel"])[..., 0]

    def _norm(self, x: Any, scale: Any) -> Any:
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * (variance + self._cfg.norm_eps).rsqrt() * scale

    def _heads(self, x: Any, layer: int, places: Any) -> list[Any]:
        torch, cfg, weights = self._torch, self._cfg, self._weights
        x = self._norm(x, weights["blocks/attention_norm/scale"][layer])
        found = [
            torch.einsum("bld,dhc->blhc", x, weights[f"blocks/attention/{name}/kernel"][layer])
            for name in ("query", "key", "value")
        ]
        half = cfg.head_size // 2
        angles = places[:, None] * cfg.rope_theta ** -(torch.arange(half) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        for i in (0, 1):
            low, high = found[i][..., :half], found[i][..., half:]
            found[i] = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
        return found

    def _rest(self, x: Any, mixed: Any, layer: int) -> Any:
        torch, weights = self._torch, self._weights
        x = x + torch.einsum(
            "blhc,hcd->bld", mixed, weights["blocks/attention/output/kernel"][layer]
        )
        y = self._norm(x, weights["blocks/mlp_norm/scale"][layer])
        gate, up, down = (weights[f"blocks/mlp/{n}/kernel"][layer] for n in ("gate", "up", "down"))
        return x + (torch.nn.functional.silu(y @ gate) * (y @ up)) @ down


def main(_: list[str]) -> None:
    """Checks the losses, times both, prints the rows."""
    torch, _transformers = import_torch()
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    cfg = shapes.model_config(training.LENGTH.value)
    batch = shapes.make_batch(cfg, training.BATCH_SIZE.value, documents=1)
    ours = training.OurStep(energy.make(CONFIG, training.context(cfg)), batch)
    theirs = TorchStep(ours.state.params, cfg, batch)
    losses = [ours.loss() for _ in range(training.CHECKED_STEPS)]
    others = [theirs().item() for _ in range(training.CHECKED_STEPS)]
    training.check_losses(losses, others, tolerance=TOLERANCE * losses[0])
    times = harness.measure({"torch": theirs, "jaxlib_methods": ours})
    title = f"Energy training step, torch with {torch.get_num_threads()} threads"
    ratio = harness.report(title, times, reference="torch", tokens_per_call=batch.inputs.size)
    harness.check_goal("our time / torch's", ratio["jaxlib_methods"], limit=GOAL)


if __name__ == "__main__":
    app.run(main)
