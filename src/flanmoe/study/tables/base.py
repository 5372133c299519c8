"""One table of text, and a part of the report that holds some."""

from collections.abc import Callable
from dataclasses import dataclass

from flanmoe.study.arm_report import ArmReport
from flanmoe.study.number_text import size
from flanmoe.study.report_text import peak_memory

# More arms have a row each.
MOST_ARM_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of text.

    Attributes:
        header: one cell a column; the first column names the row.
        rows: as many cells each.
        note: a sentence below it.
        title: a line above it.
        group_ends: first cells of the rows that a line is drawn below.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    title: str = ""
    group_ends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report that can be unfolded."""

    title: str
    tables: tuple[TextTable, ...]
    sentences: tuple[str, ...] = ()


def turned(table: TextTable) -> TextTable:
    """Return a table of a column an arm with a row an arm; what is the same in every arm goes into its note."""
    shared = [f"{name}: {cells[0]}" for name, *cells in table.rows if len(set(cells)) == 1]
    differing = [row for row in table.rows if len(set(row[1:])) > 1]
    note = f"The same in every arm: {'; '.join(shared)}. " if shared else ""
    first = "arm" if table.header[0] else ""
    columns = ((first, *table.header[1:]), *differing)
    header, *rows = zip(*columns, strict=True)
    return TextTable(header, tuple(rows), note=(note + table.note).strip(), title=table.title)


def tuned_only(cell: Callable[[ArmReport], str]) -> Callable[[ArmReport], str]:
    """Say so instead of a zero where an arm was not tuned."""
    return lambda arm: cell(arm) if arm.was_tuned else "not tuned"


def peak_text(arm: ArmReport) -> str:
    """Peak memory of tuning, or that nothing measured it."""
    peak = peak_memory(arm)
    return size(peak) if peak else "not measured"
