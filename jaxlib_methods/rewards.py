"""What a sampled response is worth: was the answer right, was the thought as long as asked?

Rewards are constants: no gradient flows through them.
"""

# Dimension key: A answer slots, B bytes, K boundaries, V vocabulary, W bytes of a token. Dots are
# prompts and their rollouts; the arrays of one call have them alike, or of size 1.

import jax
import jax.numpy as jnp
import numpy as np


def token_budget(
    step: jax.Array | int, *, num_steps: int, first: int = 800, decay: float = 0.2, least: int = 1
) -> jax.Array:
    """Tokens that a thought should have (RMT, arXiv 2509.24375, dynamic token budget).

        B_t = max(least, floor(first * decay^(t / T)))      t = step, T = num_steps, t/T in [0, 1]

    step: int of any shape, counted from 0. Returns int32 of step's shape, the same on every
    device: powers are taken once in float64, and the step looks up how many have been passed.

    >>> import jax.numpy as jnp
    >>> token_budget(jnp.array([0, 250, 500, 1000, 2000]), num_steps=1000).tolist()
    [800, 534, 357, 160, 160]
    """
    if num_steps < 1 or least < 1 or not 0 < decay <= 1:
        raise ValueError(
            f"num_steps {num_steps} and least {least} must be at least 1, and decay {decay} above "
            "0 and at most 1"
        )
    shares = np.arange(num_steps + 1) / num_steps
    # Rounded, since 100 * 0.29 is 28.999999999999996.
    budgets = np.floor(np.round(first * np.float64(decay) ** shares, 9)).astype(np.int64)
    budgets = np.maximum(budgets, least)
    # last_steps[i] is the last step whose budget is larger than budgets[-1] + i.
    larger = np.arange(budgets[-1], budgets[0])
    last_steps = num_steps - np.searchsorted(budgets[::-1], larger, side="right")
    step = jnp.asarray(step)[..., None]
    passed = step <= jnp.expand_dims(jnp.asarray(last_steps, jnp.int32), range(step.ndim - 1))
    return jnp.int32(budgets[-1]) + passed.sum(axis=-1, dtype=jnp.int32)


def length_reward(length: jax.Array, budget: jax.Array | int, *, peak: float = 1.0) -> jax.Array:
    """Reward of a thought's length, a triangle about its budget (RMT, arXiv 2509.24375).

        r = peak l / B   up to B,     peak (2B - l) / B   up to 2B,     0 beyond

    length: int `[...]`, tokens of the thought; budget: int, a scalar or like length, at least 1.
    Returns float32 `[...]`.

    >>> import jax.numpy as jnp
    >>> length_reward(jnp.array([0, 5, 10, 15, 20, 21]), 10).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    budget = jnp.asarray(budget)
    # Integers until the division, so that both sides of the peak round alike.
    near = jnp.maximum(budget - jnp.abs(length - budget), 0)
    return peak * near.astype(jnp.float32) / budget.astype(jnp.float32)


def _check_ranks(name: str, array: jax.Array, other: str, wanted: jax.Array) -> None:
    # Added on the left instead, an axis of prompts would meet one of rollouts of the same size.
    if array.ndim != wanted.ndim:
        raise ValueError(
            f"{name} of shape {array.shape} must have the axes of {other}, {wanted.shape}; "
            "add one of size 1 for the rollouts"
        )


def match_reward(answers: jax.Array, answer_lengths: jax.Array, target: jax.Array) -> jax.Array:
    """1 where the first token of the answer is the target (RMT, arXiv 2509.24375, eq. 5).

        r = 1[y_1 = x]

    answers: int `[..., A]`; answer_lengths, target: int `[...]`; an answer of length 0 is wrong.
    Returns float32 `[...]`.

    >>> import jax.numpy as jnp
    >>> answers, target = jnp.array([[7, 0], [7, 0], [4, 7]]), jnp.array([7, 7, 7])
    >>> match_reward(answers, jnp.array([1, 0, 2]), target).tolist()
    [1.0, 0.0, 0.0]
    """
    _check_ranks("target", target, "answer_lengths", answer_lengths)
    right = (answers[..., 0] == target) & (answer_lengths > 0)
    return right.astype(jnp.float32)


def prefix_match_reward(
    answer_bytes: jax.Array,
    answer_lengths: jax.Array,
    truth_bytes: jax.Array,
    boundaries: jax.Array,
) -> jax.Array:
    """1 where the answer is a whole number of true tokens (RPT, arXiv 2506.08007, prefix matching).

        r = 1[y = x_(1:l) and l in boundaries],   l > 0 the bytes of the answer y

    x is the true continuation and boundaries are the cumulative byte lengths of its tokens.
    answer_bytes, truth_bytes: uint8 `[..., B]`; answer_lengths: int `[...]`, bytes; boundaries: int
    `[..., K]`, 0 where unused. Returns float32 `[...]`.

    >>> import jax.numpy as jnp
    >>> a, b, c = b"abc"
    >>> truth, boundaries = jnp.array([a, b, c]), jnp.array([2, 3])
    >>> answer = jnp.array([a, b, 0])
    >>> [float(prefix_match_reward(answer, jnp.array(l), truth, boundaries)) for l in (1, 2)]
    [0.0, 1.0]
    """
    lengths = answer_lengths[..., None]
    _check_ranks("truth_bytes", truth_bytes, "answer_bytes", answer_bytes)
    _check_ranks("boundaries", boundaries, "answer_bytes", answer_bytes)
    size = answer_bytes.shape[-1]
    behind = jnp.expand_dims(jnp.arange(size), range(lengths.ndim - 1)) >= lengths
    same = jnp.all(behind | (answer_bytes == truth_bytes), axis=-1)
    whole = jnp.any(boundaries == lengths, axis=-1)
    fits = (answer_lengths > 0) & (answer_lengths <= size)
    return (same & whole & fits).astype(jnp.float32)


def spell(
    tokens: jax.Array,
    lengths: jax.Array,
    table: jax.Array,
    table_lengths: jax.Array,
    *,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """The bytes of tokens, one after the other, for `prefix_match_reward`.

    tokens: int `[..., A]`, of which the first `lengths` (`[...]`) count; table: uint8 `[V, W]`, the
    bytes of every token; table_lengths: int `[V]`, how many it has (0 for a special token).
    Returns uint8 `[..., size]`, 0 behind the last byte and cut at `size`, and int32 `[...]`, the
    number of bytes of all tokens, which may exceed `size`.

    >>> import jax.numpy as jnp
    >>> table = jnp.array([[97, 0], [98, 99]], jnp.uint8)
    >>> text, size = spell(jnp.array([1, 0]), jnp.array(2), table, jnp.array([1, 2]), size=4)
    >>> text.tolist(), int(size)
    ([98, 99, 97, 0], 3)
    """
    axes = range(lengths.ndim)
    counts = jnp.expand_dims(jnp.arange(tokens.shape[-1]), axes) < lengths[..., None]
    tokens = jnp.where(counts, tokens, 0)
    sizes = jnp.where(counts, jnp.asarray(table_lengths)[tokens], 0)
    ends = jnp.cumsum(sizes, axis=-1, dtype=jnp.int32)
    total = ends[..., -1]
    place = jnp.expand_dims(jnp.arange(size), axes)
    # The token that holds a byte is the first one that ends behind it.
    holder = (ends[..., None, :] <= place[..., None]).sum(axis=-1)
    holder = jnp.minimum(holder, tokens.shape[-1] - 1)
    begin = jnp.take_along_axis(ends - sizes, holder, axis=-1)
    within = jnp.clip(place - begin, 0, table.shape[-1] - 1)
    text = jnp.asarray(table)[jnp.take_along_axis(tokens, holder, axis=-1), within]
    return jnp.where(place < total[..., None], text, 0).astype(jnp.uint8), total


def without_form(table: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A vocabulary's bytes without what two equal answers may differ in, for `spell`.

    White space is left out, capital letters of ASCII become small. table: uint8 `[V, W]`; lengths:
    int32 `[V]`. Returns the same shapes.

    >>> import numpy as np
    >>> table, sizes = without_form(np.array([[32, 65]], np.uint8), np.array([2], np.int32))
    >>> bytes(table[0, : sizes[0]])
    b'a'
    """
    kept, sizes = np.zeros_like(table), np.zeros_like(lengths)
    for row, size in enumerate(lengths):
        text = b"".join(table[row, :size].tobytes().lower().split())
        kept[row, : len(text)] = np.frombuffer(text, np.uint8)
        sizes[row] = len(text)
    return kept, sizes


def same_text_reward(
    answer_bytes: jax.Array,
    answer_lengths: jax.Array,
    truth_bytes: jax.Array,
    truth_lengths: jax.Array,
) -> jax.Array:
    """1 where two texts are equal, and not empty: a verifier's reward.

    answer_bytes, truth_bytes: uint8 `[..., B]`, 0 behind the end; answer_lengths, truth_lengths:
    int `[...]`, bytes. Returns float32 `[...]`.

    >>> import jax.numpy as jnp
    >>> answers, truth = jnp.array([[52, 50], [52, 0]]), jnp.array([[52, 50]])
    >>> same_text_reward(answers, jnp.array([2, 1]), truth, jnp.array([2])).tolist()
    [1.0, 0.0]
    """
    _check_ranks("truth_bytes", truth_bytes, "answer_bytes", answer_bytes)
    fits = (answer_lengths > 0) & (answer_lengths <= answer_bytes.shape[-1])
    same = jnp.all(answer_bytes == truth_bytes, axis=-1) & (answer_lengths == truth_lengths)
    return (same & fits).astype(jnp.float32)


def boxed(text: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""What stands in the last `\boxed{...}` of texts, whose braces may be nested.

    text: uint8 `[..., B]`, 0 behind the end; lengths: int `[...]`. Returns the same shapes; length
    0 where there is none, or it is not closed.

    >>> import numpy as np
    >>> answer = rb"so \boxed{\frac{1}{2}}."
    >>> inside, size = boxed(np.frombuffer(answer, np.uint8), np.int32(len(answer)))
    >>> bytes(inside.tolist())[: int(size)]
    b'\\frac{1}{2}'
    """
    mark = np.frombuffer(rb"\boxed{", np.uint8)
    text, size = jnp.asarray(text), text.shape[-1]
    place = jnp.expand_dims(jnp.arange(size), range(text.ndim - 1))
    ahead = jnp.pad(text, [(0, 0)] * (text.ndim - 1) + [(0, len(mark))])
    here = jnp.ones(text.shape, bool)
    for i, byte in enumerate(mark):
        here &= ahead[..., i : i + size] == byte
    begin = jnp.max(jnp.where(here, place + len(mark), 0), axis=-1, keepdims=True)  # 0: none
    inside = (place >= begin) & (place < lengths[..., None])
    change = (text == ord("{")).astype(jnp.int32) - (text == ord("}"))
    closes = inside & (jnp.cumsum(jnp.where(inside, change, 0), axis=-1) < 0)
    end = jnp.argmax(closes, axis=-1, keepdims=True)
    found = jnp.where(closes.any(axis=-1, keepdims=True) & (begin > 0), end - begin, 0)
    moved = jnp.take_along_axis(text, jnp.minimum(place + begin, size - 1), axis=-1)
    return jnp.where(place < found, moved, 0), found[..., 0].astype(jnp.int32)


def total_reward(match: jax.Array, length: jax.Array, *, weight: float) -> jax.Array:
    """What RMT maximises (arXiv 2509.24375): the answer and the length of its thought.

        r = (1 - weight) r_match + weight r_length

    Below a weight of 1/2 a right answer beats a wrong one whatever their lengths. match, length:
    `[...]`. Returns `[...]`.

    >>> import jax.numpy as jnp
    >>> total_reward(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), weight=0.25).tolist()
    [0.75, 0.25]
    """
    return (1 - weight) * match + weight * length


def information_gain(log_prob: jax.Array, baseline_log_prob: jax.Array) -> jax.Array:
    """RLP's reward (arXiv 2510.01265, eq. 3): by how much a thought makes the truth likelier.

        r = log p(x | prefix, thought) - log p_baseline(x | prefix)

    Neither gets a gradient. log_prob, baseline_log_prob: `[...]`, the baseline of size 1 in the
    axis of rollouts. Returns `[...]` nats.

    >>> import jax.numpy as jnp
    >>> information_gain(jnp.array([[-1.0, -3.0]]), jnp.array([[-2.0]])).tolist()
    [[1.0, -1.0]]
    """
    _check_ranks("baseline_log_prob", baseline_log_prob, "log_prob", log_prob)
    return jax.lax.stop_gradient(log_prob - baseline_log_prob)
