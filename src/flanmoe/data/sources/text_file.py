"""Plain text: a `.txt` file as one row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flanmoe.core.errors import DataError
from flanmoe.data.sources.base import Locator, Row, is_evaluation_only

TEXT_FIELD = "text"
TEXT_SUFFIX = ".txt"


@dataclass(frozen=True, slots=True)
class TextFile:
    """The whole of a `.txt` file, in the field `text` of its only row."""

    path: Path

    @property
    def evaluation_only(self) -> bool:
        """True where the file or its folder is named like a set for evaluation only."""
        return is_evaluation_only(f"{self.path.parent.name}/{self.path.name}")

    def rows(self) -> Iterator[tuple[Locator, Row]]:
        """Yield the one row.

        Raises:
            DataError: if the file cannot be read, or is not UTF-8.
        """
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"The file {self.path} must be UTF-8 text, but byte {error.start} of it is not "
                f"({error.reason}). Save the file as UTF-8."
            ) from error
        except OSError as error:
            raise DataError(
                f"The file {self.path} cannot be read: {error.strerror or error}. Check the path "
                "and its permissions."
            ) from error
        yield Locator(str(self.path)), {TEXT_FIELD: text}

    def size(self) -> int:
        """Return 1."""
        return 1
