"""What every source of rows has in common."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol, cast, runtime_checkable

from flanmoe.core.errors import DataError

EVALUATION_ONLY_REASON = (
    "the authors of BIG-bench ask that its data never appear in a training corpus."
)

# BIG-bench and its selections, by the names that their copies go by; letters and digits only.
_EVALUATION_ONLY_NAMES = frozenset(
    {
        "bbh",
        "bbeh",
        "bigbench",
        "bigbenchextrahard",
        "bigbenchhard",
        "bigbenchlite",
        "bigbenchsmall",
    }
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Locator:
    """Where a row stands, for messages.

    Attributes:
        origin: a file, or the id of a data set.
        number: line or row in it, from 1; None where the whole of it is meant.
    """

    origin: str
    number: int | None = None

    def __str__(self) -> str:
        return self.origin if self.number is None else f"{self.origin}:{self.number}"


@dataclass(frozen=True, slots=True)
class Identity:
    """What the rows of a source depend on; equal identities mean equal rows.

    Attributes:
        origin: what the locators of its rows name.
        content: how the rows are read, and which they are.
        file: the file whose bytes belong to the content; its path does not.
    """

    origin: str
    content: tuple[str | None, ...]
    file: Path | None = None


@runtime_checkable
class Source(Protocol):
    """Rows of one split, read as a stream.

    Attributes:
        evaluation_only: True where the authors ask that nothing is trained on it.
    """

    @property
    def evaluation_only(self) -> bool:
        """Whether the authors ask that nothing is trained on it."""
        ...

    def rows(self) -> Iterator[tuple[Locator, Row]]:
        """Yield every row with the place where it stands.

        Raises:
            DataError: if a row cannot be read; says where.
        """
        ...

    def size(self) -> int:
        """Return the number of rows, reading no more than is needed to count them."""
        ...


@runtime_checkable
class StorableSource(Source, Protocol):
    """A source that may be large, so that its examples are kept on disk (`flanmoe.data.store`)."""

    def identity(self) -> Identity | None:
        """Say what the rows depend on; None where that cannot be said, and nothing is kept."""
        ...


@runtime_checkable
class LenientSource(Source, Protocol):
    """A source of which some rows may be impossible to read, and the others not."""

    def readable_rows(
        self, leave_out: Callable[[Locator, DataError], None]
    ) -> Iterator[tuple[Locator, Row]]:
        """Yield the rows that can be read; `leave_out` is told of each other one, and of a torn end."""
        ...


def as_list(value: Any) -> list[Any] | None:
    """Return a value read from a file if it is a list, else None."""
    return cast("list[Any]", value) if isinstance(value, list) else None


def as_mapping(value: Any) -> dict[str, Any] | None:
    """Return a value read from a file if it is a mapping, else None."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def is_evaluation_only(name: str) -> bool:
    """Say whether a folder, file or data set of this name may only be evaluated on."""
    parts = (part.split(".")[0] for part in PurePath(name).parts)
    return any(_letters(part) in _EVALUATION_ONLY_NAMES for part in parts)


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())
