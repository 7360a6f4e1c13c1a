"""Rollouts of a model of known logits: where thoughts and answers end, what was sampled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import rollouts as rl
from jaxlib_methods.models import decoding
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.models.transformer import KVCache, Outputs

V = 7
PAD, CLOSE, END, THINK = 0, 1, 2, 3
IDS = rl.Tokens(close=CLOSE, end=END, pad=PAD)
FIXED = IDS._replace(end=-1)
N, P = 3, 6
THOUGHT, ANSWER = 4, 3


# A model of known logits: row b at position p gives table[b, p], whatever it reads.


def scripted(
    table: jax.Array,
    inputs: jax.Array,
    *,
    positions: jax.Array,
    segments: jax.Array,
    cache: KVCache | None = None,
    num_logits: int | None = None,
) -> Outputs:
    del segments
    logits = jnp.take_along_axis(table[: len(inputs)], positions[..., None], axis=1)
    return Outputs(logits if num_logits is None else logits[:, -num_logits:], None, cache)


def empty_cache(rows: int, slots: int) -> KVCache:
    nothing, unset = jnp.zeros((rows, 1, slots, 1)), jnp.zeros((rows, slots), jnp.int32)
    return KVCache(((nothing, nothing),), unset, unset, jnp.int32(0))


SIZES = ("num_rollouts", "max_thought", "max_answer", "force_close")


@functools.partial(jax.jit, static_argnames=("apply", *SIZES))
def run_script(apply: Any, table: jax.Array, lengths: jax.Array, **settings: Any) -> rl.Rollouts:
    prompts, cache = jnp.zeros((len(lengths), P), jnp.int32), empty_cache(len(lengths), P)
    return rl.roll_out(apply, table, prompts, lengths, cache=cache, **settings)


@functools.partial(jax.jit, static_argnums=0)
def draws(size: int, table: jax.Array, lengths: jax.Array, temperature: Any, key: Any) -> Any:
    """What each row would draw at each step, `[N, G, R]`, and its log-probability."""
    rows = (len(lengths), len(table) // len(lengths), size)
    begin = jnp.repeat(lengths, rows[1])[:, None] - 1 + jnp.arange(size)[None]
    logits = jnp.take_along_axis(table, begin[..., None], axis=1).reshape(*rows, V)
    # `sample` is the specification of a draw; its configuration takes no traced number.
    leaves, treedef = jax.tree.flatten(SamplingConfig())
    sampling = jax.tree.unflatten(treedef, [temperature, *leaves[1:]])

    def draw(n: jax.Array, g: jax.Array, t: jax.Array, logits: jax.Array) -> jax.Array:
        row_key = functools.reduce(jax.random.fold_in, (n, g, t), key)
        return decoding.sample(logits, sampling, key=row_key)

    each: Any = draw
    for in_axes in ((None, None, 0, 0), (None, 0, None, 0), (0, None, None, 0)):
        each = jax.vmap(each, in_axes)
    drawn = each(*map(jnp.arange, rows), logits)
    log_probs = jax.nn.log_softmax(logits / temperature)
    return drawn, jnp.take_along_axis(log_probs, drawn[..., None], axis=-1)[..., 0]


def says(*scripts: list[int], begin: list[int]) -> jax.Array:
    """Logits that give row b the tokens scripts[b], the first after its prompt of begin[b]."""
    table = np.zeros((len(scripts), 16, V), np.float32)
    for row, script in enumerate(scripts):
        for t, token in enumerate(script):
            table[row, begin[row] - 1 + t, token] = 9
    return jnp.asarray(table)


def test_rollouts_by_hand():
    begin = [4, 1, 6, 2, 3]
    table = says(
        [4, 5, CLOSE, 4, 5, 6],  # the answer is full
        [CLOSE, END, 4, 4, 4, 4],  # nothing thought, nothing said
        [4, 4, 4, 6, 5, END],  # never closed: what it says in place of close is not read
        [4, CLOSE, CLOSE, THINK, 4, 4],  # an answer may hold anything
        [END, 4, CLOSE, 6, END, 5],  # and so may a thought
        begin=begin,
    )
    settings: dict[str, Any] = {"num_rollouts": 1, "max_thought": 3, "max_answer": 2}
    settings |= {"temperature": 0.0, "tokens": IDS, "key": jax.random.key(0)}
    got = run_script(scripted, table, jnp.array(begin), force_close=True, **settings)
    assert got.tokens[:, 0].tolist() == [
        [4, 5, CLOSE, 4, 5, PAD],
        [CLOSE, END, PAD, PAD, PAD, PAD],
        [4, 4, 4, CLOSE, 5, END],
        [4, CLOSE, CLOSE, THINK, PAD, PAD],
        [END, 4, CLOSE, 6, END, PAD],
    ]
    assert got.where[:, 0].astype(int).tolist() == [
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 1],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
    ]
    assert got.lengths[:, 0].tolist() == [5, 2, 6, 4, 5]
    assert got.thought_lengths[:, 0].tolist() == [2, 0, 3, 1, 2]
    assert got.closed[:, 0].tolist() == [True, True, False, True, True]
    assert got.answers[:, 0].tolist() == [[4, 5], [PAD, PAD], [5, PAD], [CLOSE, THINK], [6, PAD]]
    assert got.answer_lengths[:, 0].tolist() == [2, 0, 1, 2, 1]
    likely = 9 - np.log(np.exp(9) + V - 1)  # greedy: at temperature 1
    np.testing.assert_allclose(got.log_probs, np.where(got.where, likely, 0), atol=1e-6)
    # Without force_close the third response ends with its thought; the others are the same.
    loose = run_script(scripted, table, jnp.array(begin), force_close=False, **settings)
    assert loose.tokens[2, 0].tolist() == [4, 4, 4, PAD, PAD, PAD]
    assert loose.where[2, 0].tolist() == [True] * 3 + [False] * 3
    assert (int(loose.lengths[2, 0]), int(loose.thought_lengths[2, 0])) == (3, 3)
    assert (bool(loose.closed[2, 0]), int(loose.answer_lengths[2, 0])) == (False, 0)
    assert loose.answers[2, 0].tolist() == [PAD, PAD]
    # Padding is written everywhere, and closes nothing.
    settings["tokens"] = IDS._replace(pad=CLOSE)
    padded = run_script(scripted, table, jnp.array(begin), force_close=False, **settings)
    written = jnp.arange(6)[None, None] < loose.lengths[..., None]
    assert jnp.array_equal(padded.tokens, jnp.where(written, loose.tokens, CLOSE))
    assert padded.answers[2, 0].tolist() == [CLOSE, CLOSE]
    for name in ("where", "lengths", "thought_lengths", "closed", "answer_lengths"):
        assert jnp.array_equal(getattr(padded, name), getattr(loose, name)), name
    others = jnp.array([0, 1, 3, 4])
    for x, y in zip(got, loose, strict=True):
        assert jnp.array_equal(x[others], y[others])


def test_any_temperature_is_safe_and_leaves_padding_of_the_vocabulary_out():
    logits = jnp.array([92.0, 95.0, -1e30, -1e30])

    def probabilities(temperature: float) -> jax.Array:
        return jax.nn.softmax(decoding.temper(logits, temperature))

    np.testing.assert_allclose(probabilities(1e30), [0.5, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(probabilities(1e-37), [0, 1, 0, 0], atol=1e-6)
    odds = np.exp(-3 / 2)
    np.testing.assert_allclose(probabilities(2.0)[0], odds / (1 + odds), rtol=1e-6)
    np.testing.assert_allclose(probabilities(0.0), jax.nn.softmax(logits), rtol=1e-6)


def specification(
    drawn: list[int], log_probs: list[float], ids: rl.Tokens, answer: int, force_close: bool
) -> list[Any]:
    """The fields of one response of what a model would draw at each step."""
    size = THOUGHT + 1 + answer
    tokens, where, kept, said, closed, thought = [], [], [], [], False, 0
    while len(tokens) < THOUGHT and not closed:
        closed = drawn[len(tokens)] == ids.close
        thought += not closed
        kept.append(log_probs[len(tokens)])
        tokens.append(drawn[len(tokens)])
        where.append(True)
    if not closed and force_close:
        tokens, where, kept = [*tokens, ids.close], [*where, False], [*kept, 0.0]
    while (closed or force_close) and len(tokens) < thought + 1 + answer:
        token = drawn[len(tokens)]
        kept.append(log_probs[len(tokens)])
        tokens.append(token)
        where.append(True)
        if token == ids.end:
            break
        said.append(token)
    rest = size - len(tokens)
    return [
        tokens + [ids.pad] * rest,
        where + [False] * rest,
        kept + [0.0] * rest,
        len(tokens),
        thought,
        closed,
        said + [ids.pad] * (answer - len(said)),
        len(said),
    ]


@pytest.mark.parametrize(
    ("ids", "answer", "force_close", "temperature"),
    [
        (IDS, ANSWER, True, 0.7),
        (IDS, ANSWER, False, 1.3),
        (FIXED, 1, True, 0.7),
        (FIXED, 0, False, 0.7),
        (IDS, 0, True, 1.0),
    ],
)
def test_random_rollouts_are_those_of_the_specification(
    ids: rl.Tokens, answer: int, force_close: bool, temperature: float
):
    lengths, size, num = [2, 6, 1], THOUGHT + 1 + answer, 16
    table = 1.5 * jax.random.normal(jax.random.key(1), (N * num, P + size, V))
    got = run_script(
        scripted,
        table,
        jnp.array(lengths),
        num_rollouts=num,
        max_thought=THOUGHT,
        max_answer=answer,
        temperature=temperature,
        tokens=ids,
        force_close=force_close,
        key=jax.random.key(5),
    )
    drawn, log_probs = draws(size, table, jnp.array(lengths), temperature, jax.random.key(5))
    drawn, log_probs, got = jax.tree.map(np.asarray, (drawn, log_probs, got))
    seen = set()
    for n, g in np.ndindex(N, num):
        script = drawn[n, g].tolist(), log_probs[n, g].tolist()
        want = specification(*script, ids, answer, force_close)
        fields = rl.Rollouts(*(x[n, g] for x in got))
        np.testing.assert_allclose(fields.log_probs, want[2], atol=1e-5)
        for name, x, y in zip(fields._fields, fields, want, strict=True):
            assert name == "log_probs" or x.tolist() == y, name
        seen.add((bool(fields.closed), int(fields.answer_lengths)))
    assert {closed for closed, _ in seen} == {True, False}
    assert answer in {count for _, count in seen}
    assert force_close or (False, 0) in seen


def test_the_loop_ends_when_all_rows_are_done():
    calls = []

    def counted(table: jax.Array, inputs: jax.Array, **rest: Any) -> Outputs:
        jax.debug.callback(lambda shape=inputs.shape: calls.append(shape))
        return scripted(table, inputs, **rest)

    scripts = [CLOSE, END], [CLOSE, END], [4, 4, CLOSE, END], [4, CLOSE, END]
    table = says(*scripts, begin=[2, 2, 6, 6])
    settings: dict[str, Any] = {"num_rollouts": 2, "max_thought": 5, "max_answer": 4}
    settings |= {"temperature": 0.0, "tokens": IDS, "key": jax.random.key(0)}
    got = run_script(counted, table, jnp.array([2, 6]), force_close=True, **settings)
    jax.effects_barrier()
    assert got.lengths.tolist() == [[2, 2], [4, 3]]
    assert calls == [(2, P - 1)] + [(4, 1)] * 4  # each prompt is read once


@pytest.mark.parametrize("force_close", [True, False])
def test_a_limit_is_a_shorter_longest_thought(force_close: bool):
    lengths, num = jnp.array([2, 6, 1]), 8
    table = 1.5 * jax.random.normal(jax.random.key(1), (N * num, P + 8, V))
    settings: dict[str, Any] = {"num_rollouts": num, "max_answer": ANSWER, "temperature": 1.0}
    settings |= {"tokens": IDS, "force_close": force_close, "key": jax.random.key(5)}
    short = run_script(scripted, table, lengths, max_thought=2, **settings)
    got = run_script(scripted, table, lengths, max_thought=4, thought_limit=2, **settings)
    for name, x, y in zip(got._fields, got, short, strict=True):
        same = name not in ("tokens", "where", "log_probs")
        np.testing.assert_array_equal(x if same else x[..., :-2], y, err_msg=name)
    assert not got.where[..., -2:].any()
    free = run_script(scripted, table, lengths, max_thought=4, thought_limit=9, **settings)
    assert int(free.thought_lengths.max()) == 4 > int(got.thought_lengths.max()) == 2


def test_what_was_not_sampled_may_be_nan():
    lengths = jnp.array([2, 5])
    where = jnp.array([[[True, True, False, True, False]], [[True, False, False, False, False]]])
    counts = jnp.array([[4], [1]])
    none = jnp.zeros((2, 1), jnp.int32)
    tokens = jnp.array([[[4, 5, CLOSE, 6, PAD]], [[4, PAD, PAD, PAD, PAD]]])
    got = rl.Rollouts(
        tokens, where, jnp.zeros(where.shape), counts, none, none > 0, none[..., None], none
    )
    real = jax.random.normal(jax.random.key(0), (2, 6, V))
    reads = jnp.concatenate([where[:, 0], jnp.zeros((2, 1), bool)], axis=1)

    def apply(table: jax.Array, inputs: jax.Array, *, num_logits: int, **_: Any) -> Outputs:
        assert (inputs.shape, num_logits) == ((2, P + 5), 6)
        return Outputs(table, None, None)

    @jax.jit
    @jax.value_and_grad
    def total(table: jax.Array) -> jax.Array:
        prompts = jnp.zeros((2, P), jnp.int32)
        return rl.response_log_probs(apply, table, prompts, lengths, got, temperature=0.5).sum()

    log_probs = jax.nn.log_softmax(2 * real[:, :5])
    picked = jnp.take_along_axis(log_probs, tokens[:, 0, :, None], axis=-1)[..., 0]
    for junk in (0.0, jnp.inf, jnp.nan):
        value, grad = total(jnp.where(reads[..., None], real, junk))
        np.testing.assert_allclose(value, picked[where[:, 0]].sum(), rtol=1e-5)
        assert bool(jnp.isfinite(grad).all())
        assert jnp.array_equal(grad.any(axis=-1), reads)


def test_targets_are_read_after_close_and_after_the_prefix():
    lengths, target = jnp.array([2, 6]), jnp.array([4, 6])
    table = jax.random.normal(jax.random.key(0), (4, 20, V))
    thoughts = jnp.array([[0, 3], [2, 3]])
    tokens = jnp.array([[[1, 4, 0, 0], [4, 5, 6, 0]], [[4, 4, 1, 5], [4, 4, 4, 1]]])
    blank = jnp.zeros((2, 2), jnp.int32)
    got = rl.Rollouts(
        tokens, tokens > 0, 0.0 * tokens, blank, thoughts, blank > 0, blank[..., :0, None], blank
    )
    got = got._replace(answers=jnp.zeros((2, 2, 0), jnp.int32))
    prompts = jnp.zeros((2, P), jnp.int32)
    with_thought = functools.partial(rl.target_log_probs, scripted, tokens=FIXED)
    scores = jax.jit(with_thought)(table, prompts, lengths, got, target)
    table = np.asarray(jax.nn.log_softmax(table))
    log_probs = table.reshape(2, 2, 20, V)
    for n, g in np.ndindex(2, 2):
        want = log_probs[n, g, lengths[n] + thoughts[n, g], target[n]]
        np.testing.assert_allclose(scores[n, g], want, rtol=1e-5)
    bare = jax.jit(functools.partial(rl.prefix_log_probs, scripted))
    scores = bare(table, prompts, lengths, target)
    np.testing.assert_allclose(scores, table[range(2), lengths - 1, target], rtol=1e-5)


def test_a_thought_that_is_not_read_gains_nothing():
    lengths, target, tokens = jnp.array([2, 6]), jnp.array([4, 6]), jnp.full((2, 3, 4), 4)
    blank = jnp.zeros((2, 3), jnp.int32)
    got = rl.Rollouts(
        tokens, tokens > 0, 0.0 * tokens, blank, blank + 2, blank > 0, blank[..., :0, None], blank
    )
    got = got._replace(answers=jnp.zeros((2, 3, 0), jnp.int32))

    def deaf(table: jax.Array, inputs: jax.Array, **_: Any) -> Outputs:
        return Outputs(jnp.broadcast_to(table, (len(inputs), 1, V)), None, None)

    table, prompts = jax.random.normal(jax.random.key(0), (V,)), jnp.zeros((2, P), jnp.int32)
    thinking = rl.target_log_probs(deaf, table, prompts, lengths, got, target, tokens=FIXED)
    without = rl.prefix_log_probs(deaf, table, prompts, lengths, target)
    assert jnp.array_equal(thinking, jnp.broadcast_to(without[:, None], (2, 3)))


def test_rollouts_have_no_gradient():
    def total(table: jax.Array) -> jax.Array:
        prompts, cache = jnp.zeros((1, P), jnp.int32), empty_cache(1, P + 3)
        settings: dict[str, Any] = {"num_rollouts": 2, "max_thought": 2, "max_answer": 1}
        settings |= {"temperature": 1.0, "tokens": IDS, "key": jax.random.key(0)}
        settings |= {"cache": cache, "force_close": True}
        return rl.roll_out(scripted, table, prompts, jnp.array([2]), **settings).log_probs.sum()

    value, grad = jax.jit(jax.value_and_grad(total))(jnp.ones((2, 12, V)))
    assert value < 0
    assert not grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rollouts": 0}, "num_rollouts 0 must be at least 1"),
        ({"max_answer": -1}, "max_thought 3 and max_answer -1 must be at least 0"),
        ({"max_thought": 0, "force_close": False}, "max_thought 0 samples nothing"),
        ({"cache": empty_cache(4, 20)}, "cache for 4 rows does not fit 2 prompts"),
        ({"numbers": jnp.arange(3)}, r"numbers must be of shape \(2,\), one for each prompt: \(3,"),
        ({"cache": (1, 2)}, "rollouts share a KVCache, not a tuple"),
        ({"cache": empty_cache(2, 5)}, "cache of 5 slots is too small for 6 prompt tokens"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str):
    settings: dict[str, Any] = {"num_rollouts": 1, "max_thought": 3, "max_answer": 2}
    settings |= {"temperature": 1.0, "tokens": IDS, "key": jax.random.key(0)}
    settings |= {"cache": empty_cache(2, 6), "force_close": True} | changes
    table, prompts = jnp.zeros((2, 12, V)), jnp.zeros((2, P), jnp.int32)
    with pytest.raises(ValueError, match=message):
        rl.roll_out(scripted, table, prompts, jnp.array([2, 3]), **settings)
