"""Late-to-early training (LET, arXiv 2602.05393): a small finished model teaches early layers.

In the early steps of a run the residual stream after an early block of the student is pulled
towards the last hidden state of a frozen teacher about ten times smaller:

    L(s) = NLL + lambda(s) * mean_t -cos(h^(k)_t, P h^T_t),
    lambda(s) = weight * max(0, (stop_step - s) / stop_step)

From `stop_step` on the run is plain next-token prediction: its program holds no teacher. The two
baselines of the paper, SALT and reverse knowledge distillation, are objectives of the same method.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods import depth_monitor, flops, linear_losses, losses, next_token
from jaxlib_methods.method import Batch, Context, LossFn, Method, Metrics, Pretrained
from jaxlib_methods.models.config import TransformerConfig, check_choices
from jaxlib_methods.models.language_model import Trained, forward

Objective = Literal["alignment", "salt", "reverse_kd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LateToEarlyConfig:
    """What teaches, what is taught, how strongly and how long.

    teacher: a run's workdir, a Hugging Face folder, or `preset:NAME` to train one first.
    objective: `alignment` is LET; `salt` distils the teacher's predictions until the stop step;
        `reverse_kd` does so for the whole run.
        `alignment` reads weight, student_layer, student_block, teacher_layer and resize; the
        other two read distillation_weight and temperature.
    weight: lambda at step 0; 0.1 is the paper's best. It was measured on 1.4B parameters, small
        models want more.
    stop_fraction: the stop step as a fraction of the run, but for `reverse_kd`. Not published; 0.5
        is recommended.
    stop_step: the stop step itself, in optimiser steps; overrides stop_fraction.
    student_layer: `early` is block max(1, round(layers / 8)), `middle` round(layers / 2), `late`
        the last. The paper's index was not found. Of a student that is recurrent in depth `early`
        is the output of its prelude, `middle` the state after the first iteration of its core that
        has a gradient, `late` after the last.
    student_block: the number of the block, from 1; overrides student_layer. Of a recurrent student
        the blocks of the prelude count first, then the iterations with gradient.
    teacher_layer: `last` is after the final norm, `last_before_norm` before it, `middle` after
        block round(layers / 2). A recurrent teacher has `last` only.
    resize: which side is interpolated to the other's width. `learned_linear` trains a matrix from
        the teacher's width to the student's instead; it is not used after the stop step.
    distillation_weight: share of the distillation loss in `salt` and `reverse_kd`; the paper's
        value was not found.
    temperature: of the teacher's distribution in `salt` and `reverse_kd`; not found either.
    """

    teacher: str = ""
    objective: Objective = "alignment"
    weight: float = 0.1
    stop_fraction: float = 0.5
    stop_step: int | None = None
    student_layer: Literal["early", "middle", "late"] = "early"
    student_block: int | None = None
    teacher_layer: Literal["last", "last_before_norm", "middle"] = "last"
    resize: Literal["teacher_to_student", "student_to_teacher", "learned_linear"] = (
        "teacher_to_student"
    )
    distillation_weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self)
        _require(self.weight >= 0, f"late_to_early.weight={self.weight} must not be negative")
        _require(
            0 <= self.stop_fraction <= 1,
            f"late_to_early.stop_fraction={self.stop_fraction} must be between 0 and 1",
        )
        _require(
            self.stop_step is None or self.stop_step >= 0,
            f"late_to_early.stop_step={self.stop_step} must not be negative",
        )
        _require(
            0 <= self.distillation_weight <= 1,
            f"late_to_early.distillation_weight={self.distillation_weight} must be between 0 and 1",
        )
        _require(
            self.temperature > 0, f"late_to_early.temperature={self.temperature} must be positive"
        )

    def stop(self, num_steps: int) -> int:
        """The optimiser step from which on there is no teacher; a run may end before it."""
        if self.objective == "reverse_kd":
            return num_steps
        return round(self.stop_fraction * num_steps) if self.stop_step is None else self.stop_step


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def student_block(cfg: LateToEarlyConfig, student: TransformerConfig) -> int:
    """The student's block k, from 1, whose residual stream is aligned: its `hidden_layer`.

    Raises ValueError where `student_block` does not exist.
    """
    num_layers, prelude = student.num_layers, student.prelude_layers
    if student.recurrence:
        num_layers = prelude + student.trained_steps
    if cfg.student_block is not None:
        _require(
            1 <= cfg.student_block <= num_layers,
            f"late_to_early.student_block={cfg.student_block} does not exist in a student of "
            f"{num_layers} layers; choose 1 to {num_layers}",
        )
        return cfg.student_block
    early, middle = max(1, round(num_layers / 8)), max(1, round(num_layers / 2))
    if student.recurrence:
        early, middle = prelude, prelude + 1
    return {"early": early, "middle": middle, "late": num_layers}[cfg.student_layer]


def teacher_layer(cfg: LateToEarlyConfig, teacher: TransformerConfig) -> int | Literal["final"]:
    """The teacher's layer as its `hidden_layer`. Raises ValueError where it has none such."""
    if cfg.teacher_layer == "last":
        return "final"
    _require(
        not teacher.recurrence,
        f"late_to_early.teacher_layer={cfg.teacher_layer} does not exist in a teacher that is "
        "recurrent in depth; choose last",
    )
    num_layers = teacher.num_layers
    return num_layers if cfg.teacher_layer == "last_before_norm" else max(1, round(num_layers / 2))


def check_teacher(teacher: Pretrained, context: Context) -> None:
    """Raises ValueError where the teacher cannot read the student's tokens."""
    mine, its = context.model.vocab_size, teacher.config.vocab_size
    _require(
        mine == its,
        f"the teacher's vocabulary has {its} tokens and the student's {mine}; the student takes "
        f"its teacher's tokenizer: set model.vocab_size={its} and data.tokenizer to match",
    )
    _require(
        teacher.tokenizer in (None, context.tokenizer),
        f"the teacher was trained with tokenizer {teacher.tokenizer} and the data is cut with "
        f"{context.tokenizer}; set data.tokenizer to the teacher's",
    )
    _require(
        context.sequence_length <= teacher.config.max_length,
        f"data.sequence_length={context.sequence_length} is longer than the teacher's context of "
        f"{teacher.config.max_length} tokens",
    )


class _Forward(NamedTuple):
    student: Trained
    teacher: Trained


def make_loss(
    cfg: LateToEarlyConfig,
    student: TransformerConfig,
    teacher: TransformerConfig,
    *,
    stop: int,
    evaluate: bool = False,
) -> LossFn:
    """The loss while the teacher is there; `extra` is `{"teacher": parameters}`.

    evaluate: a recurrent student takes its usual number of iterations instead of a drawn one.

    Metrics: `loss` (the student's NLL), `teacher_loss` (the teacher's, so that one sees when the
    student passes it), and `alignment` (the cosine) with `alignment_weight` (lambda), or
    `distillation` (the soft cross-entropy); of a recurrent student those of
    `depth_monitor.state_metrics`.
    """
    aligns = cfg.objective == "alignment"
    if not aligns:  # distillation makes the logits of both
        student = dataclasses.replace(student, loss_implementation="logits")
        teacher = dataclasses.replace(teacher, loss_implementation="logits")
    block = student_block(cfg, student) if aligns else None
    layer = teacher_layer(cfg, teacher) if aligns else None
    term = _alignment_term(cfg, stop) if aligns else _distillation_term(cfg)

    def loss(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        where = batch.where
        inputs: dict[str, Any] = {"positions": batch.positions, "segments": batch.segments}
        frozen = jax.lax.stop_gradient(extra["teacher"])
        mine, its = (model.recurrence or None for model in (student, teacher))
        mine = mine if evaluate else None
        out = _Forward(
            forward(
                student,
                params,
                batch.inputs,
                hidden_layer=block,
                num_steps=mine,
                key=key,
                **inputs,
            ),
            forward(
                teacher,
                frozen,
                batch.inputs,
                hidden_layer=layer,
                num_steps=its,
                key=jax.random.fold_in(key, 1),
                **inputs,
            ),
        )
        nll, teacher_nll = (
            losses.masked_sum(
                linear_losses.token_nll(model, weights, found, batch.targets, where=where),
                where=where,
            )
            for model, weights, found in (
                (student, params, out.student),
                (teacher, frozen, out.teacher),
            )
        )
        scalar, metrics = term(params, out, where, losses.mean(*nll), step)
        metrics |= depth_monitor.state_metrics(out.student, where=where)
        return scalar, {"loss": nll, "teacher_loss": teacher_nll, **metrics}

    return loss


_Term = Callable[..., tuple[jax.Array, Metrics]]


def _alignment_term(cfg: LateToEarlyConfig, stop: int) -> _Term:
    def term(
        params: Any, out: _Forward, where: jax.Array, nll: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        state, target = out.student.hidden, jax.lax.stop_gradient(out.teacher.hidden)
        assert state is not None
        assert target is not None
        if cfg.resize == "student_to_teacher":
            state = losses.resize_features(state, target.shape[-1])
        elif cfg.resize == "learned_linear":
            target = target @ params["alignment"]["kernel"].astype(target.dtype)
        else:
            target = losses.resize_features(target, state.shape[-1])
        cosine = losses.masked_sum(
            losses.cosine_similarity(state, target, where=where), where=where
        )
        weight = losses.linear_fade(step, weight=cfg.weight, stop_step=stop)
        scalar = nll - weight * losses.mean(*cosine)
        return scalar, {"alignment": cosine, "alignment_weight": (weight * cosine[1], cosine[1])}

    return term


def _distillation_term(cfg: LateToEarlyConfig) -> _Term:
    def term(
        params: Any, out: _Forward, where: jax.Array, nll: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del params, step
        soft = losses.masked_sum(
            losses.soft_cross_entropy(
                out.student.logits, out.teacher.logits, temperature=cfg.temperature, where=where
            ),
            where=where,
        )
        share = cfg.distillation_weight
        return (1 - share) * nll + share * losses.mean(*soft), {"distillation": soft}

    return term


def make(cfg: LateToEarlyConfig, context: Context) -> Method:
    """LET as a `Method`: with the teacher until the stop step, next-token prediction then."""
    plain = next_token.make(next_token.NextTokenConfig(), context)
    stop = cfg.stop(context.num_steps)
    if stop == 0 or (cfg.objective == "alignment" and cfg.weight == 0):
        return plain
    _require(
        bool(cfg.teacher),
        "late_to_early.teacher is empty; give a run's workdir, a Hugging Face folder, or "
        "preset:NAME to train one first",
    )
    found = context.load_pretrained(cfg.teacher, weights=False)
    check_teacher(found, context)
    student = context.model
    _require(
        cfg.objective == "alignment" or student.loss_implementation in ("auto", "logits"),
        f"late_to_early.objective={cfg.objective} reads the logits of both models; leave out "
        f"model.loss_implementation={student.loss_implementation}, or give auto or logits",
    )
    teacher = dataclasses.replace(
        found.config,
        compute_dtype=student.compute_dtype,
        loss_implementation=student.loss_implementation,
        attention_implementation=student.attention_implementation,
        remat="none",
    )
    learned = cfg.objective == "alignment" and cfg.resize == "learned_linear"

    def init_params(key: jax.Array) -> Any:
        params = plain.init_params(key)
        if learned:
            shape = (teacher.embed_dim, student.embed_dim)
            params["alignment"] = {"kernel": _learned_kernel(jax.random.fold_in(key, 1), shape)}
        return params

    def init(key: jax.Array) -> Any:
        del key
        loaded = context.load_pretrained(cfg.teacher, dtype=student.compute_dtype)
        return {"teacher": loaded.params}

    length = context.sequence_length
    method = Method(
        init_params=init_params,
        init=init,
        loss=make_loss(cfg, student, teacher, stop=stop),
        evaluate=make_loss(cfg, student, teacher, stop=stop, evaluate=True),
        flops_per_token=flops.late_to_early_flops(student, teacher, length),
        until=stop,
        then=dataclasses.replace(plain, init_params=init_params),
    )
    return depth_monitor.watched(method, context)


def _learned_kernel(key: jax.Array, shape: tuple[int, int]) -> nn.LogicallyPartitioned:
    kernel = jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5
    return nn.LogicallyPartitioned(kernel, ("norm", "embed"))
