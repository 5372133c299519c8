"""JSON lines: one object a line, plain or compressed with gzip."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from flanmoe.core.errors import DataError
from flanmoe.data.sources.base import Locator, Row, as_mapping, is_evaluation_only

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class JsonLines:
    """Rows of a `.jsonl` or `.jsonl.gz` file. Blank lines are passed over."""

    path: Path

    @property
    def evaluation_only(self) -> bool:
        """True where the file or its folder is named like a set for evaluation only."""
        return is_evaluation_only(f"{self.path.parent.name}/{self.path.name}")

    def rows(self) -> Iterator[tuple[Locator, Row]]:
        """Yield the objects of the file, one line in memory at a time.

        Raises:
            DataError: with file and line, if the file cannot be opened, its gzip stream is broken,
                or a line is not UTF-8, not JSON, or no object.
        """
        for number, line in self._lines():
            locator = Locator(str(self.path), number)
            yield locator, _parsed(line, locator)

    def size(self) -> int:
        """Return the number of lines that are not blank."""
        return sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            with _opened(self.path) as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.path}:{number + 1}: the gzip stream is broken ({error}). Copy the file "
                "again, or write it again with gzip."
            ) from error
        except OSError as error:
            raise DataError(
                f"The file {self.path} cannot be read: {error.strerror or error}. Check the path "
                "and its permissions."
            ) from error


def _opened(path: Path) -> BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def _parsed(line: bytes, locator: Locator) -> Row:
    try:
        value: Any = json.loads(line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{locator}: the line must be UTF-8 text, but byte {error.start} of it is not "
            f"({error.reason}). Save the file as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{locator}: the line is not valid JSON ({error.msg}, column {error.colno}). Each "
            "line must hold one JSON object."
        ) from error
    row = as_mapping(value)
    if row is None:
        raise DataError(
            f"{locator}: each line must hold one JSON object, but this one holds a "
            f"{type(value).__name__}."
        )
    return row
