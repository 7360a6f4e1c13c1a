"""The configuration of energy-based training; see `jaxlib_methods.energy`."""

import dataclasses
from typing import Literal

from jaxlib_methods.models.config import check_choices

SMALLEST_STEP = 1e-4  # the official code's clamp of alpha, in the forward pass only


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyConfig:
    """How a candidate begins, how it descends, and what of the descent is trained.

    num_steps: descent steps in training.
    max_steps: draw the number of each batch between num_steps and this; none always takes
        num_steps. Evaluation takes the largest.
    step_size: alpha at the start; none calibrates it so that the first update has the root mean
        square update_rms, whatever the vocabulary and width (the paper's 500 and 5 belong to a
        vocabulary of 50277 alone).
    update_rms: of the first update, in logits, where step_size is none. With the paper's step sizes
        its smallest model comes to some 2600 (System 1) and 26 (System 2) here, by the first
        slopes in EXPERIMENTS; 100 lies between the two best of a sweep on bytes.
    learn_step_size: alpha is trained, without weight decay.
    step_size_rate: factor on the learning rate of alpha relative to its start; the paper's rule
        of three times alpha is 3.
    random_step_size: f draws alpha uniformly between alpha / f and alpha * f, for each position;
        1 does not.
    noise: standard deviation of the Langevin noise on the logits before each step.
    eval_noise: the same in evaluation. The official code keeps the noise of training there; 0 is
        recommended for a single candidate.
    space: `probability` steps as the official code does, `logit` as the paper's equation 1.
    initial: candidates begin as standard normal logits (`noise`) or all equal (`uniform`).
    initial_scale: factor on the standard normal logits.
    loss_steps: the loss is the mean over `all` steps (with a drawn number, those taken), or that
        of the `last`.
    gradient: `one_step` takes each step's beginning as a constant; with loss_steps=last the steps
        before the last are then free. `all_steps` differentiates through the whole descent.
    memory: `recompute` saves one candidate a step; `save` keeps what its derivative needs.
    num_landscapes: learned vectors in front of the text, one per step and the last for all later
        ones; none is one for each trained step, as published. 0: none.
    candidate_embedding: `own` is a matrix of its own, `token` the token embedding.
    replay_size: descents kept to go on from, in sequences; 0: none.
    replay_every: fresh sequences for each replayed one.
    max_candidate_gib: refuse a batch whose candidates and their slopes take more, over all devices.
    """

    num_steps: int = 2
    max_steps: int | None = None
    step_size: float | None = None
    update_rms: float = 100.0
    learn_step_size: bool = True
    step_size_rate: float = 3.0
    random_step_size: float = 1.0
    noise: float = 0.0
    eval_noise: float = 0.0
    space: Literal["probability", "logit"] = "probability"
    initial: Literal["noise", "uniform"] = "noise"
    initial_scale: float = 1.0
    loss_steps: Literal["all", "last"] = "all"
    gradient: Literal["one_step", "all_steps"] = "one_step"
    memory: Literal["recompute", "save"] = "recompute"
    num_landscapes: int | None = None
    candidate_embedding: Literal["own", "token"] = "own"
    replay_size: int = 0
    replay_every: int = 2
    max_candidate_gib: float = 64.0

    def __post_init__(self) -> None:
        check_choices(self)
        _require(
            self.num_steps >= 1,
            f"energy.num_steps={self.num_steps} must be at least 1: a descent takes a step",
        )
        _require(
            self.max_steps is None or self.max_steps >= self.num_steps,
            f"energy.max_steps={self.max_steps} must be at least num_steps={self.num_steps}, "
            "or none",
        )
        _require(
            self.step_size is None or self.step_size >= SMALLEST_STEP,
            f"energy.step_size={self.step_size} must be at least {SMALLEST_STEP}, or none to "
            "calibrate it",
        )
        most = self._trained_steps
        _require(
            0 <= self.landscapes <= most,
            f"energy.num_landscapes={self.num_landscapes} must be between 0 and the {most} that "
            "these steps train: the last one serves every further step",
        )
        for name in ("update_rms", "max_candidate_gib", "initial_scale"):
            value = getattr(self, name)
            _require(value > 0, f"energy.{name}={value} must be positive")
        for name in ("step_size_rate", "noise", "eval_noise", "replay_size"):
            value = getattr(self, name)
            _require(value >= 0, f"energy.{name}={value} must not be negative")
        _require(
            self.random_step_size >= 1,
            f"energy.random_step_size={self.random_step_size} is a factor: at least 1",
        )
        _require(
            self.replay_every >= 1, f"energy.replay_every={self.replay_every} must be at least 1"
        )

    @property
    def _trained_steps(self) -> int:
        only_last = self.loss_steps == "last" and self.gradient == "one_step"
        return 1 if only_last else self.most_steps

    @property
    def landscapes(self) -> int:
        """Number of learned vectors in front of the text."""
        return self._trained_steps if self.num_landscapes is None else self.num_landscapes

    @property
    def most_steps(self) -> int:
        """The largest number of descent steps in training."""
        return self.max_steps or self.num_steps


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
