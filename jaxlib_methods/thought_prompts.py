"""From rows of text to what a model is asked: a prefix, how long to think, begin.

    before(budget)  prefix  after(budget) <think>

Every prompt of a step has the same budget, which is data: rows of a table, made once.
"""

# Dimension key: D rows, L sequence, K positions of a row, N = D K prompts, P prefix, A answer
# slots, W prompt.

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SPECIALS = ("<budget>", "<think>", "</think>", "<end>")
_MARKUP = re.compile("|".join(map(re.escape, SPECIALS)))
# A word in braces, and before it what has others: the arguments of a command of TeX.
_WORD = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})+|(\{[A-Za-z_]\w*\})")


class Asked(NamedTuple):
    """What is asked at chosen places of a batch.

    prefixes: int32 `[N, P]`, left-padded, with their lengths `[N]`; truths: int32 `[N, A]`, what
    the text says next, with their lengths `[N]`.
    """

    prefixes: jax.Array
    lengths: jax.Array
    truths: jax.Array
    truth_lengths: jax.Array


def ask(
    inputs: jax.Array,
    targets: jax.Array,
    positions: jax.Array,
    where: jax.Array,
    places: jax.Array,
    *,
    prefix_length: int,
    answer_length: int,
) -> Asked:
    """Prefixes up to places of a batch, and what follows them.

    inputs, targets, positions: int32 `[D, L]`; where: bool `[D, L]`; places: int32 `[D, K]`. A
    prefix begins where its document does, and a truth ends there.
    """

    def row(
        inputs: jax.Array, targets: jax.Array, positions: jax.Array, where: jax.Array, t: jax.Array
    ) -> Asked:
        length = jnp.minimum(positions[t] + 1, prefix_length)
        back = t - prefix_length + 1 + jnp.arange(prefix_length)
        inside = jnp.arange(prefix_length) >= prefix_length - length
        prefix = jnp.where(inside, inputs[jnp.maximum(back, 0)], 0)
        ahead = t + jnp.arange(answer_length)
        there = ahead < len(targets)
        ahead = jnp.minimum(ahead, len(targets) - 1)
        # A target belongs to the document of its input.
        same = positions[ahead] == positions[t] + jnp.arange(answer_length)
        goes_on = jnp.cumprod(there & same & where[ahead])
        return Asked(
            prefix, length, jnp.where(goes_on > 0, targets[ahead], 0), goes_on.sum(dtype=jnp.int32)
        )

    of_row = jax.vmap(row, in_axes=(None, None, None, None, 0))
    found = jax.vmap(of_row)(inputs, targets, positions, where, places)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


class Frame(NamedTuple):
    """What stands around a prefix, by budget: int32 `[budgets, W']` each."""

    before: np.ndarray
    after: np.ndarray

    @property
    def length(self) -> int:
        """Tokens that a frame adds to a prefix."""
        return self.before.shape[1] + self.after.shape[1]


def make_frame(
    encode: Callable[[str], Any],
    specials: Mapping[str, int],
    *,
    most: int,
    before: str,
    after: str,
) -> Frame:
    """The frame of each budget from 0 to `most`.

    before, after: text in which `{budget}` is the budget, in as many digits as `most` has, and the
    names of `SPECIALS` are their tokens; a backslash and n are a line break, which no flagfile
    holds. Raises ValueError for another word in braces, where the tokenizer has no such token, and
    where budgets give frames of different lengths.
    """
    digits = len(str(most))

    def table(template: str) -> np.ndarray:
        rows = []
        template = template.replace(r"\n", "\n")
        for word in filter(None, _WORD.findall(template)):
            if word != "{budget}":
                raise ValueError(
                    f"the prompt {template!r} holds {word}, which stands for nothing; write "
                    "{budget}, or other words without braces"
                )
        for budget in range(most + 1):
            text = template.replace("{budget}", f"{budget:0{digits}d}")
            rows.append(_encode(text, encode, specials))
        lengths = {len(row) for row in rows}
        if len(lengths) > 1:
            raise ValueError(
                f"the prompt {template!r} has between {min(lengths)} and {max(lengths)} tokens, "
                "depending on the budget: this tokenizer joins digits; leave {budget} out of it, "
                "or give a budget of fewer digits"
            )
        return np.array(rows, np.int32).reshape(most + 1, -1)

    return Frame(table(before), table(after))


def _encode(text: str, encode: Callable[[str], Any], specials: Mapping[str, int]) -> list[int]:
    ids: list[int] = []
    end = 0
    for found in _MARKUP.finditer(text):
        ids += [int(i) for i in encode(text[end : found.start()])]
        if found.group() not in specials:
            raise ValueError(
                f"the tokenizer has no token {found.group()}; it has {sorted(specials)}; say it in "
                "words in reinforcement_midtraining.prompt_before or prompt_after"
            )
        ids.append(specials[found.group()])
        end = found.end()
    return ids + [int(i) for i in encode(text[end:])]


def frame(
    frame: Frame, budget: jax.Array, prefixes: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Prompts int32 `[N, W]`, left-padded, and their lengths, from left-padded prefixes."""
    P = prefixes.shape[1]
    before, after = jnp.asarray(frame.before)[budget], jnp.asarray(frame.after)[budget]
    width = before.shape[0]
    place = jnp.arange(width + P)[None] - (P - lengths)[:, None]  # 0 where `before` begins
    padded = jnp.pad(prefixes, ((0, 0), (width, 0)))
    tokens = jnp.where(place >= width, padded, 0)
    if width:
        inside = (place >= 0) & (place < width)
        tokens = jnp.where(inside, before[jnp.clip(place, 0, width - 1)], tokens)
    behind = jnp.broadcast_to(after[None], (len(prefixes), after.shape[0]))
    return jnp.concatenate([tokens, behind], axis=1), lengths + frame.length
