"""Parquet: rows in order, and one sentence for a broken file."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from flanmoe.core.errors import DataError
from flanmoe.data.sources.base import Locator, Source
from flanmoe.data.sources.parquet import Parquet


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_rows_with_their_numbers(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "label": i % 2} for i in range(3000)]
    source = Parquet(written(tmp_path / "rows.parquet", rows))
    assert isinstance(source, Source)
    assert source.size() == 3000
    found = list(source.rows())
    assert [row for _, row in found] == rows
    assert found[2047][0] == Locator(str(tmp_path / "rows.parquet"), 2048)
    assert not source.evaluation_only


@pytest.mark.parametrize("content", [b"not parquet at all", b"PAR1 cut short"])
def test_a_file_that_is_not_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    for read in (lambda: list(Parquet(path).rows()), Parquet(path).size):
        with pytest.raises(DataError) as caught:
            read()
        text = str(caught.value)
        assert text.startswith(f"The file {path} cannot be read as parquet: ")
        assert text.endswith("Check the path, and that the file was copied whole.")


def test_a_file_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as parquet"):
        Parquet(tmp_path / "absent.parquet").size()
