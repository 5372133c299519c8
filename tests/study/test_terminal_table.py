"""A table for the terminal is never wider than it, and says all that its text says."""

import os
import string

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flanmoe.study.tables.base import TextTable
from flanmoe.study.tables.terminal import TerminalTable

_WORDS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=14)
_CELLS = st.lists(_WORDS, min_size=1, max_size=5).map(" ".join)


def _shown(text: TextTable, width: int) -> list[str]:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(TerminalTable(text))
        return console.export_text().splitlines()


@st.composite
def _tables(draw: st.DrawFn) -> TextTable:
    num_columns = draw(st.integers(1, 9))
    row = st.tuples(_WORDS, *(_CELLS for _ in range(num_columns)))
    header, *rows = draw(st.lists(row, min_size=2, max_size=5))
    return TextTable(header, tuple(rows))


@given(_tables(), st.integers(40, 140))
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(
    text: TextTable, width: int
) -> None:
    lines = _shown(text, width)
    assert max(len(line) for line in lines) <= width
    words = "\n".join(lines).replace("┃", " ").replace("│", " ").split()
    for cells in (text.header, *text.rows):
        for cell in cells:
            assert set(cell.split()) <= set(words)


def test_what_does_not_fit_stands_below_with_its_names_again() -> None:
    text = TextTable(
        ("arm", "tokens to train on", "memory", "what it is"),
        (("together", "3,072", "", ""), ("dense", "1,024", "952.7 MiB", "as it is")),
        note="A note.",
        title="A title",
        group_ends=("together",),
    )
    assert [line.rstrip() for line in _shown(text, 30)] == [
        "A title",
        "┏━━━━━━━━━━┳━━━━━━━━━━━━━━━━━┓",
        "┃          ┃ tokens to train ┃",
        "┃ arm      ┃              on ┃",
        "┡━━━━━━━━━━╇━━━━━━━━━━━━━━━━━┩",
        "│ together │           3,072 │",
        "├──────────┼─────────────────┤",
        "│ dense    │           1,024 │",
        "└──────────┴─────────────────┘",
        "┏━━━━━━━━━━┳━━━━━━━━━━━┓",
        "┃ arm      ┃    memory ┃",
        "┡━━━━━━━━━━╇━━━━━━━━━━━┩",
        "│ together │           │",
        "├──────────┼───────────┤",
        "│ dense    │ 952.7 MiB │",
        "└──────────┴───────────┘",
        "┏━━━━━━━━━━┳━━━━━━━━━━━━┓",
        "┃ arm      ┃ what it is ┃",
        "┡━━━━━━━━━━╇━━━━━━━━━━━━┩",
        "│ together │            │",
        "├──────────┼────────────┤",
        "│ dense    │ as it is   │",
        "└──────────┴────────────┘",
        "A note.",
    ]


def test_as_much_as_fits_stays_side_by_side() -> None:
    text = TextTable(("arm", "tokens", "memory"), (("dense", "1,024", "952.7 MiB"),))
    side_by_side = _shown(text, 34)
    assert len(side_by_side) == 5
    assert len(_shown(text, 30)) == 5
    assert len(_shown(text, 29)) == 10
