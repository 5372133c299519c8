"""Parquet files, read batch by batch."""

# `pyarrow` ships no types; what it returns is checked row by row in `rows.py`.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet

from flanmoe.core.errors import DataError
from flanmoe.data.sources.base import Identity, Locator, Row, is_evaluation_only

_ROWS_A_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Parquet:
    """Rows of a `.parquet` file."""

    path: Path

    @property
    def evaluation_only(self) -> bool:
        """True where the file or its folder is named like a set for evaluation only."""
        return is_evaluation_only(f"{self.path.parent.name}/{self.path.name}")

    def rows(self) -> Iterator[tuple[Locator, Row]]:
        """Yield the rows as mappings of column names to Python values.

        Raises:
            DataError: if the file cannot be opened or is no whole parquet file.
        """
        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=_ROWS_A_BATCH):
                    for row in batch.to_pylist():
                        number += 1
                        yield Locator(str(self.path), number), row
        except (OSError, arrow.ArrowException) as error:
            raise self._unreadable(error) from error

    def size(self) -> int:
        """Return the number of rows, from the file's metadata."""
        try:
            return int(parquet.read_metadata(self.path).num_rows)
        except (OSError, arrow.ArrowException) as error:
            raise self._unreadable(error) from error

    def identity(self) -> Identity:
        """Return the form of the file and the file."""
        return Identity(str(self.path), ("parquet",), self.path)

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(
            f"The file {self.path} cannot be read as parquet: {error}. Check the path, and that "
            "the file was copied whole."
        )
