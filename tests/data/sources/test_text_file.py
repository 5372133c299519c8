"""Plain text files: one row, and what cannot be read is said."""

from pathlib import Path

import pytest

from flanmoe.core.errors import DataError
from flanmoe.data.sources.base import Locator, Source
from flanmoe.data.sources.text_file import TextFile


def test_the_whole_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.\n\nTw\xc3\xb6.\n")
    source = TextFile(path)
    assert isinstance(source, Source)
    assert list(source.rows()) == [(Locator(str(path)), {"text": "One.\n\nTwö.\n"})]
    assert source.size() == 1
    assert not source.evaluation_only


def test_files_named_like_sets_for_evaluation_are_marked(tmp_path: Path) -> None:
    assert TextFile(tmp_path / "bbh" / "all.txt").evaluation_only


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt cannot be read: No such file"):
        list(TextFile(tmp_path / "none.txt").rows())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9!")
    with pytest.raises(DataError, match="must be UTF-8 text, but byte 3 of it is not"):
        list(TextFile(tmp_path / "latin.txt").rows())
