"""Answer options as a block of text, in one of many styles, and the answer that goes with it.

Where a style gives each option a name of its own (a letter, a number), the answer is that name; where
all options look alike (dashes), it is the option's text. So does FLAN 2022 (arXiv 2301.13688).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from flanmoe.core.seeds import SeedTree
from flanmoe.data.options import MAXIMUM_OPTIONS, letter

StyleName = Literal["letters", "random"]

_HEADINGS = (
    "Options:",
    "Choices:",
    "Possible answers:",
    "The answer is one of these:",
    "Pick one:",
    "Choose from:",
    "Candidates:",
    "Select the right one:",
    "Available answers:",
    "Your choices are",
    "OPTIONS",
    "",
)
_ENDS = ("", "", ";", ".")
_ROMAN = ((10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))


@dataclass(frozen=True, slots=True)
class _Marker:
    """What stands before an option.

    Attributes:
        write: the marker of the option with this number, from 0.
        names: whether it tells options apart.
        limit: how many options it can mark; None for any number.
    """

    write: Callable[[int], str]
    names: bool = True
    limit: int | None = None


def _roman(index: int) -> str:
    number, text = index + 1, ""
    for value, digits in _ROMAN:
        count, number = divmod(number, value)
        text += digits * count
    return text


def _in(before: str, name: Callable[[int], str], after: str, limit: int | None = None) -> _Marker:
    return _Marker(lambda index: f"{before}{name(index)}{after}", limit=limit)


def _number(index: int) -> str:
    return str(index + 1)


def _small(index: int) -> str:
    return letter(index).lower()


_FRAMES = (("(", ")"), ("", ")"), ("", "."), ("[", "]"), ("", ":"), ("<", ">"), ("", " -"))
_MARKERS = (
    *(_in(before, letter, after, MAXIMUM_OPTIONS) for before, after in _FRAMES),
    *(_in(before, _small, after, MAXIMUM_OPTIONS) for before, after in _FRAMES),
    *(_in(before, _number, after) for before, after in _FRAMES),
    *(_in(before, _roman, after) for before, after in _FRAMES),
    *(_Marker(lambda _, mark=mark: mark, names=False) for mark in ("-", "*", "+", "•", ">", "")),
)


@dataclass(frozen=True, slots=True)
class OptionBlock:
    """Options as they are shown.

    Attributes:
        text: the block, heading first.
        answers: what is said for each option, in order.
    """

    text: str
    answers: tuple[str, ...]


def option_block(choices: Sequence[str], style: StyleName, seeds: SeedTree) -> OptionBlock:
    """Write options in a style.

    Args:
        choices: the options in order, at least one.
        style: `letters` for "(A) ..." below "Options:", as the renderer `direct` writes them; `random` for a
            drawn heading, marker and end.
        seeds: what the style is drawn from.
    """
    if style == "letters":
        return _block(choices, "Options:", _in("(", letter, ")"), "")
    draw = seeds.python()
    fitting = [
        marker for marker in _MARKERS if marker.limit is None or len(choices) <= marker.limit
    ]
    return _block(choices, draw.choice(_HEADINGS), draw.choice(fitting), draw.choice(_ENDS))


def _block(choices: Sequence[str], heading: str, marker: _Marker, end: str) -> OptionBlock:
    lines = [f"{marker.write(index)} {choice}{end}".strip() for index, choice in enumerate(choices)]
    if not marker.names:
        return OptionBlock("\n".join([heading, *lines]).strip(), tuple(choices))
    return OptionBlock(
        "\n".join([heading, *lines]).strip(),
        tuple(_bare(marker.write(index)) for index in range(len(choices))),
    )


def _bare(marker: str) -> str:
    """The marker as one says it: "B." and "B)" are "B", "(B)" stays."""
    return marker if marker[0] in "([<" else marker.rstrip(" .):-")
