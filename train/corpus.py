"""Files to documents: text, JSONL, Parquet and ArrayRecord, local or in a bucket."""

import functools
import hashlib
import itertools
import json
import os
import posixpath
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from etils import epath

Format = Literal["text", "jsonl", "parquet", "arrayrecord"]
Split = Literal["train", "validation"]
OnDamaged = Literal["stop", "skip"]

FORMAT_OF_ENDING: dict[str, Format] = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
# Tests, generated tables and whatever is not the library itself.
STDLIB_EXCLUDED = frozenset(
    (
        *("__pycache__", "dist-packages", "encodings", "idle_test", "lib2to3", "pydoc_data"),
        *("site-packages", "test", "tests", "turtledemo"),
    )
)
# A corpus of fewer documents is split exactly: neither side stays empty.
SMALL_CORPUS_DOCUMENTS = 256


class DamagedFileError(ValueError):
    """A file of a corpus that cannot be read, or not to its end."""


class SourceFile(NamedTuple):
    """A file of a source; `relative` is its path below the source, the same on every machine.

    fault: of a folder whose files cannot be found, which stands for them, why not.
    """

    path: epath.Path
    relative: str
    format: Format
    fault: str = ""


class Document(NamedTuple):
    """A text; `name` says where it stands, `key` decides on which side of the split it goes."""

    name: str
    key: str
    text: str


def find_files(source: str, *, format: str = "auto") -> list[SourceFile]:
    """The files of a source (`stdlib`, a file, a folder or a glob), sorted by relative path.

    With `format="auto"` a folder or glob gives the files with a known ending, and a single file
    of another ending is text; with another format they give all files. A folder that cannot be
    listed is among them, with its fault.
    """
    if source == "stdlib":
        return _find_stdlib()
    path = epath.Path(source).expanduser()
    unlisted: list[SourceFile] = []
    if is_glob := _is_glob(source) and not path.exists():
        found = _glob(path, unlisted)
    elif path.is_dir():
        found = [(path / relative, relative) for relative in _walk(path, unlisted)]
    elif path.exists():
        found = [(path, path.name)]
    else:
        raise FileNotFoundError(
            f"{source} does not exist; a data source is stdlib, a file, a folder or a glob"
        )
    searched = is_glob or path.is_dir()
    files = [
        SourceFile(file, relative, _format_of(file, format, default=None if searched else "text"))
        for file, relative in found
        if format != "auto" or not searched or file.suffix in FORMAT_OF_ENDING
    ]
    files += unlisted
    if not files:
        raise FileNotFoundError(
            f"{source} has no files ending in {' '.join(FORMAT_OF_ENDING)}; "
            "for other endings set data.format"
        )
    return sorted(files, key=lambda file: file.relative)


def _format_of(path: epath.Path, format: str, *, default: Format | None) -> Format:
    if format != "auto":
        return format  # pyright: ignore[reportReturnType]  (checked by DataConfig)
    return FORMAT_OF_ENDING.get(path.suffix, default)  # pyright: ignore[reportReturnType]


def _find_stdlib() -> list[SourceFile]:
    root = epath.Path(sysconfig.get_path("stdlib"))
    unlisted: list[SourceFile] = []
    files = [
        SourceFile(root / relative, relative, "text")
        for relative in _walk(root, unlisted, excluded=STDLIB_EXCLUDED)
        # _sysconfigdata describes the machine that Python was built on.
        if relative.endswith(".py") and not relative.startswith("_sysconfigdata")
    ]
    return sorted(files + unlisted, key=lambda file: file.relative)


def _walk(
    root: epath.Path, unlisted: list[SourceFile], *, excluded: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Paths below `root`, relative to it; hidden files and `excluded` folders are left out.

    Folders that cannot be listed are added to `unlisted`.
    """
    top = _without_scheme(root)

    def on_error(error: OSError) -> None:
        # Not every file system says which folder it was.
        folder = epath.Path(error.filename or root)
        relative = posixpath.relpath(_without_scheme(folder), top)
        unlisted.append(SourceFile(root / relative, relative, "text", _one_line(error)))

    for folder, folders, names in root.walk(on_error=on_error):
        folders[:] = [name for name in folders if name not in excluded and name[0] != "."]
        # In a bucket epath's walk gives folders without their scheme.
        inside = posixpath.relpath(_without_scheme(folder), top)
        for name in names:
            if not name.startswith("."):
                yield posixpath.normpath(posixpath.join(inside, name))


def _without_scheme(path: epath.Path) -> str:
    return str(path).split("://")[-1].strip("/") or "."


def _glob(pattern: epath.Path, unlisted: list[SourceFile]) -> list[tuple[epath.Path, str]]:
    """Files and their paths below the pattern's fixed part; see `_walk`."""
    if "**" in pattern.parts:
        raise ValueError(f"{pattern} has `**`; give the folder, which is searched to the bottom")
    fixed = list(itertools.takewhile(lambda part: not _is_glob(part), pattern.parts))
    root, parts = epath.Path(*fixed), pattern.parts[len(fixed) :]
    inside = (root.glob("/".join(parts[:number])) for number in range(1, len(parts)))
    for folder in itertools.chain([root], *inside):
        try:  # glob itself is silent of a folder that cannot be listed
            if folder.is_dir():
                next(folder.iterdir(), None)
        except OSError as error:
            relative = str(folder.relative_to(root))
            unlisted.append(SourceFile(folder, relative, "text", _one_line(error)))
    matches = root.glob("/".join(parts))
    return [(path, str(path.relative_to(root))) for path in matches if not path.is_dir()]


def _is_glob(text: str) -> bool:
    return any(char in text for char in "*?[")


def size_and_mtime(file: SourceFile) -> tuple[int, int]:
    """Bytes, and when they were changed: in ns, in a bucket in s or nothing."""
    if "://" in str(file.path):
        found = file.path.stat()
        return int(found.length), int(found.mtime or 0)
    local = os.stat(file.path)  # epath gives whole seconds, and fails for an owner without a name
    return local.st_size, local.st_mtime_ns


def read_documents(
    files: list[SourceFile],
    *,
    text_field: str = "text",
    skip_binary: bool = False,
    on_damaged: OnDamaged = "stop",
) -> Iterator[Document]:
    """The documents of files, in order; empty ones are left out.

    A text file is one document; a row of the other formats is one. `skip_binary` passes over text
    files that are not UTF-8. on_damaged: of a file that cannot be read, `skip` keeps the documents
    before the fault, leaves out the rest, and names and counts such files on stderr. A folder that
    cannot be listed counts as one.
    Raises DamagedFileError for them otherwise, ValueError where files are whole and hold no text.
    """
    damaged = 0
    for file in files:
        try:
            yield from _read_file(file, text_field, skip_binary, may_be_empty=len(files) > 1)
        except DamagedFileError as error:
            if on_damaged == "stop":
                raise
            damaged += 1
            _say(f"{error}; the rest of the file is left out")
    if damaged:
        _say(f"{damaged} of {len(files)} files of the corpus are damaged")


def _read_file(
    file: SourceFile, text_field: str, skip_binary: bool, *, may_be_empty: bool
) -> Iterator[Document]:
    if file.fault:
        raise DamagedFileError(f"{file.path} cannot be read: {file.fault}")
    try:
        if not may_be_empty and size_and_mtime(file)[0] == 0:
            raise ValueError(f"{file.path} is empty")
        for document in _READERS[file.format](file, text_field):
            fault = _fault(document.text)
            if fault and not skip_binary:
                raise DamagedFileError(f"{document.name} is not UTF-8 text: {fault}")
            if not fault and document.text:
                yield document
    except (OSError, UnicodeError) as error:  # of a file system, or from inside a reader
        raise DamagedFileError(f"{file.path} cannot be read: {_one_line(error)}") from error


@functools.cache
def _say(text: str) -> None:
    """Once: the parts of a split read the same files."""
    print(text, file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fault(text: str) -> str | None:
    """What is wrong with a text; bytes that are not UTF-8 were read as lone surrogates."""
    if "\0" in text:
        return f"character {text.index(chr(0))} is NUL"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} cannot be decoded"
    return None


def _read_text(file: SourceFile, text_field: str) -> Iterator[Document]:
    del text_field
    text = file.path.read_bytes().decode(errors="surrogateescape")
    yield Document(str(file.path), file.relative, text)


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document]:
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name = f"{file.path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # the latter of deep nesting
                raise DamagedFileError(f"{name} is not JSON: {error}") from error
            text = row.get(text_field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                kind = f"fields {sorted(row)[:8]}" if isinstance(row, dict) else type(row).__name__
                raise ValueError(
                    f"{name} has no text in field {text_field!r} ({kind}); set data.text_field"
                )
            yield Document(name, text, text)


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"{file.path} needs the package pyarrow: pip install jaxlib-methods[parquet]"
        ) from error
    with file.path.open("rb") as raw:
        try:
            table = pyarrow.parquet.ParquetFile(raw)
            if text_field not in table.schema_arrow.names:
                raise ValueError(
                    f"{file.path} has no column {text_field!r} but "
                    f"{table.schema_arrow.names[:8]}; set data.text_field"
                )
            number = 0
            for rows in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in rows.column(0).to_pylist():
                    number += 1
                    name = f"{file.path}:{number}"
                    if not isinstance(text, str):
                        raise ValueError(
                            f"{name} has {type(text).__name__} in column {text_field!r}, not text"
                        )
                    yield Document(name, text, text)
        except pyarrow.ArrowException as error:
            raise DamagedFileError(
                f"{file.path} is not a whole Parquet file: {_one_line(error)}"
            ) from error


def _read_arrayrecord(file: SourceFile, text_field: str) -> Iterator[Document]:
    import grain

    try:
        records: Any = grain.sources.ArrayRecordDataSource([str(file.path)])
        for number in range(len(records)):
            text = _record_text(records[number], text_field)
            yield Document(f"{file.path}:{number + 1}", text, text)
    except RuntimeError as error:
        raise DamagedFileError(
            f"{file.path} is not a whole ArrayRecord file: {_one_line(error)}"
        ) from error


def _record_text(record: bytes, text_field: str) -> str:
    """A record is a JSON object with `text_field`, or else UTF-8 text itself."""
    text = record.decode(errors="surrogateescape")
    if text.startswith("{"):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(row, dict) and isinstance(row.get(text_field), str):
            return row[text_field]
    return text


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrayrecord": _read_arrayrecord,
}


def split_documents(
    documents: Iterator[Document], *, split: Split, validation_fraction: float
) -> Iterator[Document]:
    """One side of the split: a document goes by the hash of its key, whatever the others are.

    In a small corpus neither side stays empty: the document nearest to the border moves over, and
    a single document is cut at a line break.
    """
    first = list(itertools.islice(documents, SMALL_CORPUS_DOCUMENTS))
    wanted = split == "validation"
    if len(first) == 1:
        yield _cut(first[0], split=split, validation_fraction=validation_fraction)
    elif len(first) < SMALL_CORPUS_DOCUMENTS:
        shares = sorted({_share(document.key) for document in first})
        border = sum(share < validation_fraction for share in shares)
        if len(shares) > 1:
            border = min(max(border, 1), len(shares) - 1)
        validation = set(shares[:border])
        yield from (d for d in first if (_share(d.key) in validation) == wanted)
    else:
        for document in itertools.chain(first, documents):
            if (_share(document.key) < validation_fraction) == wanted:
                yield document


@functools.lru_cache(maxsize=SMALL_CORPUS_DOCUMENTS)
def _share(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    raw = key.encode(errors="surrogateescape")  # a file's name may be other than UTF-8
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _cut(document: Document, *, split: Split, validation_fraction: float) -> Document:
    text = document.text
    border = round(len(text) * (1 - validation_fraction))
    border = text.rfind("\n", 0, border) + 1 or border
    if not 0 < border < len(text):
        raise ValueError(
            f"{document.name} has {len(text)} characters, too few for a validation part of "
            f"{validation_fraction}; give data.validation_source"
        )
    return document._replace(text=text[:border] if split == "train" else text[border:])
