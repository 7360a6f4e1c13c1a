"""Documents to one stream of tokens, in memory or memory-mapped from a cache."""

import hashlib
import io
import itertools
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxlib_methods.train import corpus
from jaxlib_methods.train.corpus import Document, OnDamaged, Split
from jaxlib_methods.train.tokenizer import Tokenizer

LAYOUT = 1  # of a cache folder; a change of what is written there raises it
BATCH_DOCUMENTS = 64


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
    folder = _cache_root(cache) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if not folder.exists():
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
    stat = file.path.stat()
    # epath gives whole seconds, and nothing for some buckets.
    local = pathlib.Path(file.path)
    mtime = local.stat().st_mtime_ns if local.exists() else int(stat.mtime or 0)
    return str(file.path), file.format, int(stat.length), mtime


def _cache_root(cache: str) -> pathlib.Path:
    if "://" in cache:
        raise ValueError(f"data.cache={cache} must be a local folder: it is memory-mapped")
    root = pathlib.Path(cache).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    return root


def _write_folder(
    folder: pathlib.Path, documents: Iterator[Document], tokenizer: Tokenizer, label: str
) -> None:
    """Writes beside `folder` and renames, so that a folder is whole or absent."""
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        with (temporary / "tokens.bin").open("wb") as file:
            starts, num_bytes, fingerprint = write_stream(documents, tokenizer, file, label=label)
        np.save(temporary / "starts.npy", starts)
        info = {"num_bytes": num_bytes, "fingerprint": fingerprint, "source": label}
        (temporary / "info.json").write_text(json.dumps(info))
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary)
        # A rename that fails because another process was first leaves its folder, the same.
        if not (isinstance(error, OSError) and folder.exists()):
            raise


def _read_folder(folder: pathlib.Path, tokenizer: Tokenizer) -> TokenStream:
    info = json.loads((folder / "info.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", token_dtype(tokenizer), mode="r")
    starts = np.load(folder / "starts.npy", mmap_mode="r")
    return TokenStream(tokens, starts, info["num_bytes"], info["fingerprint"])
