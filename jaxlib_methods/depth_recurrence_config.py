"""The configuration of `--method=depth_recurrence`, for language and for reasoning tasks."""

import dataclasses
from typing import Any, Literal, NamedTuple

from jaxlib_methods.models.config import TransformerConfig, check_choices
from jaxlib_methods.models.depth_recurrent_config import DepthRecurrentConfig
from jaxlib_methods.tasks import boolean_logic, kinship, reachability
from jaxlib_methods.tasks.questions import QuestionDataset, Split, Task


class Published(NamedTuple):
    """What the paper (arXiv 2603.21676) does for one of its tasks: the fields that are none."""

    min_steps: int
    max_steps: int
    most_steps: int
    easiest: int
    hardest: int
    eval_difficulties: tuple[int, ...]
    num_train: int
    per_bucket: int
    layer_scale: float


PUBLISHED: dict[str, Published] = {
    "reachability": Published(5, 8, 20, 1, 5, (1, 2, 3, 4, 6, 8, 10, 12), 12_000, 500, 0.0),
    "logic": Published(4, 16, 28, 1, 8, (2, 4, 6, 8, 10, 12, 14), 64_000, 500, 1e-4),
    "kinship": Published(1, 12, 20, 2, 5, (2, 3, 4, 5, 6, 7, 8, 9), 60_000, 2000, 1e-4),
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
        `kinship` (does the relation hold). Of the fields below only eval_steps may be given for
        language, and all but that one for questions.
    eval_steps: other numbers of iterations at which the validation loss is measured too.
    min_steps, max_steps: the number of steps of a micro-batch is drawn between them; none is the
        paper's (5 to 8, 4 to 16, 1 to 12).
    most_steps: the most that can ever be taken, rows of the depth embedding; none is the paper's
        (20, 28, 20).
    objective: `silent` supervises the last step alone; `intermediate` asks every step for the
        final answer; `iterative` asks step t for what can be known after t steps: the answer to a
        question of at most that difficulty, before it "no" (reachability) or one half.
    step_weight: share of the loss over all steps in `intermediate` and `iterative`.
    recurrence: `gated` is the paper's; `tied` is the same block without its gate; `untied` has a
        block of its own for each step, and no gate: a plain transformer, which always takes
        max_steps and reads neither min_steps nor most_steps.
    gate_bias: of the update gate in a new model; below 0 it mostly keeps the state.
    layer_scale: of both sub-layers in a new model; 0 leaves it out; none is the paper's (left out
        for reachability, 0.0001 for the others).
    depth_embedding: a vector for each step, of deviation 1 (`normal`) or 0.02 (`small`).
    norm_placement: of the block; `post` is for comparison.
    dropout: of the embedding, of each sub-layer's output and in the readout. The paper's code
        drops attention weights too; here they stay.
    easiest, hardest: difficulties of the training questions, hops or nesting or facts; none is the
        paper's (1 to 5, 1 to 8, 2 to 5).
    eval_difficulties: of the validation questions; none is the paper's.
    num_train: training questions, a fixed set; 0 draws new ones without end; none is the paper's.
    per_bucket: validation questions of each difficulty; none is the paper's.
    max_nodes: rows of a graph. fewest_nodes, most_nodes: nodes of a training graph.
    test_fewest_nodes, test_most_nodes: nodes of a validation graph; where both are none it is the
        paper's rule, which has more nodes than any training graph for 12 hops; where one is, it is
        that of training.
    matched: negatives with the edges and degrees of a positive, so that counting edges does not
        help; the paper's have fewer.
    balanced: as many true expressions as false ones; the paper's are not.
    max_length: tokens of an expression or story; longer ones are drawn again.
    data_seed: another number is another set of questions.
    """

    task: Literal["language", "reachability", "logic", "kinship"] = "language"
    eval_steps: tuple[int, ...] = (1,)
    min_steps: int | None = None
    max_steps: int | None = None
    most_steps: int | None = None
    objective: Literal["silent", "intermediate", "iterative"] = "silent"
    step_weight: float = 1.0
    recurrence: Literal["gated", "tied", "untied"] = "gated"
    gate_bias: float = -2.0
    layer_scale: float | None = None
    depth_embedding: Literal["normal", "small", "none"] = "normal"
    norm_placement: Literal["pre", "post"] = "pre"
    dropout: float = 0.1
    easiest: int | None = None
    hardest: int | None = None
    eval_difficulties: tuple[int, ...] | None = None
    num_train: int | None = None
    per_bucket: int | None = None
    max_nodes: int = 20
    fewest_nodes: int = 8
    most_nodes: int = 16
    test_fewest_nodes: int | None = None
    test_most_nodes: int | None = None
    matched: bool = False
    balanced: bool = False
    max_length: int = 128
    data_seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        for steps in self.eval_steps:
            _require(steps >= 1, f"eval_steps={steps} must be at least 1 iteration")
        for name in ("min_steps", "max_steps", "most_steps", "easiest", "hardest", "per_bucket"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name}={value} must be at least 1, or none")
        _require(
            0 <= self.step_weight <= 1, f"step_weight={self.step_weight} must be between 0 and 1"
        )
        _require(0 <= self.dropout < 1, f"dropout={self.dropout} must be at least 0 and below 1")
        _require(
            self.layer_scale is None or self.layer_scale >= 0,
            f"layer_scale={self.layer_scale} must not be negative",
        )
        _require(
            self.num_train is None or self.num_train >= 0,
            f"num_train={self.num_train} must not be negative",
        )
        _require(self.data_seed >= 0, f"data_seed={self.data_seed} must not be negative")
        difficulties = self.eval_difficulties
        _require(
            difficulties is None or min(difficulties, default=0) >= 1,
            f"eval_difficulties={difficulties} must be at least one, all of 1 or more, or none",
        )
        language = self.task == "language"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            read = field.name == "task" or (field.name == "eval_steps") == language
            _require(
                read or value == field.default,
                f"{field.name}={value} has no meaning for task={self.task}; leave it out",
            )

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
        if cfg.recurrence != "untied":  # which reads max_steps alone
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
                    2 <= fewest <= most <= cfg.max_nodes,
                    f"{prefix}fewest_nodes={fewest} and {prefix}most_nodes={most} must go from 2 "
                    f"or more to max_nodes={cfg.max_nodes} or fewer",
                )
        _require(
            v.easiest <= v.hardest,
            f"easiest={v.easiest} is above hardest={v.hardest}; change one of them",
        )

    @property
    def _train_nodes(self) -> tuple[int, int]:
        return self.cfg.fewest_nodes, self.cfg.most_nodes

    @property
    def _test_nodes(self) -> tuple[int, int] | None:
        fewest, most = self.cfg.test_fewest_nodes, self.cfg.test_most_nodes
        if fewest is None and most is None:
            return None
        low, high = self._train_nodes
        return low if fewest is None else fewest, high if most is None else most

    def task(self) -> Task:
        """The generator."""
        cfg = self.cfg
        if cfg.task == "reachability":
            return reachability.Reachability(
                max_nodes=cfg.max_nodes,
                train_nodes=self._train_nodes,
                test_nodes=self._test_nodes,
                variant="matched" if cfg.matched else "paper",
            )
        if cfg.task == "logic":
            return boolean_logic.BooleanLogic(max_length=cfg.max_length, balanced=cfg.balanced)
        return kinship.Kinship(max_length=cfg.max_length)

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
            seed=self.cfg.data_seed,
        )

    @property
    def train_steps(self) -> tuple[int, int]:
        """Fewest and most steps of a training step; an untied model always takes all."""
        v = self.values
        return (v.max_steps if self.cfg.recurrence == "untied" else v.min_steps), v.max_steps

    @property
    def most_steps(self) -> int:
        """The most that can ever be taken; an untied model has no block for more than max_steps."""
        v = self.values
        return v.max_steps if self.cfg.recurrence == "untied" else v.most_steps

    def model(self, trunk: TransformerConfig) -> DepthRecurrentConfig:
        """The architecture: the widths of a run's model in the paper's block for this task."""
        cfg, graph = self.cfg, self.cfg.task == "reachability"
        vocabulary = {
            "reachability": len(reachability.NAMES) + 1,
            "logic": len(boolean_logic.VOCABULARY),
            "kinship": len(kinship.VOCABULARY),
        }
        fields: dict[str, Any] = {
            name: getattr(cfg, name)
            for name in ("gate_bias", "depth_embedding", "norm_placement", "dropout")
        }
        return DepthRecurrentConfig.of(
            trunk,
            activation="relu" if graph else "gelu",
            vocab_size=vocabulary[cfg.task],
            max_steps=self.most_steps,
            positions="none" if graph else "rotary",
            readout="endpoints" if graph else "first",
            roles=graph,
            weights="untied" if cfg.recurrence == "untied" else "tied",
            gate=cfg.recurrence == "gated",
            layer_scale=self.values.layer_scale or None,
            **fields,
        )
