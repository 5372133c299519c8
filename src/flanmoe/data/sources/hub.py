"""Data sets of the Hugging Face hub, by their id."""

# `datasets` ships no types; what it returns is checked row by row in `rows.py`.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from flanmoe.core.errors import DataError
from flanmoe.data.sources.base import Identity, Locator, Row, is_evaluation_only


@dataclass(frozen=True, slots=True)
class HubDataset:
    """Rows of one split of a data set on the hub (or in its local cache, when offline).

    Attributes:
        identifier: `owner/name`.
        split: name of the split, or a slice of it as `datasets` writes them (`train[:1000]`).
        subset: configuration of the data set, where it has several.
    """

    identifier: str
    split: str
    subset: str | None = None

    @property
    def evaluation_only(self) -> bool:
        """True where the id names a set for evaluation only."""
        return is_evaluation_only(self.identifier)

    def rows(self) -> Iterator[tuple[Locator, Row]]:
        """Yield the rows of the split.

        Raises:
            DataError: if the data set cannot be had: offline, unknown, private, or without
                this split.
        """
        for number, row in enumerate(self._loaded(), start=1):
            yield Locator(self._origin, number), dict(row)

    def size(self) -> int:
        """Return the number of rows."""
        return len(self._loaded())

    def identity(self) -> Identity | None:
        """Return what was asked for, and the fingerprint that `datasets` gives to what it loaded.

        Raises:
            DataError: see `rows`.
        """
        loaded = self._loaded()
        if not isinstance(loaded, datasets.Dataset):
            return None
        # `datasets` documents the fingerprint and gives it no other name.
        content = str(loaded._fingerprint)  # pyright: ignore[reportPrivateUsage]
        return Identity(self._origin, ("hub", self.identifier, self.subset, self.split, content))

    @property
    def _origin(self) -> str:
        return f"{self.identifier}/{self.split}"

    def _loaded(self) -> Any:
        return _load(self.identifier, self.split, self.subset)


@cache
def _load(identifier: str, split: str, subset: str | None) -> Any:
    try:
        return datasets.load_dataset(identifier, subset, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"The data set `{identifier}` (split `{split}`) cannot be loaded from the Hugging "
            f"Face hub: {reason}. Check the id, the split and the connection, or put the rows "
            f"into a data folder as {identifier.rpartition('/')[2]}/{split}.jsonl and name that."
        ) from error
