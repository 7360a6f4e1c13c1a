"""Depth-recurrent reasoning (arXiv 2603.21676): one block, T times, on yes-or-no questions.

With l_t the logit that the readout gives after step t, y the answer and BCE the binary
cross-entropy,

    L = (1 - a) BCE(l_T, y) + a / T sum_t BCE(l_t, y_t),   T drawn for each micro-batch

a = 0 is silent thinking, the paper's method. `intermediate` has y_t = y; `iterative` has what can
be known after t steps: y where the difficulty is at most t, before it 0 for reachability (no path
of t hops is there) and 1/2 for the others.
"""

# Dimension key: B questions, L tokens or nodes, T steps.

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods import losses
from jaxlib_methods.depth_recurrence_config import Questions
from jaxlib_methods.flops import TRAIN_TO_FORWARD
from jaxlib_methods.method import Context, LossFn, Method, Metrics
from jaxlib_methods.models import depth_recurrent
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.depth_recurrent import Trajectory, sees_all
from jaxlib_methods.models.depth_recurrent_config import DepthRecurrentConfig
from jaxlib_methods.tasks.questions import Graphs


def inputs(batch: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Tokens `[B, L]`, which tokens each sees `[B, L, L]`, and the endpoints `[B, 2]` or None."""
    tokens = jnp.asarray(batch.tokens)
    if isinstance(batch, Graphs):
        return tokens, jnp.asarray(batch.edges), jnp.asarray(batch.endpoints)
    return tokens, sees_all(tokens), None


def known_after(
    label: jax.Array, difficulty: jax.Array, num_steps: int, *, before: float
) -> jax.Array:
    """What can be known after 1, ..., `num_steps` steps, `[T, B]`: the answer, or `before`."""
    steps = jnp.arange(1, num_steps + 1)[:, None]
    answer = jnp.asarray(label, jnp.float32)[None]
    return jnp.where(jnp.asarray(difficulty)[None] <= steps, answer, before)


def correct(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Whether the answer is right, bool `[..., B]`; label: `[B]`."""
    return (logits > 0) == jnp.broadcast_to(jnp.asarray(label) == 1, logits.shape)


def make_loss(questions: Questions, model: DepthRecurrentConfig) -> LossFn:
    """The objective. Metrics: `loss` (BCE of the last step), `accuracy`, `iterations` (T)."""
    v = questions.values
    fewest, most = questions.train_steps

    def loss(
        params: Any, extra: Any, batch: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step
        steps_key, dropout_key = jax.random.split(key)
        num_steps = jax.random.randint(steps_key, (), fewest, most + 1)
        where, label = jnp.asarray(batch.where), jnp.asarray(batch.label)
        tokens, sees, ends = inputs(batch)
        options: dict[str, Any] = {"num_steps": num_steps, "max_steps": most, "key": dropout_key}
        if v.objective == "silent":
            logits = depth_recurrent.forward(model, params, tokens, sees, ends, **options)
            scalar = jnp.zeros(())
        else:
            logits = depth_recurrent.trajectory(model, params, tokens, sees, ends, **options).logits
            scalar = _of_all_steps(questions, logits, batch, num_steps)
            logits = logits[num_steps - 1]
        nll = losses.masked_sum(losses.binary_nll(logits, label, where=where), where=where)
        share = 0.0 if v.objective == "silent" else v.step_weight
        scalar = (1 - share) * losses.mean(*nll) + share * scalar
        right = losses.masked_sum(correct(logits, label).astype(jnp.float32), where=where)
        iterations = (num_steps * nll[1], nll[1])
        return scalar, {"loss": nll, "accuracy": right, "iterations": iterations}

    return loss


def _of_all_steps(
    questions: Questions, logits: jax.Array, batch: Any, num_steps: jax.Array
) -> jax.Array:
    """The mean over examples of (1 / T) sum_t BCE(l_t, y_t); logits `[most steps, B]`."""
    count = logits.shape[0]
    where, label = jnp.asarray(batch.where), jnp.asarray(batch.label)
    if questions.values.objective == "iterative":
        before = 0.0 if questions.cfg.task == "reachability" else 0.5
        targets = known_after(label, batch.difficulty, count, before=before)
    else:
        targets = jnp.broadcast_to(label.astype(jnp.float32)[None], logits.shape)
    taken = (jnp.arange(count) < num_steps)[:, None] & where[None]
    each = losses.binary_nll(logits, targets, where=taken)
    return each.sum() / (jnp.maximum(where.sum(), 1) * num_steps)


def trajectory(
    questions: Questions, model: DepthRecurrentConfig, params: Any, batch: Any
) -> Trajectory:
    """Every depth up to the most possible, without dropout: see `depth_recurrent.trajectory`."""
    steps = questions.most_steps
    return depth_recurrent.trajectory(model, params, *inputs(batch), num_steps=steps)


def make_evaluate(questions: Questions, model: DepthRecurrentConfig) -> LossFn:
    """Validation, at the most steps of training and at the most possible.

    Metrics: `loss` and `accuracy` at max_steps; `accuracy_harder`, of questions harder than any
    of training at most_steps; `accuracy_at_most_steps`, of all; `state_change` and `gate`, at
    most_steps.
    """
    usual = questions.train_steps[1]

    def evaluate(
        params: Any, extra: Any, batch: Any, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step, key
        where, label = jnp.asarray(batch.where), jnp.asarray(batch.label)
        path = trajectory(questions, model, params, batch)
        nll = losses.masked_sum(
            losses.binary_nll(path.logits[usual - 1], label, where=where), where=where
        )
        right = correct(path.logits, label).astype(jnp.float32)
        harder = where & (jnp.asarray(batch.difficulty) > questions.values.hardest)
        metrics = {
            "loss": nll,
            "accuracy": losses.masked_sum(right[usual - 1], where=where),
            "accuracy_at_most_steps": losses.masked_sum(right[-1], where=where),
            "accuracy_harder": losses.masked_sum(right[-1], where=harder),
            "state_change": losses.masked_sum(path.change[-1], where=where),
            "gate": losses.masked_sum(path.gate[-1], where=where),
        }
        return losses.mean(*nll), metrics

    return evaluate


def init_params(model: TransformerConfig, questions: Questions, key: jax.Array) -> dict:
    """Boxed parameters of the classifier that a run trains."""
    return depth_recurrent.init_params(questions.model(model), key)


def step_flops(model: DepthRecurrentConfig, length: int) -> float:
    """Forward FLOPs of one step of the block, per token: a multiply and an add count as two.

    2 (4 D^2 + 2 D F + 2 D^2 [gate]) + 4 L D,   every token scored against every one
    """
    trunk = model.trunk
    width, inner = trunk.embed_dim, trunk.num_heads * trunk.head_size
    weights = 4 * width * inner + 2 * width * trunk.mlp_size + (2 * width**2 if model.gate else 0)
    return 2.0 * weights + 4.0 * inner * length


def readout_flops(model: DepthRecurrentConfig) -> float:
    """Forward FLOPs of a readout, per question."""
    width = model.trunk.embed_dim
    read = 2 * width if model.readout == "endpoints" else width
    return 2.0 * (read * width + width)


def train_flops(questions: Questions, model: DepthRecurrentConfig, length: int) -> float:
    """Model FLOPs of a training step with its mean number of steps, per token or node."""
    steps = sum(questions.train_steps) / 2
    reads = 1 if questions.values.objective == "silent" else steps
    forward = steps * step_flops(model, length) + reads * readout_flops(model) / length
    return TRAIN_TO_FORWARD * forward


def make(questions: Questions, context: Context) -> Method:
    """The classifier as a `Method`."""
    model = questions.model(context.model)
    length = questions.task().sequence_length
    return Method(
        init_params=functools.partial(init_params, context.model, questions),
        init=lambda key: (),
        loss=make_loss(questions, model),
        flops_per_token=train_flops(questions, model, length),
        evaluate=make_evaluate(questions, model),
        dataset=questions.dataset,
        length_flag=f"depth_recurrence.{questions.length_field}",
    )
