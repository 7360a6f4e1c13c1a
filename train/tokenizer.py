"""Text to token ids and back: bytes, or a Hugging Face `tokenizer.json`."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from jaxlib_methods.thought_prompts import SPECIALS

# Names under which published tokenizers keep the token that ends a document, best first.
END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "<|begin_of_text|>",
)


class Tokenizer(Protocol):
    """Text to ids and back.

    vocab_size: ids are below it.
    separator: the id in front of every document; as a target it is a document's end.
    fingerprint: equal for two tokenizers only if they give the same ids.
    special: ids of the tokens of `thought_prompts.SPECIALS` that it has.
    """

    vocab_size: int
    separator: int
    fingerprint: str
    special: Mapping[str, int]

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 `[n]`, without separator."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; separators are left out."""
        ...

    def spelling(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of every id, uint8 `[V, W]`, and how many they are, int32 `[V]`."""
        ...


class ByteTokenizer:
    """UTF-8 bytes. The separator is NUL, which no text holds."""

    vocab_size = 256
    separator = 0
    fingerprint = "bytes"
    # Control characters, which no text holds.
    special: Mapping[str, int] = dict(zip(SPECIALS, range(1, 5), strict=True))

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, int32 `[n]`."""
        raw = text.encode()
        if b"\0" in raw:
            raise ValueError(
                f"a text of {len(raw)} bytes has NUL at byte {raw.index(0)}: it is binary, and the "
                "byte tokenizer keeps NUL as its separator"
            )
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of bytes; what is not UTF-8 (a cut character) becomes U+FFFD.

        Ids from 256 on, which a model of a larger vocabulary may draw, are left out.
        """
        raw = np.asarray(ids, np.int64)
        return (
            raw[(raw != self.separator) & (raw < self.vocab_size)]
            .astype(np.uint8)
            .tobytes()
            .decode(errors="replace")
        )

    def spelling(self) -> tuple[np.ndarray, np.ndarray]:
        """Every id is its own byte."""
        return np.arange(256, dtype=np.uint8)[:, None], np.ones(256, np.int32)


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Names of special tokens inside a text are encoded as ordinary text."""

    def __init__(self, definition: str, *, path: str, separator_id: int | None = None) -> None:
        """definition: the content of `tokenizer.json`; path: for messages."""
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"data.tokenizer={path} needs the package tokenizers: "
                "pip install jaxlib-methods[hf]"
            ) from error
        try:
            parsed = json.loads(definition)
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        # A file may ask for truncation or padding, which would drop or invent text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.special: Mapping[str, int] = {name: ids[name] for name in SPECIALS if name in ids}
        self.separator = _separator(parsed, path) if separator_id is None else separator_id
        if not 0 <= self.separator < self.vocab_size:
            raise ValueError(
                f"data.separator_id={self.separator} must be between 0 and {self.vocab_size - 1}, "
                f"the last id of {path}"
            )
        canonical = json.dumps(parsed, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 `[n]`, without special tokens."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, without separators and other special tokens."""
        kept = [int(token) for token in ids if int(token) != self.separator]
        return self._tokenizer.decode(kept, skip_special_tokens=True)

    def spelling(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of every id: of its characters where it is byte-level, else of its text.

        Special tokens have none, other added tokens are their text.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        spelled = {
            id_: _spell(name)
            for name, id_ in self._tokenizer.get_vocab(with_added_tokens=False).items()
        }
        spelled |= {
            id_: b"" if token.special else token.content.encode() for id_, token in added.items()
        }
        lengths = np.zeros(self.vocab_size, np.int32)
        table = np.zeros((self.vocab_size, max(map(len, spelled.values()))), np.uint8)
        for id_, text in spelled.items():
            lengths[id_] = len(text)
            table[id_, : len(text)] = np.frombuffer(text, np.uint8)
        return table, lengths


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_characters()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _spell(name: str) -> bytes:
    """The bytes of a token: byte-level, or of sentences' pieces, where U+2581 is a space."""
    if found := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(found[1], 16)])
    if "\u2581" not in name and all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    return name.replace("\u2581", " ").encode()


def _separator(definition: dict[str, Any], path: str) -> int:
    added = {token["content"]: token["id"] for token in definition.get("added_tokens", [])}
    for name in END_OF_TEXT:
        if name in added:
            return int(added[name])
    raise ValueError(
        f"{path} has no end-of-text token among its added tokens {sorted(added)[:8]}; "
        "give its id as data.separator_id"
    )


def load_tokenizer(name: str, *, separator_id: int | None = None) -> Tokenizer:
    """The tokenizer called `name`: `bytes`, a `tokenizer.json`, or a folder that holds one."""
    if name == "bytes":
        if separator_id not in (None, ByteTokenizer.separator):
            raise ValueError(
                f"data.separator_id={separator_id} is for a tokenizer.json; "
                "the byte tokenizer's separator is 0"
            )
        return ByteTokenizer()
    path = epath.Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"data.tokenizer={name}: there is no {path}; give `bytes`, a tokenizer.json or a "
            "folder that holds one"
        )
    return HuggingFaceTokenizer(path.read_text(), path=str(path), separator_id=separator_id)
