"""What late-to-early training costs while there is a teacher, and that it costs nothing after.

    python tests/benchmarks/let_overhead.py

Measured: the LET step with a teacher of `late_to_early_tiny_teacher`'s shape, and the step after
the stop step. Against: plain next-token training of the same model, in the same process, on the
same batch; and the ratio of the analytic FLOPs of `jaxlib_methods.flops`.
Goal: after the stop step within 2 % of the plain step. With the teacher: measured / FLOPs ratio
near 1; what is above it is not matmuls.
"""

import dataclasses
from typing import Any

import harness
import jax
import shapes
import training
from absl import app, flags

from jaxlib_methods import flops, late_to_early, next_token
from jaxlib_methods.method import Pretrained
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import unbox
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.train import presets

_SHAPE = presets.get("late_to_early_tiny_teacher").model
_NUM_LAYERS = flags.DEFINE_integer("teacher_num_layers", _SHAPE.num_layers, "Teacher's blocks.")
_EMBED_DIM = flags.DEFINE_integer("teacher_embed_dim", _SHAPE.embed_dim, "Teacher's width.")
_NUM_HEADS = flags.DEFINE_integer("teacher_num_heads", _SHAPE.num_heads, "Teacher's heads.")
_MLP_DIM = flags.DEFINE_integer(
    "teacher_mlp_dim", _SHAPE.mlp_dim, "Teacher's feed-forward width; 0: derived."
)

GOAL = 1.02  # the step after the stop step / the plain step
DOCUMENTS = 3  # in each row


def teacher_config(student: TransformerConfig) -> TransformerConfig:
    """The teacher of the flags."""
    return dataclasses.replace(
        student,
        num_layers=_NUM_LAYERS.value,
        embed_dim=_EMBED_DIM.value,
        num_heads=_NUM_HEADS.value,
        mlp_dim=_MLP_DIM.value or None,
    )


def main(_: list[str]) -> None:
    """Times the three programs, prints the rows and the FLOPs ratio."""
    student = shapes.model_config(training.LENGTH.value)
    teacher = teacher_config(student)

    def load(source: str, *, weights: bool = True, dtype: str | None = None) -> Pretrained:
        del source
        if not weights:
            return Pretrained(teacher, None, None)
        params = unbox(init_params(teacher, jax.random.key(2)))
        return Pretrained(teacher, jax.tree.map(lambda x: x.astype(dtype), params), None)

    context = training.context(student, load)
    plain = next_token.make(next_token.NextTokenConfig(), context)
    let = late_to_early.make(late_to_early.LateToEarlyConfig(teacher="random weights"), context)
    after: Any = let.then
    batch = shapes.make_batch(student, training.BATCH_SIZE.value, documents=DOCUMENTS)
    methods = {"plain": plain, "LET": let, "LET after the stop step": after}
    times = harness.measure(
        {name: training.OurStep(method, batch) for name, method in methods.items()}
    )
    title = "Training step with and without a teacher"
    ratio = harness.report(title, times, reference="plain", tokens_per_call=batch.inputs.size)
    length = student.max_length
    counted = flops.late_to_early_flops(student, teacher, length)
    counted /= flops.transformer_train_flops(student, length)
    print(
        f"\nLET / plain: measured {ratio['LET']:.3f}, FLOPs {counted:.3f}, "
        f"measured / FLOPs {ratio['LET'] / counted:.3f}"
    )
    harness.check_goal("after the stop step / plain", ratio[list(methods)[2]], limit=GOAL)


if __name__ == "__main__":
    app.run(main)
