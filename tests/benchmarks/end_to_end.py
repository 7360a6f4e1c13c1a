"""Whole update steps with kernels on and off: next tokens, a teacher, mid-training, energies.

    python tests/benchmarks/end_to_end.py
    python tests/benchmarks/end_to_end.py --kind=plain --sequence_length=256 --batch_size=4
    python tests/benchmarks/end_to_end.py --kind=EBT --vocab_size=256

Measured: the jitted step of a run, optimiser included, of the same model and batch: its time, and
the temporaries that the compiler plans for. Off: losses from logits, attention with all scores,
JAX's derivative of LET's interpolation. `losses`, `attention` and `interpolation` turn one of them
on: losses of next tokens in tiles of the vocabulary; attention in tiles; interpolation that reads
with gathers both ways. On: all of them that the kind has. An energy model has attention alone.
Mid-training thinks at one place of each row, with the entropy of the initial model, so that its
step holds the rollouts too.
The default sizes are those that finish in minutes on one core.
Goal: neither time nor memory above that with kernels off.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import harness
import interpolation
import jax
import shapes
import training
from absl import app, flags
from energy_step import SYSTEM_1

from jaxlib_methods import energy, late_to_early, losses, next_token
from jaxlib_methods import reinforcement_midtraining as rmt
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.method import Method, Pretrained
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import unbox
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train.tokenizer import ByteTokenizer

flags.set_default(shapes.VOCAB_SIZE, 8192)
flags.set_default(shapes.NUM_LAYERS, 2)
flags.set_default(training.BATCH_SIZE, 2)
flags.set_default(training.LENGTH, 512)
flags.set_default(harness.ROUNDS, 5)
flags.set_default(harness.CALLS, 1)

THOUGHT = 16  # tokens


def _context(model: TransformerConfig, finished: TransformerConfig) -> Any:
    """Of a method that reads a finished model: random weights of a shape."""

    def load(source: str, *, weights: bool = True, dtype: str | None = None) -> Pretrained:
        del source
        if not weights:
            return Pretrained(finished, None, None)
        params = unbox(init_params(finished, jax.random.key(2)))
        return Pretrained(finished, jax.tree.map(lambda x: x.astype(dtype), params), None)

    return training.context(model, load)


def plain(model: TransformerConfig) -> Method:
    """Next-token prediction."""
    return next_token.make(next_token.NextTokenConfig(), training.context(model))


def taught(model: TransformerConfig) -> Method:
    """LET with a teacher of half the width."""
    teacher = dataclasses.replace(model, embed_dim=model.embed_dim // 2)
    cfg = late_to_early.LateToEarlyConfig(teacher="random weights")
    return late_to_early.make(cfg, _context(model, teacher))


def mid_training(model: TransformerConfig) -> Method:
    """RMT on text, whose entropy it measures by an initial model of the same shape."""
    length = model.max_length
    context = dataclasses.replace(
        _context(dataclasses.replace(model, max_length=2 * length), model),
        sequence_length=length,
        batch_size=training.BATCH_SIZE.value,
        tokens=ByteTokenizer(),
        init_from="random weights",
    )
    cfg = ReinforcementMidtrainingConfig(
        rollouts=4, max_thought=THOUGHT, budget=THOUGHT, prompt_length=32, prompt_after="<think>",
        length_weight=0.0,
    )  # fmt: skip
    return rmt.make(cfg, context)


def energies(model: TransformerConfig) -> Method:
    """System 1, two descent steps."""
    return energy.make(EnergyConfig(**SYSTEM_1), training.context(model))


MAKE: dict[str, Callable[[TransformerConfig], Method]] = {
    "plain": plain, "LET": taught, "RMT": mid_training, "EBT": energies,
}  # fmt: skip
KERNELS = {
    "plain": ("losses", "attention"),
    "LET": ("losses", "attention", "interpolation"),
    "RMT": ("losses", "attention"),
    "EBT": ("attention",),
}
_KINDS = flags.DEFINE_multi_enum("kind", list(MAKE), list(MAKE), "What is timed.")


def compiled(
    kind: str, model: TransformerConfig, kernels: tuple[str, ...]
) -> tuple[training.OurStep, float]:
    """The step with some kernels, compiled while they are in place, and its temporaries in MiB."""
    model = dataclasses.replace(
        model, loss_implementation="xla" if "losses" in kernels else "logits"
    )
    form: Any = "xla" if "attention" in kernels else "plain"
    model = dataclasses.replace(model, attention_implementation=form)
    interpolate = losses.interpolate
    if "interpolation" not in kernels:
        losses.interpolate = interpolation.plain
    step = training.OurStep(
        MAKE[kind](model), shapes.make_batch(model, training.BATCH_SIZE.value, documents=1)
    )
    memory = step.temporaries()
    losses.interpolate = interpolate
    return step, memory


def steps(kind: str, model: TransformerConfig) -> Mapping[str, tuple[training.OurStep, float]]:
    """The step without kernels, with each alone, and with all."""
    each = KERNELS[kind]
    forms: dict[str, tuple[str, ...]] = {"off": ()}
    if len(each) > 1:
        forms |= {name: (name,) for name in each}
    return {name: compiled(kind, model, use) for name, use in (forms | {"on": each}).items()}


def main(_: list[str]) -> None:
    """Times the forms of each kind, prints the rows and the goals."""
    model = shapes.model_config(training.LENGTH.value)
    for kind in _KINDS.value:
        made = steps(kind, model)
        programs = {name: step for name, (step, _) in made.items()}
        memory = {name: mib for name, (_, mib) in made.items()}
        title = f"Update step, {kind}: {model.num_layers} blocks of {model.embed_dim}, "
        title += f"vocabulary {model.vocab_size}, {model.compute_dtype}, batch "
        title += f"{training.BATCH_SIZE.value} x {model.max_length}"
        tokens = training.BATCH_SIZE.value * model.max_length
        found = harness.report(
            title, harness.measure(programs), reference="off", tokens_per_call=tokens
        )
        print(
            "\nTemporaries: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items())
        )
        harness.check_goal(f"{kind}, time on / off", found["on"], limit=1.0)
        harness.check_goal(f"{kind}, temporaries on / off", memory["on"] / memory["off"], limit=1.0)


if __name__ == "__main__":
    app.run(main)
