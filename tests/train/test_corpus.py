import functools
import json
import os
import pwd
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.implementations.memory import MemoryFileSystem

from jaxlib_methods.train.corpus import (
    DamagedFileError,
    Document,
    find_files,
    read_documents,
    split_documents,
)

TEXTS = ["first\nline", "naïve 日本 🙂", '{"not": "a row"}']


def write_text(folder: Path) -> Path:
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


def write_jsonl(folder: Path) -> Path:
    lines = [json.dumps({"n": 1, "text": text}) for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join([*lines[:2], "", lines[2]]) + "\n")
    return folder / "a.jsonl"


def write_parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"n": [1, 2, 3], "text": TEXTS})
    pyarrow.parquet.write_table(rows, folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def write_arrayrecord(folder: Path, records: list[bytes] | None = None) -> Path:
    writer = ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
    for record in records or [text.encode() for text in TEXTS]:
        writer.write(record)
    writer.close()
    return folder / "a.arrayrecord"


def write_arrayrecord_of_rows(folder: Path) -> Path:
    return write_arrayrecord(folder, [json.dumps({"text": text}).encode() for text in TEXTS])


def read(source: object, **options: str) -> list[Document]:
    return list(read_documents(find_files(str(source), **options)))


@pytest.mark.parametrize(
    "write", [write_text, write_jsonl, write_parquet, write_arrayrecord, write_arrayrecord_of_rows]
)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    assert [document.text for document in read(write(tmp_path))] == TEXTS


def test_a_record_of_deep_braces_is_text(tmp_path: Path) -> None:
    deep = '{"text":' * 100_000
    (document,) = read(write_arrayrecord(tmp_path, [deep.encode()]))
    assert document.text == deep


def test_folders_and_globs_are_searched(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/2.md", "b/1.txt", "a.py", "notes.rst", ".hidden/3.txt", ".4.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()

    assert [d.text for d in read(tmp_path)] == ["a.py", "b/1.txt", "b/2.md"]
    assert [d.key for d in read(tmp_path)] == ["a.py", "b/1.txt", "b/2.md"]
    assert [d.text for d in read(tmp_path / "*" / "*.txt")] == ["b/1.txt"]
    with pytest.raises(ValueError, match=r"has `\*\*`; give the folder"):
        read(tmp_path / "**" / "*.md")
    assert [d.text for d in read(tmp_path / "notes.rst")] == ["notes.rst"]
    assert "notes.rst" in [d.text for d in read(tmp_path, format="text")]


def test_stdlib_is_sorted_source_without_tests() -> None:
    files = find_files("stdlib")
    names = [file.relative for file in files]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idle_test", "lib2to3", "__pycache__"}
    assert not [name for name in names if name.startswith("_sysconfigdata")]


def test_binary_files_are_skipped_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"ok")
    (tmp_path / "b.py").write_bytes(b"caf\xe9")
    (tmp_path / "c.py").write_bytes(b"a\0b")
    files = find_files(str(tmp_path))
    assert [d.text for d in read_documents(files, skip_binary=True)] == ["ok"]
    with pytest.raises(ValueError, match=r"b.py is not UTF-8 text: character 3 cannot be decoded"):
        list(read_documents(files))
    with pytest.raises(ValueError, match=r"c.py is not UTF-8 text: character 1 is NUL"):
        list(read_documents(files[2:]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\nnope\n', r"a.jsonl:3 is not JSON: Expecting value"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1 is not JSON: maximum recursion depth"),
        ("a.jsonl", b"PAR1\xff\xfe\n", r"a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1 has no text in field 'text' \(fields \['body'"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1 has no text in field 'text'.*data.text_field"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1 has no text in field 'text' \(list\)"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1 is not UTF-8 text: character 0"),
        ("a.parquet", b"no parquet file at all", r"a.parquet is not a whole Parquet file"),
        (
            "a.arrayrecord",
            b"no record file at all",
            r"a.arrayrecord is not a whole ArrayRecord file",
        ),
        ("a.txt", b"", r"a.txt is empty"),
    ],
)
def test_wrong_content_is_named_by_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_damaged_files_are_skipped_from_the_fault_on_and_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n{"text": "thi')
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text("whole")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "e.arrayrecord").write_bytes(b"nothing of the kind")
    files = find_files(str(tmp_path))
    for _ in range(2):  # both sides of a split read the files
        texts = [d.text for d in read_documents(files, on_damaged="skip")]
        assert texts == ["first", "second", "whole"]
    *named, count = capfd.readouterr().err.splitlines()
    assert [Path(line.split()[0]).name for line in named] == [
        "a.jsonl:3", "b.txt", "d.parquet", "e.arrayrecord",
    ]  # fmt: skip
    assert all(line.endswith("; the rest of the file is left out") for line in named)
    assert count == "4 of 5 files of the corpus are damaged"
    with pytest.raises(DamagedFileError, match=r"a.jsonl:3 is not JSON"):
        list(read_documents(files))


@pytest.mark.parametrize("pattern", ["", "*/*.txt"])
def test_a_folder_that_cannot_be_listed_is_damaged(
    tmp_path: Path,
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)

    def refuse(call: Callable[..., Any], path: Any = ".") -> Any:  # root may list any folder
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return call(path)

    for call in (os.scandir, os.listdir):
        monkeypatch.setattr(os, call.__name__, functools.partial(refuse, call))
    files = find_files(str(tmp_path / pattern))
    with pytest.raises(DamagedFileError, match=r"/shut cannot be read: .*Permission denied"):
        list(read_documents(files))
    assert [d.text for d in read_documents(files, on_damaged="skip")] == ["open"]
    assert capfd.readouterr().err.startswith(f"{tmp_path}/shut cannot be read")


def test_the_owner_of_a_file_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert [d.text for d in read(write_text(tmp_path) / "0.txt")] == TEXTS[:1]


def test_a_wrong_field_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"set data.text_field") as error:
        list(read_documents(find_files(str(tmp_path)), on_damaged="skip"))
    assert not isinstance(error.value, DamagedFileError)


def test_wrong_parquet_columns_are_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(ValueError, match=r"a.parquet has no column 'text' but \['body'\]"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(ValueError, match=r"a.parquet:2 has NoneType in column 'text', not text"):
        read(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.txt does not exist; a data source is"):
        find_files(str(tmp_path / "absent.txt"))
    for pattern in ("", "*.txt"):
        with pytest.raises(FileNotFoundError, match=r"has no files ending in \.txt \.md"):
            find_files(str(tmp_path / pattern))


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=re.escape("pip install jaxlib-methods[parquet]")):
        read(path)


def named(count: int) -> list[Document]:
    return [Document(f"d{i}", f"d{i}", f"text {i}") for i in range(count)]


def sides(documents: list[Document], fraction: float) -> tuple[set[str], set[str]]:
    train, validation = (
        [
            document.name
            for document in split_documents(
                iter(documents), split=split, validation_fraction=fraction
            )
        ]
        for split in ("train", "validation")
    )
    assert sorted(train + validation) == sorted(document.name for document in documents)
    return set(train), set(validation)


def test_split_goes_by_the_key_alone() -> None:
    documents = named(1000)
    train, validation = sides(documents, 0.1)
    assert 70 < len(validation) < 130  # 100 expected, standard deviation 9.5
    assert not train & validation
    # Another neighbourhood, below the size where the split is exact: the same sides.
    some_train, some_validation = sides(documents[100:300], 0.1)
    assert some_train <= train
    assert some_validation <= validation
    # A larger fraction only adds.
    assert validation < sides(documents, 0.3)[1]


@pytest.mark.parametrize("fraction", [1e-6, 0.5, 1 - 1e-6])
def test_neither_side_of_a_small_corpus_is_empty(fraction: float) -> None:
    train, validation = sides(named(2), fraction)
    assert len(train) == len(validation) == 1
    train, validation = sides(named(9), fraction)
    assert train
    assert validation


def test_files_whose_names_are_not_utf8_are_split(tmp_path: Path) -> None:
    for i in range(2):
        Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9%d.txt" % i)).write_text(f"text {i}")
    train, validation = sides(read(tmp_path), 0.5)
    assert len(train) == len(validation) == 1


def test_equal_rows_stay_on_one_side() -> None:
    rows = [Document(f"f:{i}", key, key) for i, key in enumerate(["x", "y"] * 5)]
    train, _ = sides(rows, 0.5)
    assert train in ({f"f:{i}" for i in range(0, 10, 2)}, {f"f:{i}" for i in range(1, 10, 2)})


def test_a_single_document_is_cut_at_a_line_break() -> None:
    def parts(text: str) -> list[str]:
        one = Document("d", "d", text)
        return [
            document.text
            for split in ("train", "validation")
            for document in split_documents(iter([one]), split=split, validation_fraction=0.25)
        ]

    # Character 9 of 12 is in the third line; the cut is in front of it.
    assert parts("abc\ndef\nghi\n") == ["abc\ndef\n", "ghi\n"]
    assert parts("abcdefgh") == ["abcdef", "gh"]
    with pytest.raises(ValueError, match=r"d has 1 characters, too few .*validation_source"):
        parts("a")


class Bucket(MemoryFileSystem):
    """Stands for a bucket behind s3:// paths."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("s3://").strip("/")


def test_files_in_a_bucket_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = vars(sys.modules["fsspec.registry"])["_registry"]
    monkeypatch.setitem(registry, "s3", Bucket)
    bucket = fsspec.filesystem("s3")
    bucket.pipe("s3://bucket/corpus/.hidden/x.txt", b"hidden")
    for path in (*write_text(tmp_path).iterdir(), write_jsonl(tmp_path), write_parquet(tmp_path)):
        bucket.pipe(f"s3://bucket/corpus/{path.name}", path.read_bytes())
    names = ["0.txt", "1.txt", "2.txt", "a.jsonl", "a.parquet"]
    assert [file.relative for file in find_files("s3://bucket/corpus")] == names
    assert [file.relative for file in find_files("s3://bucket/corpus/*.txt")] == names[:3]
    assert [document.text for document in read("s3://bucket/corpus")] == TEXTS * 3
    assert read("s3://bucket/corpus/a.jsonl")[0].name == "s3://bucket/corpus/a.jsonl:1"
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/absent does not exist"):
        find_files("s3://bucket/absent")
