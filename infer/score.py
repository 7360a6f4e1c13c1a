"""The energy of given texts: how compatible each of their tokens is with what stands before it."""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlib_methods import losses, thinking_text
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.thinking_text import Thinker


class Score(NamedTuple):
    """Of each token of a text: its energy as a certain prediction, and the nats that thinking
    gives it."""

    text: str
    energies: list[float]
    nats: list[float]


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Thinker, params: Any, inputs: jax.Array, targets: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
    context = model.observe(params, inputs, positions, segments)
    energies = thinking_text.score(model.model, params, context, targets)
    return energies, losses.token_nll(model.predict(params, context), targets)


def score(restored: Restored, texts: Sequence[str]) -> list[Score]:
    """Energy and negative log-likelihood of every token of the texts, one text at a time.

    Raises ValueError where the run is no energy run, and for a text that is empty or longer than
    the model's context.
    """
    model = restored.require_thinker("score")
    encoded, scores = _encode(restored, texts), []
    width = max(map(len, encoded))
    with jax.set_mesh(restored.mesh):
        for text, ids in zip(texts, encoded, strict=True):
            inputs, targets, segments = (np.zeros((1, width), np.int32) for _ in range(3))
            inputs[0, : len(ids)] = [restored.first_token, *ids[:-1]]
            targets[0, : len(ids)], segments[0, : len(ids)] = ids, 1
            found = _score(model, restored.params, inputs, targets, segments)
            energies, nats = (np.asarray(x)[0, : len(ids)].tolist() for x in found)
            scores.append(Score(text, energies, nats))
    return scores


def _encode(restored: Restored, texts: Sequence[str]) -> list[list[int]]:
    encoded = [restored.tokenizer.encode(text).tolist() for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not 0 < len(ids) <= restored.model.max_length:
            raise ValueError(
                f"the text {text[:20]!r} has {len(ids)} tokens; a score takes 1 to "
                f"{restored.model.max_length}, the model's context"
            )
    return encoded


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError where the prompts cannot be read or are empty or too long."""
    _encode(restored, config.prompts())


def run(config: InferConfig, restored: Restored) -> None:
    """Scores the prompts; prints their means, and writes JSONL where `output` is given."""
    scores = score(restored, config.prompts())
    for one in scores:
        energy, nats = np.mean(one.energies), np.mean(one.nats)
        print(
            f"energy {energy:.4f}, {nats:.4f} nats per token, {len(one.nats)} tokens: {one.text!r}"
        )
    if config.output:
        lines = [json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in scores]
        epath.Path(config.output).expanduser().write_text("".join(lines))
