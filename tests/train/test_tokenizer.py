import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jaxlib_methods.train.tokenizer import HuggingFaceTokenizer, load_tokenizer


def write_tokenizer(path: Path, special: list[str], **options: int) -> Path:
    """A byte-level BPE tokenizer without merges: one id per byte, special tokens first."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(special) + 256,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["aaaa"], trainer)
    if options:
        trained.enable_truncation(**options)
    trained.save(str(path))
    return path


def test_bytes_go_there_and_back() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé").tolist() == [97, 195, 169]
    text = "naïve → 日本 🙂\r\n"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, 97, 0, 98]) == "ab"
    assert tokenizer.decode([97, 195]) == "a\ufffd"
    assert (tokenizer.vocab_size, tokenizer.separator, tokenizer.fingerprint) == (256, 0, "bytes")


def test_bytes_refuse_nul() -> None:
    with pytest.raises(ValueError, match="NUL at byte 3"):
        load_tokenizer("bytes").encode("é!\0")


@pytest.mark.parametrize("where", ["file", "folder"])
def test_hugging_face_tokenizer(tmp_path: Path, where: str) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", ["<pad>", "</s>"])
    tokenizer = load_tokenizer(str(path if where == "file" else tmp_path))
    assert (tokenizer.vocab_size, tokenizer.separator) == (258, 1)
    text = "naïve 日本\n"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert len(ids) == len(text.encode())
    assert tokenizer.decode([1, *ids.tolist(), 1]) == text
    np.testing.assert_array_equal(tokenizer.encode_batch(["x", text])[1], ids)


def test_tokens_are_spelled_in_bytes(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<think>"])
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]
    # A merged token, one of sentence pieces, and a byte by its name.
    for name in ("\u0120a", "\u2581é", "<0xE6>"):
        vocabulary[name] = len(vocabulary)
    path.write_text(json.dumps(definition))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.special == {"<think>": 1}
    table, lengths = tokenizer.spelling()
    assert (table.dtype, table.shape, lengths.shape) == (np.uint8, (261, 3), (261,))
    spelled = [bytes(row[:size]) for row, size in zip(table, lengths, strict=True)]
    assert spelled[:2] == [b"", b""]
    assert spelled[258:] == [b" a", " é".encode(), b"\xe6"]
    text = "naïve 日本\n"
    assert b"".join(spelled[i] for i in tokenizer.encode(text)) == text.encode()
    table, lengths = load_tokenizer("bytes").spelling()
    assert table[:, 0].tolist() == list(range(256))
    assert set(lengths.tolist()) == {1}
    names = ["<budget>", "<think>", "</think>", "<end>"]
    assert list(load_tokenizer("bytes").special) == names


def test_special_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "t.json", ["</s>"])))
    assert 0 not in tokenizer.encode("a</s>b")
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"


def test_truncation_of_the_file_is_ignored(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "t.json", ["</s>"], max_length=2)
    tokenizer = load_tokenizer(str(path))
    assert len(tokenizer.encode("abcde")) == 5
    assert len(tokenizer.encode_batch(["abcde"])[0]) == 5


def test_separator_is_the_end_of_text_token_or_the_one_given(tmp_path: Path) -> None:
    path = str(write_tokenizer(tmp_path / "t.json", ["<|begin_of_text|>", "<pad>", "<|im_end|>"]))
    assert load_tokenizer(path).separator == 2
    assert load_tokenizer(path, separator_id=1).separator == 1
    with pytest.raises(ValueError, match="separator_id=259 must be between 0 and 258"):
        load_tokenizer(path, separator_id=259)
    with pytest.raises(ValueError, match=r"separator_id=7 is for a tokenizer.json"):
        load_tokenizer("bytes", separator_id=7)
    other = write_tokenizer(tmp_path / "other.json", ["<pad>"])
    with pytest.raises(ValueError, match=r"other.json has no end-of-text .*'<pad>'.*separator_id"):
        load_tokenizer(str(other))


def test_fingerprint_depends_on_content_only(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "t.json", ["</s>"])
    spaced = tmp_path / "spaced.json"
    backwards = dict(reversed(json.loads(path.read_text()).items()))
    spaced.write_text(json.dumps(backwards, indent=7))
    other = write_tokenizer(tmp_path / "other.json", ["<pad>", "</s>"])
    first, second, third = (load_tokenizer(str(p)).fingerprint for p in (path, spaced, other))
    assert first == second != third


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent.json; give `bytes`"):
        load_tokenizer(str(tmp_path / "absent.json"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"broken.json is not a tokenizer.json"):
        load_tokenizer(str(broken))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install jaxlib-methods\[hf\]"):
        HuggingFaceTokenizer("{}", path="t.json")
