"""What a depth recurrence comes to: the paper's numbers, and what cannot be."""

import dataclasses
from typing import Any, Literal

import pytest

from jaxlib_methods import depth_recurrence
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.method import Context
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.tasks.boolean_logic import BooleanLogic
from jaxlib_methods.tasks.kinship import Kinship
from jaxlib_methods.tasks.reachability import Reachability

MODEL = TransformerConfig(embed_dim=8, num_heads=2, mlp_dim=12)
Task = Literal["reachability", "logic", "kinship"]
FEW: dict[str, Any] = {"num_train": 0, "per_bucket": 2}


def no_teacher(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
    raise AssertionError(f"read {source}")


def context(model: TransformerConfig = MODEL) -> Context:
    return Context(
        model=model,
        num_steps=8,
        sequence_length=16,
        batch_size=4,
        tokenizer="bytes",
        load_pretrained=no_teacher,
    )


def config(fields: dict[str, Any]) -> DepthRecurrenceConfig:
    values: dict[str, Any] = {"task": "reachability", **fields}
    return DepthRecurrenceConfig(**values)


def resolved(task: Task = "reachability", **fields: Any) -> Any:
    return DepthRecurrenceConfig(task=task, **fields).resolved()


# Sections 5 and 6 of the paper's code: T, rows, difficulties, sizes of the sets, layer scale.
@pytest.mark.parametrize(
    ("task", "steps", "rows", "trained", "judged", "sizes", "scale"),
    [
        ("reachability", (5, 8), 20, (1, 5), (1, 2, 3, 4, 6, 8, 10, 12), (12_000, 500), None),
        ("logic", (4, 16), 28, (1, 8), (2, 4, 6, 8, 10, 12, 14), (64_000, 500), 1e-4),
        ("kinship", (1, 12), 20, (2, 5), (2, 3, 4, 5, 6, 7, 8, 9), (60_000, 2000), 1e-4),
    ],
)
def test_none_is_the_paper_s(
    task: Task, steps: Any, rows: int, trained: Any, judged: Any, sizes: Any, scale: float | None
):
    questions = resolved(task)
    v, model = questions.values, questions.model(MODEL)
    assert (questions.train_steps, questions.most_steps, model.max_steps) == (steps, rows, rows)
    assert ((v.easiest, v.hardest), v.eval_difficulties) == (trained, judged)
    assert (v.num_train, v.per_bucket) == sizes
    assert model.layer_scale == scale
    assert (model.gate, model.gate_bias, model.weights, model.dropout) == (True, -2.0, "tied", 0.1)
    assert (model.depth_embedding, model.norm_placement) == ("normal", "pre")
    graph = task == "reachability"
    assert (model.readout, model.roles) == (("endpoints", True) if graph else ("first", False))
    assert model.positions == ("none" if graph else "rotary")
    assert model.trunk.mlp == ("relu" if graph else "gelu")
    assert model.vocab_size == {"reachability": 27, "logic": 9, "kinship": 54}[task]


def test_the_task_is_built_with_its_own_fields():
    nodes: dict[str, Any] = {"max_nodes": 12, "fewest_nodes": 6, "most_nodes": 10}
    assert resolved().task() == Reachability()
    assert resolved(**nodes, matched=True).task() == Reachability(
        max_nodes=12, train_nodes=(6, 10), variant="matched"
    )
    assert resolved(**nodes, test_most_nodes=12).task().test_nodes == (6, 12)
    assert resolved(**nodes, test_fewest_nodes=9).task().test_nodes == (9, 10)
    assert resolved("logic", max_length=64, balanced=True).task() == BooleanLogic(
        max_length=64, balanced=True
    )
    assert resolved("kinship", max_length=64).task() == Kinship(max_length=64)


def test_a_split_has_its_own_difficulties():
    fields: dict[str, Any] = {"hardest": 3, "eval_difficulties": (2, 6), **FEW}
    questions = resolved(**fields)
    train, validation = questions.dataset("train"), questions.dataset("validation")
    assert set(train.rows(range(12)).difficulty.tolist()) == {1, 2, 3}
    assert validation.rows(range(4)).difficulty.tolist() == [2, 2, 6, 6]
    assert validation.num_examples == 4
    other = resolved(**fields, data_seed=1)
    assert other.dataset("train").fingerprint != train.fingerprint


def test_what_is_given_wins_and_0_leaves_the_layer_scale_out():
    questions = resolved("logic", layer_scale=0.0, min_steps=2, max_steps=3, most_steps=9)
    assert questions.values.layer_scale == 0
    assert questions.model(MODEL).layer_scale is None
    assert (questions.train_steps, questions.most_steps) == ((2, 3), 9)
    assert questions.values.hardest == 8  # the paper's
    assert resolved(layer_scale=0.5).model(MODEL).layer_scale == 0.5


def test_an_untied_model_takes_max_steps_and_has_no_block_for_more():
    # A plain transformer as deep as the paper's rows do not go, and one whose runs vary otherwise.
    for name, value, steps in (("max_steps", 30, 30), ("most_steps", 3, 8), ("min_steps", 9, 8)):
        questions = config({"recurrence": "untied", name: value}).resolved()
        model = questions.model(MODEL)
        assert questions.train_steps == (steps, steps)
        assert questions.most_steps == model.max_steps == steps
        assert (model.weights, model.gate) == ("untied", False)
    tied = resolved(recurrence="tied").model(MODEL)
    assert (tied.weights, tied.gate, tied.max_steps) == ("tied", False, 20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "sums"}, "task 'sums' is unknown"),
        ({"eval_steps": (4, 0)}, "^eval_steps=0 must be at least 1 iteration$"),
        ({"min_steps": 0}, "^min_steps=0 must be at least 1, or none$"),
        ({"max_steps": 0}, "^max_steps=0 must be at least 1, or none$"),
        ({"most_steps": -1}, "^most_steps=-1 must be at least 1, or none$"),
        ({"easiest": 0}, "^easiest=0 must be at least 1, or none$"),
        ({"hardest": 0}, "^hardest=0 must be at least 1, or none$"),
        ({"per_bucket": 0}, "^per_bucket=0 must be at least 1, or none$"),
        ({"eval_difficulties": ()}, r"^eval_difficulties=\(\) must be at least one"),
        ({"eval_difficulties": (3, 0)}, r"^eval_difficulties=\(3, 0\) must be .* all of 1 or more"),
        ({"step_weight": 1.1}, "^step_weight=1.1 must be between 0 and 1$"),
        ({"dropout": 1.0}, "^dropout=1.0 must be at least 0 and below 1$"),
        ({"layer_scale": -0.1}, "^layer_scale=-0.1 must not be negative$"),
        ({"num_train": -1}, "^num_train=-1 must not be negative$"),
        ({"data_seed": -1}, "^data_seed=-1 must not be negative$"),
        ({"objective": "loud"}, "^objective 'loud' is unknown; choose one of .'silent', 'interm"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(fields)


GRAPHS = ("max_nodes", "fewest_nodes", "most_nodes", "test_fewest_nodes", "test_most_nodes")
ANY: dict[str, Any] = {"objective": "silent", "recurrence": "gated", "norm_placement": "pre",
                       "depth_embedding": "small", "eval_difficulties": (2,)}  # fmt: skip
QUESTIONS = "task=reachability or logic or kinship"


def readers(field: str) -> tuple[str, dict[str, Any], str]:
    """Who reads a field, a run that does not, and what that has instead."""
    if field == "eval_steps":
        return "task=language", {"task": "kinship"}, "task=kinship"
    if field in (*GRAPHS, "matched"):
        return "task=reachability", {"task": "logic"}, "task=logic"
    if field == "balanced":
        return "task=logic", {"task": "kinship"}, "task=kinship"
    if field == "max_length":
        return "task=logic or kinship", {"task": "reachability"}, "task=reachability"
    if field == "step_weight":
        return "objective=intermediate or iterative", {"task": "logic"}, "objective=silent"
    if field == "gate_bias":
        other = {"task": "logic", "recurrence": "tied"}
        return "recurrence=gated", other, "recurrence=tied"
    if field in ("min_steps", "most_steps"):
        other = {"task": "logic", "recurrence": "untied"}
        return "recurrence=gated or tied", other, "recurrence=untied"
    return QUESTIONS, {"task": "language"}, "task=language"


FIELDS = [field.name for field in dataclasses.fields(DepthRecurrenceConfig)]


def value_of(field: str) -> Any:
    values = {"eval_steps": (1,), "step_weight": 1.0, "dropout": 0.1, "gate_bias": -2.0}
    return (ANY | values).get(field, False if field in ("matched", "balanced") else 1)


@pytest.mark.parametrize("field", sorted(set(FIELDS) - {"task"}))
def test_a_field_that_nobody_reads_is_refused(field: str):
    # The value may be the one that none stands for.
    wanted, others, has = readers(field)
    value = value_of(field)
    cfg = DepthRecurrenceConfig(**{**others, field: value})
    by = wanted.partition("=")[0]
    with pytest.raises(ValueError, match=r".") as caught:
        depth_recurrence.make(cfg, context())
    assert str(caught.value) == (
        f"depth_recurrence.{field}={value} is read with {wanted} alone, and this run has {has}; "
        f"leave it out (=none where a preset gives it), or change depth_recurrence.{by}"
    )
    read: Any = wanted.partition("=")[2].split(" or ")[0]
    choice: dict[str, Any] = {"task": "logic", **others, by: read}
    DepthRecurrenceConfig(**{**choice, field: value}).check_read()
    if field != "eval_steps":
        whose = wanted if by == "task" else QUESTIONS
        with pytest.raises(ValueError, match=f"{field}=.* with {whose} alone, .* task=language; "):
            DepthRecurrenceConfig(**{"task": "language", field: value}).check_read()


def test_the_untied_twin_drops_what_it_does_not_read():
    cfg = resolved(gate_bias=1.0, min_steps=2, max_steps=4, most_steps=9, dropout=0.2).cfg
    expected = DepthRecurrenceConfig(
        task="reachability", recurrence="untied", max_steps=4, dropout=0.2
    )
    assert cfg.untied() == expected
    assert expected.untied() == expected
    expected.check_read()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "language"}, "^the task language has no questions$"),
        ({"min_steps": 9}, "^min_steps=9 is above max_steps=8; change one of them$"),
        ({"max_steps": 21}, "^max_steps=21 is above most_steps=20, the rows of the depth embed"),
        ({"easiest": 6}, "^easiest=6 is above hardest=5; change one of them$"),
        ({"max_nodes": 12}, "^fewest_nodes=8 and most_nodes=16 must go from 2 .* max_nodes=12 or"),
        ({"fewest_nodes": 1}, "^fewest_nodes=1 and most_nodes=16 must go from 2 or more"),
        ({"test_most_nodes": 0}, "^test_fewest_nodes=8 and test_most_nodes=0 must go from 2 or"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str):
    cfg = config(fields)
    with pytest.raises(ValueError, match=message):
        cfg.resolved()


def test_paths_that_no_graph_holds_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match=r"a path of 16 hops needs 17 nodes, .* 15 hops or allow"):
        resolved(**FEW, hardest=16).dataset("train")
    with pytest.raises(ValueError, match="a path of 20 hops needs 21 nodes"):
        resolved(**FEW, eval_difficulties=(20,)).dataset("validation")


def test_a_model_that_does_not_fit_the_task_is_refused():
    with pytest.raises(ValueError, match=r"model\.recurrence=0 is not; give --model\.recurrence=8"):
        depth_recurrence.make(DepthRecurrenceConfig(), context())
    for name, value in (("recurrence", 8), ("num_layers", 5), ("block", "sandwich")):
        model = dataclasses.replace(MODEL, **{name: value})
        for task in ("reachability", "logic", "kinship"):
            with pytest.raises(ValueError, match=f"model.{name}={value} has no meaning in a depth"):
                depth_recurrence.make(DepthRecurrenceConfig(task=task, **FEW), context(model))
