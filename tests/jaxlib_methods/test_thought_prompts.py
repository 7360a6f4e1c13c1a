"""Prefixes, truths, prompts with a budget, and taught thoughts, by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import taught_thoughts
from jaxlib_methods.rollouts import Tokens
from jaxlib_methods.thought_prompts import Asked, ask, frame, make_frame
from jaxlib_methods.train.tokenizer import ByteTokenizer

# A document cut at the row's start, and one of four tokens, of which the last target is padding.
INPUTS = jnp.array([[11, 12, 13, 21, 22, 23, 24], [31, 32, 33, 34, 35, 36, 37]])
TARGETS = jnp.array([[12, 13, 21, 22, 23, 24, 99], [32, 33, 34, 35, 36, 37, 38]])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
WHERE = jnp.array([[True] * 6 + [False], [True] * 7])
TOKENS = Tokens(close=3, end=4, pad=0)


def asked(places: Any, prefix_length: int, answer_length: int) -> Asked:
    return ask(
        INPUTS, TARGETS, POSITIONS, WHERE, jnp.array(places),
        prefix_length=prefix_length, answer_length=answer_length,
    )  # fmt: skip


def test_a_prefix_begins_with_its_document_and_a_truth_ends_with_it():
    found = asked([[1, 4], [0, 5]], 3, 2)
    np.testing.assert_array_equal(
        found.prefixes, [[0, 11, 12], [0, 21, 22], [0, 0, 31], [34, 35, 36]]
    )
    np.testing.assert_array_equal(found.lengths, [2, 2, 1, 3])
    np.testing.assert_array_equal(found.truths, [[13, 21], [23, 24], [32, 33], [37, 38]])
    np.testing.assert_array_equal(found.truth_lengths, [2, 2, 2, 2])
    # The first document's last target is the next one's first token; behind it nothing is asked.
    found = asked([[2, 5], [6, 3]], 9, 3)
    np.testing.assert_array_equal(found.truths, [[21, 0, 0], [24, 0, 0], [38, 0, 0], [35, 36, 37]])
    np.testing.assert_array_equal(found.truth_lengths, [1, 1, 1, 3])
    np.testing.assert_array_equal(found.lengths, [3, 3, 7, 4])


def test_what_stands_outside_of_a_document_changes_nothing():
    other = INPUTS.at[0, :3].set(77)
    places = jnp.array([[4], [2]])
    arguments = (TARGETS, POSITIONS, WHERE, places)
    lengths: Any = {"prefix_length": 6, "answer_length": 1}
    for a, b in zip(ask(INPUTS, *arguments, **lengths), ask(other, *arguments, **lengths),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)


def test_a_budget_is_a_row_of_a_table():
    tokenizer = ByteTokenizer()
    made = make_frame(
        tokenizer.encode, tokenizer.special, most=12, before="B{budget}:",
        after="<budget>{budget}<think>",
    )  # fmt: skip
    assert made.length == 4 + 4
    found = asked([[1, 4], [0, 5]], 3, 1)
    prompts, lengths = jax.jit(frame)(made, jnp.int32(7), found.prefixes, found.lengths)
    text = [ord("B"), ord("0"), ord("7"), ord(":")]
    behind = [1, ord("0"), ord("7"), 2]
    np.testing.assert_array_equal(prompts[0], [0, *text, 11, 12, *behind])
    np.testing.assert_array_equal(prompts[2], [0, 0, *text, 31, *behind])
    np.testing.assert_array_equal(prompts[3], [*text, 34, 35, 36, *behind])
    np.testing.assert_array_equal(lengths, found.lengths + 8)
    hidden = make_frame(tokenizer.encode, tokenizer.special, most=12, before="", after="<think>")
    prompts, _ = frame(hidden, jnp.int32(12), found.prefixes, found.lengths)
    np.testing.assert_array_equal(prompts, np.pad(found.prefixes, ((0, 0), (0, 1)),
                                                  constant_values=2))  # fmt: skip


def test_a_backslash_and_n_are_a_line_break():
    found = make_frame(ByteTokenizer().encode, {}, most=1, before=r"a\nb{budget}", after="")
    assert found.before.tolist() == [[97, 10, 98, 48], [97, 10, 98, 49]]


@pytest.mark.parametrize("prompt", ["<think>{budgt}", r"{budget}\n{length}", "{Budget}", "{{n}}"])
def test_a_word_in_braces_that_stands_for_nothing_is_refused(prompt):
    with pytest.raises(
        ValueError, match=r"holds \{\w+\}, which stands for nothing; write {budget}"
    ):
        make_frame(ByteTokenizer().encode, ByteTokenizer().special, most=3, before="", after=prompt)


@pytest.mark.parametrize("prompt", ['{"a": 1}', "{}", r"in \boxed{answer}", r"\frac{a}{b}", "{0}"])
def test_other_braces_are_text(prompt):
    found = make_frame(ByteTokenizer().encode, {}, most=0, before=prompt, after="")
    assert bytes(found.before[0].astype("uint8").tolist()).decode() == prompt


def test_frames_that_cannot_be():
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="has no token <budget>; it has"):
        make_frame(tokenizer.encode, {"<think>": 2}, most=3, before="", after="<budget>")

    def joins(text: str) -> list[int]:
        return [len(text)] * (1 if "00" in text else len(text))

    with pytest.raises(ValueError, match="has between 1 and 2 tokens, depending on the budget"):
        make_frame(joins, {}, most=12, before="", after="{budget}")


def test_taught_thoughts_are_parities_or_filler():
    prefix = np.frombuffer(b"01101001=", np.uint8).astype(np.int32)
    many = 400
    question = Asked(
        jnp.tile(jnp.asarray(prefix)[None], (many, 1)), jnp.full(many, 9),
        jnp.full((many, 1), ord("0")), jnp.ones(many, jnp.int32),
    )  # fmt: skip
    thoughts, lengths = taught_thoughts.of_parity(question, max_thought=12, key=jax.random.key(0))
    texts = [
        bytes(row[:size].tolist()).decode()
        for row, size in zip(np.asarray(thoughts), np.asarray(lengths), strict=True)
    ]
    useful = [text for text in texts if text.startswith("0")]
    assert 0.4 < len(useful) / many < 0.6
    assert {text[:8] for text in useful} == {"01001110"}
    assert {len(text) for text in useful} == set(range(8, 13))
    others = [text for text in texts if not text.startswith("0")]
    assert {len(text) for text in others} == set(range(13))
    assert set("".join(others)) == {"."}


def test_taught_thoughts_of_text_repeat_its_end():
    found = asked([[1, 4], [0, 5]], 3, 1)
    seen = set()
    for seed in range(20):
        thoughts, lengths = taught_thoughts.of_text(found, max_thought=5, key=jax.random.key(seed))
        for thought, size, prefix, length in zip(
            np.asarray(thoughts), np.asarray(lengths), np.asarray(found.prefixes),
            np.asarray(found.lengths), strict=True,
        ):  # fmt: skip
            assert size <= length
            np.testing.assert_array_equal(thought[:size], prefix[len(prefix) - size :])
            seen.add(int(size))
    assert seen == {0, 1, 2, 3}


def test_a_taught_response_is_thought_close_and_the_truth():
    question = Asked(
        jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32),
        jnp.array([[7, 8], [7, 0], [9, 9]]), jnp.array([2, 1, 2]),
    )  # fmt: skip
    thoughts, lengths = jnp.array([[5, 6], [5, 6], [5, 6]]), jnp.array([2, 1, 0])
    found = taught_thoughts.respond(thoughts, lengths, question, tokens=TOKENS, answer_slots=2)
    np.testing.assert_array_equal(
        found.tokens[:, 0], [[5, 6, 3, 7, 8], [5, 3, 7, 4, 0], [3, 9, 9, 0, 0]]
    )
    np.testing.assert_array_equal(found.where[:, 0].sum(axis=1), [5, 4, 3])
    np.testing.assert_array_equal(found.lengths[:, 0], [5, 4, 3])
    np.testing.assert_array_equal(found.answers[:, 0], [[7, 8], [7, 0], [9, 9]])
    np.testing.assert_array_equal(found.answer_lengths[:, 0], [2, 1, 2])
    none = taught_thoughts.respond(thoughts, lengths, question, tokens=TOKENS, answer_slots=0)
    np.testing.assert_array_equal(none.tokens[:, 0], [[5, 6, 3], [5, 3, 0], [3, 0, 0]])
    np.testing.assert_array_equal(none.lengths[:, 0], [3, 2, 1])
