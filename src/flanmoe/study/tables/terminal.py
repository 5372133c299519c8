"""A table of text as the terminal shows it."""

from rich.table import Table

from flanmoe.study.tables.base import TextTable


def terminal_table(text: TextTable) -> Table:
    """Return a table for the terminal: names at the left, all else at the right, lines after groups."""
    table = Table(
        title=text.title or None,
        caption=text.note or None,
        caption_justify="left",
        title_justify="left",
    )
    for number, name in enumerate(text.header):
        is_name = number == 0
        justify = "left" if is_name else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=is_name)
    for row in text.rows:
        table.add_row(*row, end_section=row[0] in text.group_ends)
    return table
