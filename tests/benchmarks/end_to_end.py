"""Whole update steps with kernels on and off: plain training, mid-training and energy descent.

    python tests/benchmarks/end_to_end.py
    python tests/benchmarks/end_to_end.py --kind=plain --vocab_size=50304 --batch_size=4

Measured: the jitted step of a run, optimiser included, of the same model and batch: its time, and
the temporaries that the compiler plans for. On: losses of next tokens without logits, in tiles
of the vocabulary; for an energy model, attention in tiles of queries. Off: the logits; the whole
square of scores. Mid-training thinks at one place of each row, with the entropy of the initial
model, so that its step holds the rollouts too.
Goal: neither time nor memory above that with kernels off.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import harness
import jax
import shapes
import training
from absl import app, flags
from energy_step import SYSTEM_1

from jaxlib_methods import energy, next_token
from jaxlib_methods import reinforcement_midtraining as rmt
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.method import Pretrained
from jaxlib_methods.models import energy_transformer
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import unbox
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.pallas_kernels import attention
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train.tokenizer import ByteTokenizer

_KINDS = flags.DEFINE_multi_enum(
    "kind", ["plain", "RMT", "EBT"], ["plain", "RMT", "EBT"], "What is timed."
)
flags.set_default(shapes.VOCAB_SIZE, 8192)
flags.set_default(harness.ROUNDS, 5)
flags.set_default(harness.CALLS, 1)

THOUGHT = 16  # tokens


def plain(model: TransformerConfig) -> Any:
    """Next-token prediction."""
    return next_token.make(next_token.NextTokenConfig(), training.context(model))


def mid_training(model: TransformerConfig) -> Any:
    """RMT on text, whose entropy it measures by an initial model of the same shape."""

    def load(source: str, *, weights: bool = True, dtype: str | None = None) -> Pretrained:
        del source, weights, dtype
        return Pretrained(model, unbox(init_params(model, jax.random.key(2))), None)

    length = model.max_length
    roomy = dataclasses.replace(model, max_length=2 * length)
    context = dataclasses.replace(
        training.context(roomy, load),
        sequence_length=length,
        batch_size=training.BATCH_SIZE.value,
        tokens=ByteTokenizer(),
        init_from="random weights",
    )
    cfg = ReinforcementMidtrainingConfig(
        rollouts=4, max_thought=THOUGHT, budget=THOUGHT, prompt_length=32, prompt_after="<think>"
    )
    return rmt.make(cfg, context)


def energies(model: TransformerConfig) -> Any:
    """System 1, two descent steps."""
    return energy.make(EnergyConfig(**SYSTEM_1), training.context(model))


def steps(kind: str, model: TransformerConfig) -> Mapping[str, training.OurStep]:
    """The step with kernels off and on; programs of energy models are compiled here."""
    batch = shapes.make_batch(model, training.BATCH_SIZE.value, documents=1)
    if kind != "EBT":
        make = plain if kind == "plain" else mid_training
        forms = {"off": "logits", "on": "xla"}
        return {
            name: training.OurStep(
                make(dataclasses.replace(model, loss_implementation=form)), batch
            )
            for name, form in forms.items()
        }
    found = {}
    tiles = {"off": model.max_length, "on": 256}
    for name, tile in tiles.items():
        energy_transformer.tiled_attention = lambda *x, tile=tile, **given: (
            attention.tiled_attention(*x, tile=tile, **given)
        )
        found[name] = training.OurStep(energies(model), batch)
        found[name]()  # compiles
    energy_transformer.tiled_attention = attention.tiled_attention
    return found


def main(_: list[str]) -> None:
    """Times both forms of each kind, prints the rows and the goals."""
    model = shapes.model_config(training.LENGTH.value)
    for kind in _KINDS.value:
        made = steps(kind, model)
        memory = {name: step.temporaries() for name, step in made.items()}
        title = f"Update step, {kind}: {model.num_layers} blocks of {model.embed_dim}, "
        title += f"vocabulary {model.vocab_size}, {model.compute_dtype}, batch "
        title += f"{training.BATCH_SIZE.value} x {model.max_length}"
        tokens = training.BATCH_SIZE.value * model.max_length
        found = harness.report(
            title, harness.measure(made), reference="off", tokens_per_call=tokens
        )
        print(
            "\nTemporaries: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items())
        )
        harness.check_goal(f"{kind}, time on / off", found["on"], limit=1.0)
        harness.check_goal(f"{kind}, temporaries on / off", memory["on"] / memory["off"], limit=1.0)


if __name__ == "__main__":
    app.run(main)
