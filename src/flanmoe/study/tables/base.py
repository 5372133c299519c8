"""One table of text, and a part of the report that holds some."""

from collections.abc import Callable
from dataclasses import dataclass

from flanmoe.study.arm_report import ArmReport
from flanmoe.study.report_text import (
    peak_memory,
    size,
)


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


def tuned_only(cell: Callable[[ArmReport], str]) -> Callable[[ArmReport], str]:
    """Say so instead of a zero where an arm was not tuned."""
    return lambda arm: cell(arm) if arm.was_tuned else "not tuned"


def peak_text(arm: ArmReport) -> str:
    """Peak memory of tuning, or that nothing measured it."""
    peak = peak_memory(arm)
    return size(peak) if peak else "not measured"
