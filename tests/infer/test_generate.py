"""Text from a model: stop strings, streaming, batches, the context's end."""

import json
from typing import Any, cast

import pytest

from jaxlib_methods.infer import generate as generate_module
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.generate import (
    Completion,
    bucket,
    find_stop,
    generate,
    left_pad,
    settled_length,
)
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models.decoding import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0)
HOT = SamplingConfig(temperature=1.5)
NEW = 40  # more than one chunk


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc", [], 3),
        ("abc", ["d"], 3),
        ("abc", ["cd"], 2),
        ("abc", ["bcd", "cx"], 1),  # the longest beginning counts
        ("abc", ["abcd"], 0),
        ("ab\n", ["\n\n"], 2),
        ("ab\ufffd", [], 2),  # a cut character
        ("ab\ufffdc", [], 4),  # bytes that are no character
        ("ab\ufffd", ["bx"], 1),
    ],
)
def test_settled_length_by_hand(text: str, stop: list[str], expected: int):
    assert settled_length(text, stop) == expected


def test_the_earliest_stop_string_counts():
    assert find_stop("one. two; three", [";", ". "]) == 3
    assert find_stop("one", [";"]) is None


def row(restored: Restored, *, stop: tuple[str, ...], new: int = 100) -> generate_module.TextRow:
    return generate_module.TextRow(restored, stop, new)


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "expected", "num_tokens", "finish"),
    [
        ("abENDcd", ("END",), "ab", 5, "stop_string"),
        ("aENENDc", ("END",), "aEN", 6, "stop_string"),
        ("ab\n\n\nc", ("\n\n",), "ab", 4, "stop_string"),
        ("xé€y!z", ("y!",), "xé€", 8, "stop_string"),  # 1 + 2 + 3 + 2 bytes
        ("ab\0cEND", ("END",), "ab", 3, "stop_token"),
        ("aENDb\0", ("END",), "a", 4, "stop_string"),
        ("abcEND", ("xyz",), "abcEND", 6, None),
    ],
)
def test_stop_strings_across_tokens_and_calls(
    restored: Restored,
    chunk: int,
    text: str,
    stop: tuple[str, ...],
    expected: str,
    num_tokens: int,
    finish: str | None,
):
    got = row(restored, stop=stop)
    tokens = list(text.encode())
    pieces = [got.add(tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]
    assert (got.text, len(got.tokens), got.finish) == (expected, num_tokens, finish)
    assert "".join(pieces) == expected


def test_a_cut_character_is_held_back_until_it_is_whole(restored: Restored):
    got = row(restored, stop=())
    assert [got.add([byte]) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    last = row(restored, stop=(), new=2)
    assert [last.add([byte]) for byte in "a€".encode()] == ["a", "\ufffd", "", ""]
    assert last.finish == "length"


def test_left_padding():
    tokens, lengths = left_pad([[1, 2, 3], [4]], width=4)
    assert tokens.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert lengths.tolist() == [3, 1]
    assert [bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]


def test_streaming_shows_the_text_and_changes_nothing(restored: Restored):
    settings: dict[str, Any] = {"max_new_tokens": NEW, "sampling": HOT, "seed": 3}
    plain = generate(restored, ["def "], **settings)
    pieces: list[str] = []
    shown = generate(restored, ["def "], show=pieces.append, **settings)
    assert shown == plain
    assert "".join(pieces) == plain[0].text
    assert len(pieces) > 3
    settings["seed"] = 4
    assert generate(restored, ["def "], **settings) != plain


def test_a_batch_is_its_prompts_alone(restored: Restored):
    prompts = ["def f(", "", "import numpy", "x"]
    settings: dict[str, Any] = {"max_new_tokens": 8, "sampling": GREEDY}
    together = generate(restored, prompts, **settings)
    assert [c.prompt for c in together] == prompts
    for completion in together:
        assert generate(restored, [completion.prompt], **settings)[0] == completion
    assert len({tuple(c.tokens) for c in together}) == 4


def test_samples_differ_and_stop_strings_end_rows_apart(restored: Restored):
    settings: dict[str, Any] = {"max_new_tokens": NEW, "sampling": HOT, "num_samples": 3}
    free = generate(restored, ["a", "b"], **settings)
    assert [(c.prompt, c.sample) for c in free] == [(p, s) for p in "ab" for s in range(3)]
    assert len({tuple(c.tokens) for c in free}) == 6
    stop = next(c for c in free[0].text[5:] if c.isascii() and c.isprintable())
    stopped = generate(restored, ["a", "b"], stop=[stop], **settings)
    assert stopped[0].finish == "stop_string"
    assert len(stopped[0].tokens) < len(free[0].tokens)
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.tokens == before.tokens[: len(after.tokens)]


def num_compilations() -> list[int]:
    return [cast(Any, f)._cache_size() for f in (generate_module._start, generate_module._steps)]


def test_one_compilation_for_a_bucket(restored: Restored):
    settings: dict[str, Any] = {"max_new_tokens": 8}
    generate(restored, ["abc"], sampling=GREEDY, **settings)
    before = num_compilations()
    generate(restored, ["another"], sampling=SamplingConfig(temperature=2, top_k=3), **settings)
    generate(restored, [""], sampling=HOT, seed=8, stop=["q"], **settings)
    assert num_compilations() == before
    generate(restored, ["long" * 5], sampling=GREEDY, **settings)
    assert num_compilations() == [n + 1 for n in before]  # another bucket


def test_a_mesh_changes_no_text(restored: Restored, restored_on_eight: Restored):
    prompts = ["one", "two three", "", "four"]
    settings: dict[str, Any] = {"max_new_tokens": 8, "sampling": HOT}
    assert generate(restored_on_eight, prompts, **settings) == generate(
        restored, prompts, **settings
    )


def test_the_end_of_the_context_is_reached_but_not_crossed(restored: Restored):
    prompt = "x" * 53  # and the first token: 54 of 64
    full = generate(restored, [prompt], max_new_tokens=10, sampling=HOT, seed=1)
    assert len(full[0].tokens) == 10
    with pytest.raises(ValueError, match=r"54 tokens and max_new_tokens=11 .* 64; .*tokens=10"):
        generate(restored, [prompt], max_new_tokens=11, sampling=HOT)
    with pytest.raises(ValueError, match=r"prompt of 65 tokens leaves no room .* of 64"):
        generate(restored, ["x" * 64], max_new_tokens=1, sampling=HOT)


def test_output_is_one_json_object_a_continuation(
    restored: Restored, tmp_path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "out.jsonl"
    config = InferConfig(
        workdir="x", prompt=("a", "b"), num_samples=2, max_new_tokens=8, output=str(path)
    )
    generate_module.run(config, restored)
    expected = generate(
        restored, ["a", "b"], max_new_tokens=8, num_samples=2, sampling=SamplingConfig()
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [Completion(**line) for line in lines] == expected
    shown = capsys.readouterr().out
    assert all(c.prompt + c.text in shown for c in expected)
    with pytest.raises(ValueError, match=r"--stream shows one .* 2 prompts x num_samples=2"):
        generate_module.run(
            InferConfig(workdir="x", prompt=("a", "b"), num_samples=2, stream=True), restored
        )


def test_streaming_prints_the_prompt_and_its_text(
    restored: Restored, capsys: pytest.CaptureFixture[str]
):
    config = InferConfig(workdir="x", prompt=("ab",), max_new_tokens=8, stream=True)
    generate_module.run(config, restored)
    text = generate(restored, ["ab"], max_new_tokens=8, sampling=SamplingConfig())[0].text
    assert capsys.readouterr().out == f"ab{text}\n"
