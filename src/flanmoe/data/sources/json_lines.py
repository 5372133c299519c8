"""JSON lines: one object a line, plain or compressed with gzip."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from flanmoe.core.errors import DataError
from flanmoe.data.sources.base import Identity, Locator, Row, as_mapping, is_evaluation_only

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
        return self.readable_rows(_stop)

    def readable_rows(
        self, leave_out: Callable[[Locator, DataError], None]
    ) -> Iterator[tuple[Locator, Row]]:
        """Yield the objects of the file; `leave_out` is told of each line that holds none.

        What stands behind a broken place of a gzip stream cannot be read: it counts as one line.

        Raises:
            DataError: if the file cannot be opened.
        """
        lines = self._lines()
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except _TornStreamError as error:
                leave_out(error.locator, error)
                return
            locator = Locator(str(self.path), number)
            try:
                row = _parsed(line, locator)
            except DataError as error:
                leave_out(locator, error)
            else:
                yield locator, row

    def size(self) -> int:
        """Return the number of lines that are not blank."""
        return sum(1 for _ in self._lines())

    def identity(self) -> Identity:
        """Return the form of the file and the file."""
        return Identity(str(self.path), ("json lines", self.path.suffix), self.path)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            with _opened(self.path) as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _TornStreamError(Locator(str(self.path), number + 1), error) from error
        except OSError as error:
            raise DataError(
                f"The file {self.path} cannot be read: {error.strerror or error}. Check the path "
                "and its permissions."
            ) from error


class _TornStreamError(DataError):
    """A gzip stream that ends, or is damaged, in the middle."""

    def __init__(self, locator: Locator, error: Exception) -> None:
        super().__init__(
            f"{locator}: the gzip stream is broken ({error}). Copy the file again, or write it again "
            "with gzip."
        )
        self.locator = locator


def _stop(_locator: Locator, error: DataError) -> None:
    raise error


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
