"""JSON lines: streamed, and every fault named with file and line."""

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core.errors import DataError
from flanmoe.data.sources.base import Locator, Source
from flanmoe.data.sources.json_lines import JsonLines

Write = Callable[..., Path]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_with_their_lines(tmp_path: Path, write_rows: Write, name: str) -> None:
    source = JsonLines(write_rows(tmp_path / name, [{"a": 1}, {"b": "ü"}]))
    assert isinstance(source, Source)
    assert list(source.rows()) == [
        (Locator(str(tmp_path / name), 1), {"a": 1}),
        (Locator(str(tmp_path / name), 2), {"b": "ü"}),
    ]
    assert source.size() == 2


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert [(place.number, row) for place, row in JsonLines(path).rows()] == [
        (1, {"a": 1}),
        (4, {"a": 2}),
    ]
    assert JsonLines(path).size() == 2


def test_rows_come_before_the_file_has_been_read_through(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nbroken\n')
    rows = JsonLines(path).rows()
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(DataError):
        next(rows)


def fault(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(JsonLines(path).rows())
    return str(caught.value).replace(str(path.parent), "FOLDER")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"a": 1}\n{"a": \n',
            "FOLDER/rows.jsonl:2: the line is not valid JSON (Expecting value, column 1). Each line "
            "must hold one JSON object.",
        ),
        (
            b"[1, 2]\n",
            "FOLDER/rows.jsonl:1: each line must hold one JSON object, but this one holds a list.",
        ),
        (
            b'{"a": 1}\n\n{"a": "\xff"}\n',
            "FOLDER/rows.jsonl:3: the line must be UTF-8 text, but byte 7 of it is not (invalid start "
            "byte). Save the file as UTF-8.",
        ),
    ],
)
def test_lines_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert fault(path) == message


def _compressed(number: int) -> bytearray:
    lines = [json.dumps({"a": str(random.Random(i).random())}) + "\n" for i in range(number)]
    return bytearray(gzip.compress("".join(lines).encode()))


@pytest.mark.parametrize("number", [3, 20_000])
def test_a_gzip_stream_that_ends_early_says_how_far_it_could_be_read(
    tmp_path: Path, number: int
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = _compressed(number)
    path.write_bytes(whole[: len(whole) // 2])
    text = fault(path)
    assert text.endswith(
        ": the gzip stream is broken (Compressed file ended before the end-of-stream marker was "
        "reached). Copy the file again, or write it again with gzip."
    )
    line = int(text.split(":")[1])
    assert number / 4 < line < number


def test_a_gzip_stream_whose_checksum_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = _compressed(3)
    whole[-6] ^= 0xFF
    path.write_bytes(whole)
    assert fault(path).startswith("FOLDER/rows.jsonl.gz:4: the gzip stream is broken (CRC check")


def test_a_file_that_is_no_gzip(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b'{"a": 1}\n')
    assert fault(path).startswith("FOLDER/rows.jsonl.gz:1: the gzip stream is broken (Not a gzip")


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    assert fault(folder) == (
        "The file FOLDER/rows.jsonl cannot be read: Is a directory. Check the path and its permissions."
    )
    assert "No such file or directory" in fault(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("path", "only"),
    [
        ("data/bbh/test.jsonl", True),
        ("data/BIG-Bench_Hard/test.jsonl", True),
        ("data/bigbench_small/test.jsonl.gz", True),
        ("data/gsm8k/bbh.jsonl.gz", True),
        ("data/gsm8k/train.jsonl", False),
        ("home/bbh/data/gsm8k/train.jsonl", False),
        ("data/bbh_like_but_mine/train.jsonl", False),
    ],
)
def test_which_files_are_for_evaluation_only(path: str, only: bool) -> None:
    assert JsonLines(Path(path)).evaluation_only is only


def test_a_locator_reads_as_editors_want_it() -> None:
    assert str(Locator("a/b.jsonl", 3)) == "a/b.jsonl:3"
    assert str(Locator("a/b.jsonl")) == "a/b.jsonl"


def test_large_files_do_not_enter_memory(tmp_path: Path, write_rows: Write) -> None:
    rows: list[Any] = [{"a": "x" * 1000}] * 5000
    source = JsonLines(write_rows(tmp_path / "rows.jsonl.gz", rows))
    tracemalloc.start()
    assert sum(1 for _ in source.rows()) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
