"""Hints about unknown names."""

import pytest

from flanmoe.core.names import listing, nearest_name_hint


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gsm8", " Did you mean `gsm8k`?"),
        ("alpacca", " Did you mean `alpaca`?"),
        ("zzz", ""),
    ],
)
def test_hints_at_a_close_name_only(name: str, hint: str) -> None:
    assert nearest_name_hint(name, ["gsm8k", "alpaca", "flan_cot"]) == hint


def test_no_name_is_close_to_none() -> None:
    assert nearest_name_hint("x", []) == ""


def test_a_listing_is_cut_and_says_so() -> None:
    assert listing(["b", "a"]) == "`b`, `a`"
    assert listing("abcde", limit=5) == "`a`, `b`, `c`, `d`, `e`"
    assert listing("abcdef", limit=4) == "`a`, `b`, `c`, `d` and 2 more"
