"""Documents to one stream of tokens, in memory or memory-mapped from a cache."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxlib_methods.train import corpus
from jaxlib_methods.train.corpus import Document, OnDamaged, Split
from jaxlib_methods.train.tokenizer import Tokenizer

LAYOUT = 1  # of a cache folder; a change that leaves older ones of no use raises it
BATCH_DOCUMENTS = 64
# What of the tokens is compared whenever a cache is opened: at most 16 MiB, whatever their size.
CHECKED_BLOCKS, BLOCK_BYTES = 256, 1 << 16
ABANDONED_AFTER = 24 * 60 * 60  # seconds without a change in a folder that is being written


class TokenStream(NamedTuple):
    """Documents one after another, each with the separator in front, and one at the very end.

    tokens: `[N]` in the smallest unsigned type that holds the vocabulary.
    starts: int64 `[D]`, where each document's separator stands.
    num_bytes: UTF-8 bytes of the text.
    fingerprint: hash of tokenizer and tokens.
    """

    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int
    fingerprint: str

    @property
    def num_targets(self) -> int:
        """Tokens to predict: all of them but the first separator."""
        return len(self.tokens) - 1


def open_stream(
    source: str,
    tokenizer: Tokenizer,
    *,
    split: Split | None,
    format: str = "auto",
    text_field: str = "text",
    validation_fraction: float = 0.05,
    cache: str | None = None,
    on_damaged: OnDamaged = "stop",
) -> TokenStream:
    """The token stream of one side of a source's split, or of all of it (`split=None`)."""
    files = corpus.find_files(source, format=format)
    label = f"the {split} part of {source}" if split else source

    def documents() -> Iterator[Document]:
        found = corpus.read_documents(
            files, text_field=text_field, skip_binary=source == "stdlib", on_damaged=on_damaged
        )
        if split is None:
            return found
        return corpus.split_documents(found, split=split, validation_fraction=validation_fraction)

    if cache is None:
        memory = io.BytesIO()
        starts, num_bytes, fingerprint = write_stream(documents(), tokenizer, memory, label=label)
        tokens = np.frombuffer(memory.getbuffer(), token_dtype(tokenizer))
        return TokenStream(tokens, starts, num_bytes, fingerprint)
    key = (LAYOUT, split, text_field, validation_fraction, tokenizer.fingerprint,
           tokenizer.separator, [_identity(file) for file in files])  # fmt: skip
    key = key if on_damaged == "stop" else (*key, on_damaged)
    root = _cache_root(cache)
    _remove_abandoned(root)
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if folder.exists():
        try:
            return _read_folder(folder, tokenizer)
        except (OSError, ValueError) as error:
            print(
                f"the token cache {folder} is damaged or of an earlier version and is written "
                f"again: {error}",
                file=sys.stderr,
                flush=True,
            )
            _remove_folder(folder)
    _write_folder(folder, documents(), tokenizer, label)
    return _read_folder(folder, tokenizer)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def write_stream(
    documents: Iterator[Document], tokenizer: Tokenizer, file: BinaryIO, *, label: str
) -> tuple[np.ndarray, int, str]:
    """Writes the stream's tokens; returns starts, UTF-8 bytes of the text and fingerprint.

    label: what the documents are, for messages.
    """
    dtype = token_dtype(tokenizer)
    separator = np.array([tokenizer.separator], dtype).tobytes()
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    starts, position, num_bytes = [], 0, 0
    while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
        for document, ids in zip(
            batch, tokenizer.encode_batch([d.text for d in batch]), strict=True
        ):
            raw = separator + ids.astype(dtype).tobytes()
            file.write(raw)
            digest.update(raw)
            starts.append(position)
            position += 1 + len(ids)
            num_bytes += len(document.text.encode())
    if not starts:
        raise ValueError(f"{label} holds no documents; give other files as data.source")
    file.write(separator)
    return np.array(starts, np.int64), num_bytes, digest.hexdigest()[:32]


def _identity(file: corpus.SourceFile) -> tuple[str, str, int, int]:
    try:
        size, mtime = corpus.size_and_mtime(file)
    except OSError:  # reading it says what is wrong
        size, mtime = -1, 0
    return str(file.path), file.format, size, mtime


def _cache_root(cache: str) -> pathlib.Path:
    if "://" in cache:
        raise ValueError(f"data.cache={cache} must be a local folder: it is memory-mapped")
    root = pathlib.Path(cache).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache={cache} cannot be made: {error}; give another") from error
    return root


def _beside(folder: pathlib.Path) -> pathlib.Path:
    """A new name, under which nobody reads."""
    return folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_abandoned(root: pathlib.Path) -> None:
    """Removes what killed writers had begun.

    By age: the cache may be shared by hosts, of whose processes a number says nothing here.
    """
    for folder in root.iterdir():
        if not re.fullmatch(r"\.[0-9a-f]{32}-\d+-[0-9a-f]{8}", folder.name):
            continue
        with contextlib.suppress(OSError):  # another process was first
            changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - changed > ABANDONED_AFTER:
                shutil.rmtree(folder)


def _remove_folder(folder: pathlib.Path) -> None:
    """Removes a folder at once for all that look for it."""
    aside = _beside(folder)
    with contextlib.suppress(FileNotFoundError):  # another process was first
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _write_folder(
    folder: pathlib.Path, documents: Iterator[Document], tokenizer: Tokenizer, label: str
) -> None:
    """Writes beside `folder` and renames, so that a folder is whole or absent."""
    temporary = _beside(folder)
    temporary.mkdir()
    try:
        with (temporary / "tokens.bin").open("wb") as file:
            starts, num_bytes, fingerprint = write_stream(documents, tokenizer, file, label=label)
        np.save(temporary / "starts.npy", starts)
        info = {"num_bytes": num_bytes, "fingerprint": fingerprint, "source": label}
        info |= {"contents": _contents(temporary, token_dtype(tokenizer))}
        (temporary / "info.json").write_text(json.dumps(info))
        for path in temporary.iterdir():
            _sync(path)
        _sync_folder(temporary)
        temporary.rename(folder)
        _sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # A rename that fails because another process was first leaves its folder, the same.
        if not (isinstance(error, OSError) and folder.exists()):
            raise


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # some file systems have it for files alone
        _sync(folder)


def _contents(folder: pathlib.Path, dtype: np.dtype) -> dict[str, int | str]:
    """What is compared of a folder's files: all of starts, and blocks spread over the tokens."""
    size = (folder / "tokens.bin").stat().st_size
    last = max(size - BLOCK_BYTES, 0)
    blocks = hashlib.sha256()
    with (folder / "tokens.bin").open("rb") as file:
        for begin in sorted({last * i // (CHECKED_BLOCKS - 1) for i in range(CHECKED_BLOCKS)}):
            file.seek(begin)
            blocks.update(file.read(BLOCK_BYTES))
    with (folder / "starts.npy").open("rb") as file:
        starts = hashlib.file_digest(file, "sha256")
    return {
        "num_tokens": size // dtype.itemsize,
        "tokens_bytes": size,
        "tokens_blocks": blocks.hexdigest(),
        "starts_bytes": (folder / "starts.npy").stat().st_size,
        "starts": starts.hexdigest(),
    }


def _read_folder(folder: pathlib.Path, tokenizer: Tokenizer) -> TokenStream:
    """Raises OSError or ValueError where a folder is not as it was written."""
    info = json.loads((folder / "info.json").read_text())
    if not isinstance(info, dict) or not isinstance(written := info.get("contents"), dict):
        raise ValueError("info.json does not say what is in its files")
    found = _contents(folder, token_dtype(tokenizer))
    if differing := [name for name in found if found[name] != written.get(name)]:
        raise ValueError(f"its files have other {', '.join(differing)} than when it was written")
    tokens = np.memmap(folder / "tokens.bin", token_dtype(tokenizer), mode="r")
    starts = np.load(folder / "starts.npy", mmap_mode="r")
    return TokenStream(tokens, starts, info["num_bytes"], info["fingerprint"])
