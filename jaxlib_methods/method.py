"""The contract between a training method and the trainer.

A method is two pure functions and, where its program changes during a run, the method that
follows it. Flags, presets, sharding, checkpoints and metrics come from the trainer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np

# A metric is a pair (sum, count): summed over micro-batches, hosts and steps, divided once.
Metrics = dict[str, tuple[jax.Array, jax.Array]]
Params = Any
Extra = Any


class Batch(NamedTuple):
    """Packed documents. Every field is `[B, L]`.

    inputs, targets: int32 token ids; `targets[:, t]` follows `inputs[:, t]`.
    positions: int32, counted from 0 in each document.
    segments: int32, the same within a document, 0 on padding.
    where: bool, False deletes the target (padding).
    """

    inputs: jax.Array
    targets: jax.Array
    positions: jax.Array
    segments: jax.Array
    where: jax.Array


class TieredBatch(NamedTuple):
    """A `Batch` that knows how hard its targets are. Every field is `[B, L]`.

    tier: int8, of the target: an index of `curriculum.TIERS`, -1 for none. The others as in
    `Batch`.
    """

    inputs: jax.Array
    targets: jax.Array
    positions: jax.Array
    segments: jax.Array
    where: jax.Array
    tier: jax.Array


class LossFn(Protocol):
    """`loss(params, extra, batch, *, step, key) -> (scalar, metrics)`.

    The scalar is what is minimised: a mean over `metrics["loss"][1]` tokens, so that
    micro-batches can be weighted by that count. `metrics["loss"]` is the next-token negative
    log-likelihood in nats, whatever else the scalar contains. Called without gradient on
    validation data it gives the validation metrics. `step` is an int32 scalar array.
    """

    def __call__(
        self, params: Params, extra: Extra, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]: ...


class StatefulLossFn(Protocol):
    """`loss(params, extra, batch, state, *, step, key) -> (scalar, metrics, new state)`.

    Of a method with `init_state`. The state is an argument like the batch, without a gradient. It
    moves once for each micro-batch, in their order, so that a step depends on
    `--train.num_microbatches`; what moves once a step belongs in `collect`, see `CollectFn`.
    """

    def __call__(
        self,
        params: Params,
        extra: Extra,
        batch: Any,
        state: Any,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, Metrics, Any]: ...


class CollectFn(Protocol):
    """`collect(params, extra, batch, state, *, step, key) -> (batch, new state, metrics)`.

    What a step does before its gradient, and without one: rollouts, scores, a moving average of
    the parameters. It sees the whole batch; the loss gets what it gives, in micro-batches, so
    every field of it must have the batch's rows in front.
    """

    def __call__(
        self,
        params: Params,
        extra: Extra,
        batch: Any,
        state: Any,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[Any, Any, Metrics]: ...


class Dataset(Protocol):
    """Examples by global index; the loop asks for nothing else.

    num_examples: of the validation split, or of one epoch. sequence_length: tokens (targets) of an
    example. bytes_per_token: of text; None where losses are not of text. fingerprint: another one
    where the examples are others.
    """

    num_examples: int
    sequence_length: int
    bytes_per_token: float | None
    fingerprint: str

    def rows(self, indices: Sequence[int] | np.ndarray) -> Any:
        """The examples as a NamedTuple of numpy arrays `[len(indices), ...]`.

        The training split is endless; behind the end of the validation split rows count nothing.
        """
        ...


class Pretrained(NamedTuple):
    """A finished model: what `LoadPretrained` gives for a run's or a Hugging Face folder."""

    config: Any  # its TransformerConfig
    params: Params  # sharded like a model of our own; None where they were not asked for
    tokenizer: str | None  # fingerprint of its tokenizer, None where the folder has none
    version: str = ""  # another one where the weights are others


class LoadPretrained(Protocol):
    """Reads a finished model, its parameters cast to `dtype` (None: as they are stored).

    With `weights=False` only the configuration is read, and no device is touched.
    """

    def __call__(
        self, source: str, *, weights: bool = True, dtype: str | None = None
    ) -> Pretrained: ...


class Tokenizer(Protocol):
    """What a method may know of a run's tokenizer.

    separator: the id in front of every document. special: ids by name, of those of `<budget>`,
    `<think>`, `</think>` and `<end>` that it has.
    """

    separator: int
    special: Mapping[str, int]

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 `[n]`."""
        ...

    def spelling(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of every id, uint8 `[V, W]`, and how many they are, int32 `[V]`."""
        ...


class OpenTiers(Protocol):
    """Opens the run's text with the tiers of its targets: split -> rows that are `TieredBatch`es.

    path: an entropy file of this text. cut: the known entropies of a sample -> the three
    thresholds. Raises ValueError where the file belongs to another text.
    """

    def __call__(
        self, path: str, cut: Callable[[np.ndarray], Sequence[float]]
    ) -> Callable[[Literal["train", "validation"]], Dataset]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may know about the run it is built for."""

    model: Any  # the student's TransformerConfig
    num_steps: int  # optimiser steps of the whole run
    sequence_length: int  # tokens
    batch_size: int  # rows of a micro-batch, over all devices
    tokenizer: str  # fingerprint of the run's tokenizer
    load_pretrained: LoadPretrained
    num_microbatches: int = 1  # of an optimiser step
    tokens: Tokenizer | None = None  # the run's tokenizer
    init_from: str | None = None  # the finished model that the run begins with
    open_tiers: OpenTiers | None = None  # the run's text with tiers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A training method.

    init_params: key -> the trained parameters, boxed with logical axis names (traced by the
        trainer inside `jit`, so that they are born sharded).
    init: key -> what is not a parameter (LET: the frozen teacher). Not traced: it may read files.
        A restart calls it again and must get the same.
    loss: see `LossFn`, or `StatefulLossFn` where there is an `init_state`.
    flops_per_token: analytic training FLOPs per token of a sequence of the run's length,
        forward and backward, multiply and add counted apart.
    until, then: from optimiser step `until` on the run continues as `then`. The program of
        `then` contains nothing of this method, and `extra` is freed.
    init_state: key -> what a step changes beside the parameters (EBT: the replay buffer), boxed
        like them and part of every checkpoint. Parameters made from this key are not the run's,
        which may come from `--checkpoint.init_from`: a copy of those is taken at step 0, as
        `reinforcement_state.move` does.
    collect: see `CollectFn`. The method's state is then its own, and the loss is a `LossFn`.
    evaluate: what validation computes; None: the loss. A method with a state must give it.
    rows_multiple: the rows of a micro-batch on each device must be a multiple of it.
    rate_factors: top-level name of parameters -> factor on their learning rate.
    dataset: split -> the examples, where they are not the text of `data.source`.
    monitor: the metrics of a logged step or of an evaluation, with `step` -> what can be judged
        by them: a metric's name, which is written as 1 or 0, and one sentence about what has gone
        wrong (what is seen, the threshold, what to do), or None. `train.on_failure` decides what
        follows; a warning is said once for each name.
    length_flag: what sets the length of an example, by which `mesh.sequence` must divide it.
    """

    init_params: Callable[[jax.Array], Params]
    init: Callable[[jax.Array], Extra]
    loss: Callable[..., Any]
    flops_per_token: float
    until: int | None = None
    then: "Method | None" = None
    init_state: Callable[[jax.Array], Any] | None = None
    collect: CollectFn | None = None
    evaluate: LossFn | None = None
    rows_multiple: int = 1
    rate_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dataset: Callable[[Literal["train", "validation"]], Dataset] | None = None
    monitor: Callable[[Mapping[str, float]], Mapping[str, str | None]] | None = None
    length_flag: str = "data.sequence_length"
