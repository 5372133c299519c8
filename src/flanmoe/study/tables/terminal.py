"""A table of text as the terminal shows it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions
from rich.table import Table

from flanmoe.study.tables.base import TextTable

# Cells up to this long stay on one line; longer ones may be wrapped between words.
_WHOLE_CELL = 16
# What a column takes beside its text: a space on both sides and a line; and the line at the left.
_BESIDE_TEXT = 3
_LEFT_LINE = 1


@dataclass(frozen=True, slots=True)
class TerminalTable:
    """A table as wide as the terminal at most: columns that do not fit beside the others stand below them.

    Names are repeated in each part. Columns of words are at the left, those with numbers at the right; lines
    stand after groups.
    """

    text: TextTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Give the parts to a console, which asks for them."""
        for part in _parts(self.text, options.max_width):
            yield _table(part, options.max_width)


def _parts(text: TextTable, width: int) -> list[TextTable]:
    """Cut a table into parts of neighbouring columns that fit into so many characters."""
    names, *columns = _columns(text)
    room = width - _LEFT_LINE - _widest(names) - _BESIDE_TEXT
    blocks: list[list[Sequence[str]]] = []
    left = 0
    for column in columns:
        needed = _narrowest(column) + _BESIDE_TEXT
        if needed > left:
            blocks.append([])
            left = room
        blocks[-1].append(column)
        left -= needed
    parts = [_of_columns(text, [names, *block]) for block in blocks or [[]]]
    return [
        replace(
            part,
            title=text.title if part is parts[0] else "",
            note=text.note if part is parts[-1] else "",
        )
        for part in parts
    ]


def _columns(text: TextTable) -> list[tuple[str, ...]]:
    return list(zip(text.header, *text.rows, strict=True))


def _of_columns(text: TextTable, columns: Sequence[Sequence[str]]) -> TextTable:
    header, *rows = zip(*columns, strict=True)
    return replace(text, header=header, rows=tuple(rows))


def _narrowest(column: Sequence[str]) -> int:
    header, *cells = column
    whole = [cell for cell in cells if len(cell) <= _WHOLE_CELL]
    wrapped = [header, *(cell for cell in cells if len(cell) > _WHOLE_CELL)]
    return _widest([*whole, *(word for cell in wrapped for word in cell.split())])


def _widest(cells: Sequence[str]) -> int:
    return max((len(line) for cell in cells for line in cell.splitlines()), default=1)


def _is_words(column: Sequence[str]) -> bool:
    return not any(character.isdigit() for cell in column[1:] for character in cell[:2])


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Share out room: to each column what it must have, then what lets it stay on one line, from the left."""
    widths = [_narrowest(column) for column in columns]
    spare = max(room - sum(widths), 0)
    for number, column in enumerate(columns):
        more = min(spare, _widest(column) - widths[number])
        widths[number] += more
        spare -= more
    return widths


def _table(text: TextTable, width: int) -> Table:
    names, *columns = _columns(text)
    room = width - _LEFT_LINE - _widest(names) - _BESIDE_TEXT * (len(columns) + 1)
    widths = [_widest(names), *_widths(columns, room)]
    table = Table(
        title=text.title or None,
        caption=text.note or None,
        caption_justify="left",
        title_justify="left",
    )
    for column, own_width in zip([names, *columns], widths, strict=True):
        table.add_column(
            column[0],
            justify="left" if column is names or _is_words(column) else "right",
            overflow="fold",
            no_wrap=column is names,
            width=own_width,
        )
    for row in text.rows:
        table.add_row(*row, end_section=row[0] in text.group_ends)
    return table
