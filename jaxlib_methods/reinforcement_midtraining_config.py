"""The configuration of `--method=reinforcement_midtraining`; see the module of that name."""

import dataclasses
import warnings
from typing import Literal

from jaxlib_methods.models.config import check_choices

BALANCED_WEIGHT = 0.5  # of the length reward: from here on a wrong answer may beat a right one


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcementMidtrainingConfig:
    """Which tokens are reasoned about, how a thought is drawn and rewarded, and what it teaches.

    The defaults are RMT's (arXiv 2509.24375). RPT (2506.08007) is `positions=hard
    reward=prefix_match length_weight=0 ntp_weight=0`; RLP (2510.01265) is `positions=uniform
    reward=information_gain advantage=leave_one_out length_weight=0 ntp_weight=0 rollouts=16
    temperature=0.7 prompt_after=<think>`. "Not published" marks values that the paper leaves open.

    task: `text` reads the run's text; `parity` draws the bits whose parity is asked for;
        `questions` reads questions with their answers: what is learned after mid-training.
    bits: of a parity question; none is 8.
    questions: of `task=questions`, a JSONL file of objects with the texts `question` and `answer`;
        or `parity`, a set of 5 to 8 bits that is made here.
    validation_questions: the same for validation; none takes one in eight of `questions`, by hash.
    positions: which tokens are reasoned about, in proportions that go from first_tiers to
        last_tiers (`curriculum`), among the hardest tier alone (`hard`), or anywhere (`uniform`).
    positions_per_row: tokens reasoned about in each row of a step. Not published; 1.
    entropy: file of `infer --mode=entropy`, by which tokens belong to tiers; none measures every
        batch again by the model that the run begins with, and takes its quantiles.
    quantiles: of the entropy of tokens, where the easy, medium and hard tier begin. Not published;
        these suit bytes.
    thresholds: the same in nats, instead of quantiles; RPT evaluates with 0.5,1,1.5.
    first_tiers, last_tiers: proportions of easy, medium and hard tokens before curriculum_begin
        and after curriculum_end, shares of the run; a straight line between. The proportions are
        not published.
    policy: thoughts are the model's own (`sampled`), or made up by a rule and learned by their
        likelihood (`taught`): the cold start of a model that cannot think yet. Not published.
    rollouts: thoughts of each position.
    collect_parts: the prompts of a step think and are scored in so many parts, one after another:
        the memory of one part, and the same draws. Each device has a share of every part. Made-up
        thoughts take no such memory, and validation, which thinks once a position, goes in the
        parts of train.num_microbatches.
    gather_weights: while thoughts are drawn, every device holds the weights whole, but for what
        mesh.tensor cuts, in the compute dtype; otherwise they are gathered again for every token
        where mesh.fsdp cuts them, which needs less memory.
    max_thought: tokens of the longest thought; longer ones are cut.
    max_answer: tokens of an answer.
    force_close: a thought that is cut is ended for the model, which then answers; otherwise it
        has no answer.
    temperature: of sampling. Not published for RMT; RPT's.
    prompt_before, prompt_after: text around the prefix, in which `{budget}` is the budget in digits
        and `<budget>`, `<think>`, `</think>` and `<end>` are tokens: the tokenizer's own, or, of
        bytes, control characters. A backslash and n are a line break.
    prompt_length: tokens of the prefix that are read, the last ones; none reads all of its row.
    reward: the answer's first token is the text's (`match`); its bytes are a prefix of the text's
        that ends with a token (`prefix_match`); all of it is the text's (`exact`), but for white
        space and capitals (`same_text`), or what stands in its last \\boxed{} is (`boxed`); or the
        nats by which the thought raises the text's log-probability over that which a moving average
        of the model gives it without thought (`information_gain`, which draws no answer).
    length_weight: share of the length reward; below 0.5 a right answer of any length is worth more
        than a wrong one of the best length. Not published.
    length_peak: the length reward of a thought that has the budget's length. Not published.
    budget, budget_decay, least_budget: tokens of a thought, budget * budget_decay ** (t / T).
    advantage: rewards of a position's thoughts, whitened (`group`), against the mean of the others
        (`leave_one_out`), or as they are (`absolute`, in no paper).
    advantage_epsilon: what `group` adds to the deviation that it divides by. Not published.
    clip_low, clip_high: the ratio to the sampling policy is clipped to 1 - low and 1 + high. With
        one update a batch it is 1 but for rounding. RMT's equation has no clip, RLP's bounds are
        not published.
    token_mean: a response's loss is the mean over its tokens; otherwise their sum over the longest
        response's length.
    kl_weight: of the divergence from the initial model (the k3 estimator). Not published for RMT;
        0 in RPT and RLP.
    ntp_weight: of the next-token loss on all other tokens.
    rl_weight: of the policy's loss; 0 leaves reasoning out and trains next tokens alone, which is
        the baseline.
    ema_decay: of the moving average in `information_gain`, which is the model at the first step.
    guard: say so when the running mean of the reward falls this far below its best.
    data_seed: another number is another set of parity questions, or another order of a file's.
    """

    task: Literal["text", "parity", "questions"] = "text"
    bits: int | None = None
    questions: str | None = None
    validation_questions: str | None = None
    positions: Literal["curriculum", "hard", "uniform"] = "curriculum"
    positions_per_row: int = 1
    entropy: str | None = None
    quantiles: tuple[float, ...] = (0.5, 0.7, 0.85)
    thresholds: tuple[float, ...] | None = None
    first_tiers: tuple[float, ...] = (0.6, 0.3, 0.1)
    last_tiers: tuple[float, ...] = (0.1, 0.3, 0.6)
    curriculum_begin: float = 0.3
    curriculum_end: float = 0.7
    policy: Literal["sampled", "taught"] = "sampled"
    rollouts: int = 8
    collect_parts: int = 1
    gather_weights: bool = True
    max_thought: int = 2048
    max_answer: int = 1
    force_close: bool = False
    temperature: float = 0.8
    prompt_before: str | None = None
    prompt_after: str = "<budget>{budget}<think>"
    prompt_length: int | None = None
    reward: Literal["match", "prefix_match", "exact", "same_text", "boxed", "information_gain"] = (
        "match"
    )
    length_weight: float = 0.3
    length_peak: float = 1.0
    budget: int = 800
    budget_decay: float = 0.2
    least_budget: int = 1
    advantage: Literal["group", "leave_one_out", "absolute"] = "group"
    advantage_epsilon: float = 1e-6
    clip_low: float = 0.2
    clip_high: float = 0.2
    token_mean: bool = True
    kl_weight: float = 0.0
    ntp_weight: float = 0.1
    rl_weight: float = 1.0
    ema_decay: float = 0.999
    guard: float = 0.5
    data_seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        _require(self.bits is None or self.bits >= 1, f"bits={self.bits} must be at least 1")
        _require(
            self.task != "questions" or self.questions is not None,
            "task=questions needs the file that holds them; give questions=FILE.jsonl, or "
            "questions=parity",
        )
        for name in (
            "positions_per_row", "collect_parts", "max_thought", "max_answer", "least_budget",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value >= 1, f"{name}={value} must be at least 1")
        grouped = self.advantage != "absolute"
        _require(
            self.rollouts >= (2 if grouped else 1),
            f"rollouts={self.rollouts}: advantage={self.advantage} compares the thoughts of a "
            "position with one another and needs at least 2; give more rollouts, or "
            "advantage=absolute",
        )
        _require(
            self.prompt_length is None or self.prompt_length >= 1,
            f"prompt_length={self.prompt_length} must be at least 1, or none",
        )
        for name in ("kl_weight", "ntp_weight", "rl_weight", "length_peak", "data_seed"):
            value = getattr(self, name)
            _require(value >= 0, f"{name}={value} must not be negative")
        for name in ("temperature", "guard", "advantage_epsilon"):
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive")
        _require(
            self.rl_weight > 0 or self.ntp_weight > 0,
            "rl_weight=0 and ntp_weight=0 leave nothing to train; raise one of them",
        )
        _require(
            0 <= self.ema_decay < 1,
            f"ema_decay={self.ema_decay} must be at least 0 and below 1",
        )
        _require(
            0 < self.clip_low <= 1 and self.clip_high > 0,
            f"clip_low={self.clip_low} must be above 0 and at most 1, clip_high={self.clip_high} "
            "above 0",
        )
        self._check_tiers()
        self._check_length()

    def _check_tiers(self) -> None:
        for name in ("first_tiers", "last_tiers"):
            parts = getattr(self, name)
            _require(
                len(parts) == 3 and min(parts) >= 0 and abs(sum(parts) - 1) < 1e-5,
                f"{name}={parts} must be three proportions of 1: easy, medium and hard",
            )
        for name in ("quantiles", "thresholds"):
            cuts = getattr(self, name)
            _require(
                cuts is None or (len(cuts) == 3 and cuts[0] < cuts[1] < cuts[2]),
                f"{name}={cuts} must be three rising numbers: where the easy, medium and hard "
                "tier begin",
            )
        _require(
            self.quantiles[0] >= 0 and self.quantiles[-1] < 1,
            f"quantiles={self.quantiles} must be at least 0 and below 1",
        )
        _require(
            0 <= self.curriculum_begin < self.curriculum_end <= 1,
            f"curriculum_begin={self.curriculum_begin} and "
            f"curriculum_end={self.curriculum_end} must be shares of the run, in this order",
        )

    def _check_length(self) -> None:
        _require(
            0 <= self.length_weight <= 1,
            f"length_weight={self.length_weight} must be between 0 and 1",
        )
        if self.length_weight >= BALANCED_WEIGHT:
            warnings.warn(
                f"length_weight={self.length_weight} is not below {BALANCED_WEIGHT}: a wrong "
                "answer whose thought has the best length is worth as much as a right one",
                stacklevel=2,
            )
        _require(
            self.length_weight == 0 or self.reward != "information_gain",
            f"length_weight={self.length_weight} has no meaning with reward=information_gain, "
            "which is in nats; give length_weight=0",
        )
        _require(
            self.least_budget <= self.budget <= self.max_thought,
            f"budget={self.budget} must be between least_budget={self.least_budget} and "
            f"max_thought={self.max_thought}, the longest thought",
        )
        _require(
            0 < self.budget_decay <= 1,
            f"budget_decay={self.budget_decay} must be above 0 and at most 1",
        )

    @property
    def less_memory(self) -> tuple[str, ...]:
        """Flags with which a step needs less of it."""
        parts = f"collect_parts={2 * self.collect_parts} (draws fewer thoughts at once)"
        again = "gather_weights=false (gathers weights again for every token)"
        return (parts, again) if self.gather_weights else (parts,)

    @property
    def has_tiers(self) -> bool:
        """Whether places are easy, medium or hard: text drawn anywhere is not told apart."""
        return self.task != "text" or self.positions != "uniform"

    @property
    def question_bits(self) -> int:
        """Bits of a parity question."""
        return 8 if self.bits is None else self.bits

    @property
    def answer_slots(self) -> int:
        """Tokens that are drawn behind a thought."""
        return 0 if self.reward == "information_gain" else self.max_answer

    @property
    def response_slots(self) -> int:
        """Tokens of the longest response: thought, its end, answer."""
        return self.max_thought + 1 + self.answer_slots


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"reinforcement_midtraining: {message}")
