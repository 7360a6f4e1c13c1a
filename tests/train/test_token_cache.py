import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxlib_methods.train import token_cache
from jaxlib_methods.train.corpus import DamagedFileError, Split
from jaxlib_methods.train.token_cache import TokenStream, open_stream
from jaxlib_methods.train.tokenizer import ByteTokenizer


class CountingTokenizer(ByteTokenizer):
    """Counts the documents it encodes."""

    documents = 0

    def encode(self, text: str) -> np.ndarray:
        self.documents += 1
        return super().encode(text)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in {"a.txt": "ab", "b.txt": "é", "c.txt": "xyz"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def assert_stream(stream: TokenStream) -> None:
    assert bytes(stream.tokens) == b"\0ab\0\xc3\xa9\0xyz\0"
    assert stream.tokens.dtype == np.uint8
    assert stream.starts.tolist() == [0, 3, 6]
    assert stream.num_bytes == 7
    assert stream.num_targets == 10


def test_stream_by_hand(corpus: Path) -> None:
    assert_stream(open_stream(str(corpus), ByteTokenizer(), split=None))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "u1"), (257, "u2"), (65537, "u4")])
def test_tokens_take_the_smallest_type(corpus: Path, vocab_size: int, dtype: str) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    stream = open_stream(str(corpus), tokenizer, split=None)
    assert stream.tokens.dtype == np.dtype(dtype)
    assert stream.tokens[:4].tolist() == [0, 97, 98, 0]


def test_cache_is_read_again(corpus: Path, tmp_path: Path) -> None:
    tokenizer, cache = CountingTokenizer(), str(tmp_path / "cache")
    memory = open_stream(str(corpus), tokenizer, split=None)
    tokenizer.documents = 0
    for _ in range(2):
        stream = open_stream(str(corpus), tokenizer, split=None, cache=cache)
        assert_stream(stream)
        assert isinstance(stream.tokens, np.memmap)
        assert stream.fingerprint == memory.fingerprint
        assert tokenizer.documents == 3


def test_cache_is_made_anew_when_anything_differs(corpus: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")

    def fingerprint(split: Split | None = None) -> str:
        return open_stream(str(corpus), ByteTokenizer(), split=split, cache=cache).fingerprint

    first = fingerprint()
    assert fingerprint(split="train") != fingerprint(split="validation")
    assert fingerprint() == first
    before = os.stat(corpus / "b.txt")
    (corpus / "b.txt").write_text("ab")  # of the same size
    os.utime(corpus / "b.txt", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert fingerprint() != first
    other = ByteTokenizer()
    other.fingerprint = "other"
    changed = open_stream(str(corpus), other, split=None, cache=cache).fingerprint
    assert changed not in (first, fingerprint())


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def strip_contents(path: Path) -> None:  # as earlier versions wrote it
    info = json.loads(path.read_text())
    path.write_text(json.dumps({name: info[name] for name in ("num_bytes", "fingerprint")}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(
            ("tokens.bin", "starts.npy", "info.json"), (halve, zero, empty, Path.unlink)
        ),
        ("info.json", strip_contents),
    ],
)
def test_a_damaged_cache_is_written_again(
    corpus: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    tokenizer, cache = CountingTokenizer(), str(tmp_path / "cache")
    open_stream(str(corpus), tokenizer, split=None, cache=cache)
    (folder,) = (tmp_path / "cache").iterdir()
    damage(folder / name)
    for _ in range(2):
        assert_stream(open_stream(str(corpus), tokenizer, split=None, cache=cache))
        assert tokenizer.documents == 6
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"the token cache {folder} is damaged or of an earlier version and is ")
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_blocks_of_a_large_cache_are_compared(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "CHECKED_BLOCKS", 3)
    monkeypatch.setattr(token_cache, "BLOCK_BYTES", 1)
    tokenizer, cache = CountingTokenizer(), str(tmp_path / "cache")
    open_stream(str(corpus), tokenizer, split=None, cache=cache)
    (folder,) = (tmp_path / "cache").iterdir()
    raw = (folder / "tokens.bin").read_bytes()
    for place, is_seen in enumerate([True, False, False, False, False, True, *[False] * 4, True]):
        (folder / "tokens.bin").write_bytes(raw[:place] + b"?" + raw[place + 1 :])
        tokenizer.documents = 0
        open_stream(str(corpus), tokenizer, split=None, cache=cache)
        assert tokenizer.documents == 3 * is_seen


def test_a_cache_is_on_the_disk_before_it_has_its_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    synced: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda file: synced.append((os.fstat(file).st_ino, not list(cache.glob("[!.]*")))),
    )
    open_stream(str(corpus), ByteTokenizer(), split=None, cache=str(cache))
    (folder,) = cache.iterdir()
    *files, inside, outside = synced
    assert sorted(files) == sorted((path.stat().st_ino, True) for path in folder.iterdir())
    assert inside == (folder.stat().st_ino, True)
    assert outside == (cache.stat().st_ino, False)


def test_killed_writer_leaves_nothing_that_is_read(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = """
        import os, signal, sys
        from jaxlib_methods.train.token_cache import open_stream
        from jaxlib_methods.train.tokenizer import ByteTokenizer

        class Killed(ByteTokenizer):
            def encode(self, text):
                if text == "xyz":
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().encode(text)

        open_stream(sys.argv[1], Killed(), split=None, cache=sys.argv[2])
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(corpus), str(cache)], check=False
    )
    assert killed.returncode < 0
    assert [path.name[0] for path in cache.iterdir()] == ["."]  # what it had begun
    for _ in range(2):
        assert_stream(open_stream(str(corpus), ByteTokenizer(), split=None, cache=str(cache)))


def test_what_a_killed_writer_began_is_removed_after_a_day(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    names = [f".{'0' * 32}-1-{i:08x}" for i in range(2)]
    for name in (*names, ".other"):
        (cache / name).mkdir(parents=True)
        (cache / name / "tokens.bin").touch()
    long_ago = time.time() - token_cache.ABANDONED_AFTER - 1
    for path in (*cache.iterdir(), cache / names[0] / "tokens.bin"):
        os.utime(path, (long_ago, long_ago))
    for _ in range(2):
        open_stream(str(corpus), ByteTokenizer(), split=None, cache=str(cache))
        assert {path.name for path in cache.glob(".*")} == {names[1], ".other"}


def test_slower_of_two_writers_takes_the_other_ones_folder(corpus: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")

    class Overtaken(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            if text == "xyz":
                open_stream(str(corpus), ByteTokenizer(), split=None, cache=cache)
            return super().encode(text)

    assert_stream(open_stream(str(corpus), Overtaken(), split=None, cache=cache))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_failed_writer_cleans_up_and_its_error_is_shown(corpus: Path, tmp_path: Path) -> None:
    (corpus / "d.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"d.txt is not UTF-8"):
        open_stream(str(corpus), ByteTokenizer(), split=None, cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("target", ["absent.txt", "link.txt"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_link_to_nowhere_is_a_damaged_file(
    corpus: Path, tmp_path: Path, target: str, cached: bool
) -> None:
    (corpus / "link.txt").symlink_to(target)
    cache = str(tmp_path / "cache") if cached else None
    assert_stream(
        open_stream(str(corpus), ByteTokenizer(), split=None, cache=cache, on_damaged="skip")
    )
    for source in (corpus, corpus / "l*.txt"):
        with pytest.raises(DamagedFileError, match=r"link.txt cannot be read"):
            open_stream(str(source), ByteTokenizer(), split=None, cache=cache)


def test_no_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"the train part of .*a.jsonl holds no documents"):
        open_stream(str(tmp_path / "a.jsonl"), ByteTokenizer(), split="train")


def test_cache_in_a_bucket_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data.cache=gs://b/c must be a local folder"):
        open_stream(str(corpus), ByteTokenizer(), split=None, cache="gs://b/c")


def test_a_cache_that_cannot_be_made_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data.cache=.*/file/a cannot be made: .*; give another"):
        open_stream(str(corpus), ByteTokenizer(), split=None, cache=str(tmp_path / "file" / "a"))


def test_fingerprint_depends_on_the_text_not_on_its_place(corpus: Path, tmp_path: Path) -> None:
    first = open_stream(str(corpus), ByteTokenizer(), split=None).fingerprint
    corpus.rename(tmp_path / "moved")
    assert open_stream(str(tmp_path / "moved"), ByteTokenizer(), split=None).fingerprint == first
    (tmp_path / "moved" / "a.txt").write_text("ba")
    assert open_stream(str(tmp_path / "moved"), ByteTokenizer(), split=None).fingerprint != first


def test_large_corpora_are_encoded_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(str(i))
    whole = open_stream(str(tmp_path), ByteTokenizer(), split=None)
    monkeypatch.setattr(token_cache, "BATCH_DOCUMENTS", 2)
    parts = open_stream(str(tmp_path), ByteTokenizer(), split=None)
    assert bytes(parts.tokens) == bytes(whole.tokens) == b"\x000\x001\x002\x003\x004\0"
    assert parts.starts.tolist() == [0, 2, 4, 6, 8]
