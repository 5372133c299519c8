"""Number formats keep their meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.study.number_text import duration, listed, p_text, short, signed, size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.000 k"),
        (127_168, "127.2 k"),
        (999_960, "1.000 M"),
        (134_515_008, "134.5 M"),
        (1.193e14, "119.3 T"),
        (2.5e21, "2500. E"),
    ],
)
def test_short_counts(number: float, text: str) -> None:
    assert short(number) == text


@given(number=st.integers(1000, 10**18))
def test_short_counts_are_right_to_four_digits(number: int) -> None:
    value, suffix = short(number).split(" ")
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}[suffix]
    assert float(value) * factor == pytest.approx(number, rel=5.1e-4)
    assert 1 <= float(value) < 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.44, "8.4 s"),
        (59.94, "59.9 s"),
        (312.2, "5 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7502, "2 h 05 min"),
        (86340, "23 h 59 min"),
        (36 * 3600, "1.5 days"),
        (3 * 365.25 * 86400, "3 years"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_signs() -> None:
    assert size(int(7.42 * 2**30)) == "7.42 GiB"
    assert size(3 * 2**20) == "3.0 MiB"
    assert signed(-0.0213, 3) == "−0.021"
    assert signed(0.0213, 3) == "+0.021"
    assert signed(-0.00001, 3) == "0.000"


def test_lists_of_words() -> None:
    assert [listed([]), listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_of_long_lists_the_first_words_and_how_many_more() -> None:
    words = [str(number) for number in range(1200)]
    assert listed(words, most=2) == "0, 1 and 1,198 more"
    assert listed(words[:2], most=2) == "0 and 1"
    assert listed(words[:3], most=2) == "0, 1 and 1 more"


@pytest.mark.parametrize(
    ("p_value", "text"),
    [(0.0002, "< 0.001"), (0.0009999, "< 0.001"), (0.001, "0.001"), (1.0, "1.000")],
)
def test_p_values(p_value: float, text: str) -> None:
    assert p_text(p_value) == text
