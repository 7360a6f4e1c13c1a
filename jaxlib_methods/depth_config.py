"""How deep a recurrent-depth language model thinks, and how it is sampled."""

import dataclasses
from typing import Literal

from jaxlib_methods.models.config import check_choices

TOLERANCES = {"none": 0.0, "kl": 5e-4, "latent": 0.03, "entropy": 1e-3, "argmax": 5.0}
LARGEST_WAVE = 64  # where nobody asks for more


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """How much to think about each token, and which tokens are thought about at once.

    num_steps: iterations of the core, at most; none takes the model's recurrence.
    exit: what ends a token's iterations early: by how much a check differs from the last one, in
        `kl` KL(previous || current) of the prediction in nats, in `latent` the relative change of
        the state, in `entropy` the change of the prediction's entropy in nats; in `argmax` how
        many iterations the likeliest token has stayed the same. `none` takes all of them. All but
        `latent` need a pass of the coda and the head for each check.
    tolerance: a token ends below it (`argmax`: from it on); none is the published 5e-4 nats for
        `kl`, 0.03 for `latent`, 1e-3 nats for `entropy` and 5 iterations for `argmax`.
    min_steps: a token does not end before this many iterations.
    check_every: iterations between two checks. The first of `kl`, `entropy` and `argmax` has
        nothing to compare with: the earliest end is at the second.
    exit_in_prompt: whether tokens that are read at once, as prompts are, may end early too; as
        published they may not.
    kept_steps: of how many iterations a token keeps keys and values, in a ring; 1 is a cache no
        larger than without depth, 0 keeps all, or the one that `sampler=parallel` needs.
    warm_start: a token begins from where the one before it ended, not from noise. Tokens that are
        read at once begin from noise.
    state_scale: of the noise that a token begins from; 0 begins at zero.
    sampler: `sequential` takes all iterations of a token before the next token; `continuous` the
        same for each row, where no row waits for another; `parallel` thinks about consecutive
        tokens at once, of which the later ones are drafts (arXiv 2510.14961); `speculative` drafts
        with few iterations and verifies the drafts at once.
    inner_steps: `parallel`: iterations of each round.
    freeze_tolerance: `parallel`: a token is final when its state changes by less, relatively, in a
        round.
    embedding_average: `parallel`: the weight of the last round's embedding in this round's.
    noise: `parallel`: the weight of new noise in the state before a round, over 1 + the iterations
        taken.
    max_wave: `parallel`: tokens that are thought about at once, at most; none takes as many as
        begin while one takes twice the iterations of the model, and no more than 64.
    draft_steps: `speculative`: iterations of a draft.
    draft_tokens: `speculative`: drafts that are verified at once.
    """

    num_steps: int | None = None
    exit: Literal["none", "kl", "latent", "entropy", "argmax"] = "none"
    tolerance: float | None = None
    min_steps: int = 1
    check_every: int = 1
    exit_in_prompt: bool = False
    kept_steps: int = 0
    warm_start: bool = False
    state_scale: float = 1.0
    sampler: Literal["sequential", "continuous", "parallel", "speculative"] = "sequential"
    inner_steps: int = 4
    freeze_tolerance: float = 0.03
    embedding_average: float = 0.1
    noise: float = 0.0
    max_wave: int | None = None
    draft_steps: int = 4
    draft_tokens: int = 8

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("min_steps", "check_every", "inner_steps", "draft_steps", "draft_tokens"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "must be at least 1")
        for name in ("kept_steps", "state_scale"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "must not be negative")
        tolerance, steps, wave = self.tolerance, self.num_steps, self.max_wave
        _require("num_steps", steps, steps is None or steps >= 1, "must be at least 1, or none")
        _require(
            "tolerance", tolerance, tolerance is None or tolerance >= 0, "must not be negative"
        )
        _require(
            "max_wave",
            wave,
            wave is None or wave >= 2,
            "must be at least 2, the last token and a draft, or none",
        )
        frozen = self.freeze_tolerance
        _require("freeze_tolerance", frozen, frozen > 0, "must be positive")
        average = self.embedding_average
        _require("embedding_average", average, 0 <= average < 1, "must be at least 0, below 1")
        _require("noise", self.noise, 0 <= self.noise <= 1, "must be between 0 and 1")
        if steps is not None:
            self._check_steps(steps)
        self._check_sampler()

    def _check_steps(self, num_steps: int) -> None:
        names = ["min_steps", "kept_steps"]
        names += {"parallel": ["inner_steps"], "speculative": ["draft_steps"]}.get(self.sampler, [])
        for name in names:
            value = getattr(self, name)
            why = f"is more than the {num_steps} iterations of num_steps; give at most {num_steps}"
            _require(name, value, value <= num_steps, why)

    def _check_sampler(self) -> None:
        whole = self.sampler in ("parallel", "speculative")
        why = f"is for sampler=sequential or continuous, not {self.sampler}; change one of them"
        _require("exit", self.exit, self.exit == "none" or not whole, why)
        _require(
            "warm_start", self.warm_start, not self.warm_start or self.sampler != "speculative", why
        )
        _require(
            "kept_steps",
            self.kept_steps,
            self.sampler != "parallel" or self.kept_steps <= 1,
            "must be 1 for sampler=parallel, whose tokens share the keys of half-finished ones",
        )

    @property
    def threshold(self) -> float:
        """The tolerance, or the published one of the exit where it is none."""
        return TOLERANCES[self.exit] if self.tolerance is None else self.tolerance

    @property
    def checks_prediction(self) -> bool:
        """Whether a check reads a prediction, for which it needs the coda."""
        return self.exit in ("kl", "entropy", "argmax")


def _require(name: str, value: object, condition: bool, why: str) -> None:
    if not condition:
        raise ValueError(f"depth.{name}={value} {why}")


def resolve(cfg: DepthConfig, recurrence: int) -> DepthConfig:
    """The same with what follows from a model's number of iterations where it is not given.

    Raises ValueError where they do not fit the rest.

    >>> resolve(DepthConfig(sampler="parallel"), 32).kept_steps
    1
    """
    num_steps = cfg.num_steps or recurrence
    kept = cfg.kept_steps or (1 if cfg.sampler == "parallel" else num_steps)
    # A token settles in about the model's iterations; a round adds one token.
    wave = cfg.max_wave or min(LARGEST_WAVE, 2 * -(-num_steps // cfg.inner_steps) + 2)
    return dataclasses.replace(cfg, num_steps=num_steps, kept_steps=kept, max_wave=wave)
