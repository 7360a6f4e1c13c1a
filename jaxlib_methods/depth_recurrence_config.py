"""The configuration of `--method=depth_recurrence`, for language and for reasoning tasks."""

import dataclasses
from typing import Any, Literal, NamedTuple

from jaxlib_methods.models.config import TransformerConfig, check_choices
from jaxlib_methods.models.depth_recurrent_config import DepthRecurrentConfig
from jaxlib_methods.tasks import boolean_logic, kinship, reachability
from jaxlib_methods.tasks.questions import QuestionDataset, Split, Task

Objective = Literal["silent", "intermediate", "iterative"]
Recurrence = Literal["gated", "tied", "untied"]
Rows = Literal["normal", "small", "none"]
Placement = Literal["pre", "post"]


class Published(NamedTuple):
    """What the paper (arXiv 2603.21676) does for one of its tasks: in place of none.

    The fields with a default are the same for all tasks, and some of them are ours.
    """

    min_steps: int
    max_steps: int
    most_steps: int
    easiest: int
    hardest: int
    eval_difficulties: tuple[int, ...]
    num_train: int
    per_bucket: int
    layer_scale: float
    objective: Objective = "silent"
    step_weight: float = 1.0
    recurrence: Recurrence = "gated"
    gate_bias: float = -2.0
    depth_embedding: Rows = "normal"
    norm_placement: Placement = "pre"
    dropout: float = 0.1
    max_nodes: int = 20
    fewest_nodes: int = 8
    most_nodes: int = 16
    matched: bool = False
    balanced: bool = False
    max_length: int = 128
    data_seed: int = 0


PUBLISHED: dict[str, Published] = {
    "reachability": Published(5, 8, 20, 1, 5, (1, 2, 3, 4, 6, 8, 10, 12), 12_000, 500, 0.0),
    "logic": Published(4, 16, 28, 1, 8, (2, 4, 6, 8, 10, 12, 14), 64_000, 500, 1e-4),
    "kinship": Published(1, 12, 20, 2, 5, (2, 3, 4, 5, 6, 7, 8, 9), 60_000, 2000, 1e-4),
}

# Who reads a field of questions, where not every run on questions does: the field that decides,
# and its values.
READERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "eval_steps": ("task", ("language",)),
    "min_steps": ("recurrence", ("gated", "tied")),
    "most_steps": ("recurrence", ("gated", "tied")),
    "gate_bias": ("recurrence", ("gated",)),
    "step_weight": ("objective", ("intermediate", "iterative")),
    "max_nodes": ("task", ("reachability",)),
    "fewest_nodes": ("task", ("reachability",)),
    "most_nodes": ("task", ("reachability",)),
    "test_fewest_nodes": ("task", ("reachability",)),
    "test_most_nodes": ("task", ("reachability",)),
    "matched": ("task", ("reachability",)),
    "balanced": ("task", ("logic",)),
    "max_length": ("task", ("logic", "kinship")),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthRecurrenceConfig:
    """What is learned with a depth that is an argument.

    task: `language` trains the run's model, which must be recurrent (`model.recurrence`), to
        predict text. The others train a classifier made of one recurrent block on questions of
        known difficulty: `reachability` (is there a path), `logic` (is the expression true),
        `kinship` (does the relation hold). None in a field below is not given: what it stands for
        is said behind it. A run refuses what is given and would not be read.
    eval_steps: of language, which reads no other field: numbers of iterations at which the
        validation loss is measured too, beside 1 and the model's own; none is no other.
    min_steps, max_steps: the number of steps of a micro-batch is drawn between them; none is the
        paper's (5 to 8, 4 to 16, 1 to 12).
    most_steps: the most that can ever be taken, rows of the depth embedding; none is the paper's
        (20, 28, 20).
    objective: `silent` supervises the last step alone; `intermediate` asks every step for the
        final answer; `iterative` asks step t for what can be known after t steps: the answer to a
        question of at most that difficulty, before it "no" (reachability) or one half. None is
        `silent`.
    step_weight: share of the loss over all steps in `intermediate` and `iterative`; none is 1.
    recurrence: `gated` is the paper's; `tied` is the same block without its gate; `untied` has a
        block of its own for each step, and no gate: a plain transformer, which always takes
        max_steps and has neither min_steps nor most_steps. None is `gated`.
    gate_bias: of the update gate of `gated` in a new model; below 0 it mostly keeps the state;
        none is -2.
    layer_scale: of both sub-layers in a new model; 0 leaves it out; none is the paper's (left out
        for reachability, 0.0001 for the others).
    depth_embedding: a vector for each step, of deviation 1 (`normal`) or 0.02 (`small`).
    norm_placement: of the block; none is `pre`, and `post` is for comparison.
    dropout: of the embedding, of each sub-layer's output and in the readout; none is 0.1. The
        paper's code drops attention weights and the feed-forward's hidden layer too; here those
        stay.
    easiest, hardest: difficulties of the training questions, hops or nesting or facts; none is the
        paper's (1 to 5, 1 to 8, 2 to 5).
    eval_difficulties: of the validation questions; none is the paper's.
    num_train: training questions, a fixed set; 0 draws new ones without end; none is the paper's.
    per_bucket: validation questions of each difficulty; none is the paper's.
    max_nodes: rows of a graph; none is 20. fewest_nodes, most_nodes: nodes of a training graph;
        none is 8 and 16.
    test_fewest_nodes, test_most_nodes: nodes of a validation graph; where both are none it is the
        paper's rule, which has more nodes than any training graph for 12 hops; where one is, it is
        that of training.
    matched: negatives with the edges and degrees of a positive, so that counting edges does not
        help; the paper's (none) have fewer.
    balanced: of logic, as many true expressions as false ones; the paper's (none) are not.
    max_length: tokens of an expression or story; longer ones are drawn again; none is 128.
    data_seed: another number is another set of questions; none is 0.
    """

    task: Literal["language", "reachability", "logic", "kinship"] = "language"
    eval_steps: tuple[int, ...] | None = None
    min_steps: int | None = None
    max_steps: int | None = None
    most_steps: int | None = None
    objective: Objective | None = None
    step_weight: float | None = None
    recurrence: Recurrence | None = None
    gate_bias: float | None = None
    layer_scale: float | None = None
    depth_embedding: Rows = "normal"
    norm_placement: Placement | None = None
    dropout: float | None = None
    easiest: int | None = None
    hardest: int | None = None
    eval_difficulties: tuple[int, ...] | None = None
    num_train: int | None = None
    per_bucket: int | None = None
    max_nodes: int | None = None
    fewest_nodes: int | None = None
    most_nodes: int | None = None
    test_fewest_nodes: int | None = None
    test_most_nodes: int | None = None
    matched: bool | None = None
    balanced: bool | None = None
    max_length: int | None = None
    data_seed: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        for steps in self.eval_steps or ():
            _require(steps >= 1, f"eval_steps={steps} must be at least 1 iteration")
        for name in ("min_steps", "max_steps", "most_steps", "easiest", "hardest", "per_bucket"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name}={value} must be at least 1, or none")
        weight, dropout = self.step_weight, self.dropout
        _require(
            weight is None or 0 <= weight <= 1, f"step_weight={weight} must be between 0 and 1"
        )
        _require(
            dropout is None or 0 <= dropout < 1,
            f"dropout={dropout} must be at least 0 and below 1",
        )
        for name in ("layer_scale", "num_train", "data_seed"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name}={value} must not be negative")
        difficulties = self.eval_difficulties
        _require(
            difficulties is None or min(difficulties, default=0) >= 1,
            f"eval_difficulties={difficulties} must be at least one, all of 1 or more, or none",
        )

    def unread(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """The fields that are given and that a run would not read, and who would: see `READERS`."""
        fields = dataclasses.fields(self)
        given = {field.name for field in fields if getattr(self, field.name) != field.default}
        chosen = {"task": self.task}
        if self.task != "language":
            chosen["objective"] = self.objective or PUBLISHED[self.task].objective
            chosen["recurrence"] = self.recurrence or PUBLISHED[self.task].recurrence
        questions = ("task", tuple(PUBLISHED))
        found = {}
        for name in sorted(given - {"task"}):
            by, values = READERS.get(name, questions)
            if by not in chosen:  # a choice of questions, of a run without them
                by, values = questions
            if chosen[by] not in values:
                found[name] = by, values
        return found

    def check_read(self) -> None:
        """Raises ValueError where a field is given that the run would not read."""
        for name, (by, values) in self.unread().items():
            value = getattr(self, by) or getattr(PUBLISHED[self.task], by)
            raise ValueError(
                f"depth_recurrence.{name}={getattr(self, name)} is read with {by}="
                f"{' or '.join(values)} alone, and this run has {by}={value}; leave it out (=none "
                f"where a preset gives it), or change depth_recurrence.{by}"
            )

    def untied(self) -> "DepthRecurrenceConfig":
        """The same questions with a block for each step, and nothing that this does not read."""
        config = dataclasses.replace(self, recurrence="untied")
        nothing: dict[str, Any] = dict.fromkeys(config.unread())
        return dataclasses.replace(config, **nothing)

    def resolved(self) -> "Questions":
        """The fields of questions with the paper's values in place of none.

        Raises ValueError where they do not go together, and for the task `language`.
        """
        _require(self.task != "language", "the task language has no questions")
        paper = PUBLISHED[self.task]
        given = {name: getattr(self, name) for name in Published._fields}
        values = {n: getattr(paper, n) if v is None else v for n, v in given.items()}
        found = Questions(self, Published(**values))
        found.check()
        return found


class Questions(NamedTuple):
    """A task of questions with every number decided: what was given, and what it comes to."""

    cfg: DepthRecurrenceConfig
    values: Published

    def check(self) -> None:
        """Raises ValueError where numbers do not go together."""
        cfg, v = self.cfg, self.values
        if v.recurrence != "untied":  # which reads max_steps alone
            _require(
                v.min_steps <= v.max_steps,
                f"min_steps={v.min_steps} is above max_steps={v.max_steps}; change one of them",
            )
            _require(
                v.max_steps <= v.most_steps,
                f"max_steps={v.max_steps} is above most_steps={v.most_steps}, the rows of the "
                "depth embedding; change one of them",
            )
        if cfg.task == "reachability":
            for prefix, nodes in (("", self._train_nodes), ("test_", self._test_nodes)):
                fewest, most = nodes or self._train_nodes
                _require(
                    2 <= fewest <= most <= v.max_nodes,
                    f"{prefix}fewest_nodes={fewest} and {prefix}most_nodes={most} must go from 2 "
                    f"or more to max_nodes={v.max_nodes} or fewer",
                )
        _require(
            v.easiest <= v.hardest,
            f"easiest={v.easiest} is above hardest={v.hardest}; change one of them",
        )

    @property
    def _train_nodes(self) -> tuple[int, int]:
        return self.values.fewest_nodes, self.values.most_nodes

    @property
    def _test_nodes(self) -> tuple[int, int] | None:
        fewest, most = self.cfg.test_fewest_nodes, self.cfg.test_most_nodes
        if fewest is None and most is None:
            return None
        low, high = self._train_nodes
        return low if fewest is None else fewest, high if most is None else most

    def task(self) -> Task:
        """The generator."""
        v = self.values
        if self.cfg.task == "reachability":
            return reachability.Reachability(
                max_nodes=v.max_nodes,
                train_nodes=self._train_nodes,
                test_nodes=self._test_nodes,
                variant="matched" if v.matched else "paper",
            )
        if self.cfg.task == "logic":
            return boolean_logic.BooleanLogic(max_length=v.max_length, balanced=v.balanced)
        return kinship.Kinship(max_length=v.max_length)

    @property
    def length_field(self) -> str:
        """The field that sets the tokens or nodes of a question."""
        return "max_nodes" if self.cfg.task == "reachability" else "max_length"

    def dataset(self, split: Split) -> QuestionDataset:
        """The questions of a split, as `Method.dataset` wants it."""
        v = self.values
        trained = tuple(range(v.easiest, v.hardest + 1))
        return QuestionDataset(
            split,
            self.task(),
            difficulties=trained if split == "train" else v.eval_difficulties,
            num_train=v.num_train,
            per_bucket=v.per_bucket,
            seed=v.data_seed,
        )

    @property
    def train_steps(self) -> tuple[int, int]:
        """Fewest and most steps of a training step; an untied model always takes all."""
        v = self.values
        return (v.max_steps if v.recurrence == "untied" else v.min_steps), v.max_steps

    @property
    def most_steps(self) -> int:
        """The most that can ever be taken; an untied model has no block for more than max_steps."""
        v = self.values
        return v.max_steps if v.recurrence == "untied" else v.most_steps

    def model(self, trunk: TransformerConfig) -> DepthRecurrentConfig:
        """The architecture: the widths of a run's model in the paper's block for this task."""
        v, graph = self.values, self.cfg.task == "reachability"
        vocabulary = {
            "reachability": len(reachability.NAMES) + 1,
            "logic": len(boolean_logic.VOCABULARY),
            "kinship": len(kinship.VOCABULARY),
        }
        fields: dict[str, Any] = {
            name: getattr(v, name)
            for name in ("gate_bias", "depth_embedding", "norm_placement", "dropout")
        }
        return DepthRecurrentConfig.of(
            trunk,
            activation="relu" if graph else "gelu",
            vocab_size=vocabulary[self.cfg.task],
            max_steps=self.most_steps,
            positions="none" if graph else "rotary",
            readout="endpoints" if graph else "first",
            roles=graph,
            weights="untied" if v.recurrence == "untied" else "tied",
            gate=v.recurrence == "gated",
            layer_scale=v.layer_scale or None,
            **fields,
        )
