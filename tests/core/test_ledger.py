"""Costs add up, whatever the order; peaks do not."""

import math

from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.ledger import Ledger

_COUNTS = ("sequences", "real_tokens", "padding_tokens", "loss_tokens", "steps")
_count = st.integers(0, 2**50)
# Whole numbers, so that floating-point sums are exact and order cannot matter.
_amount = st.integers(0, 2**40).map(float)
_ledgers = st.builds(
    Ledger,
    **dict.fromkeys(_COUNTS, _count),
    flops=_amount,
    seconds=_amount,
    peak_memory_bytes=_count,
)


@given(parts=st.lists(_ledgers, min_size=1, max_size=5))
def test_a_sum_holds_every_total_and_the_largest_peak(parts: list[Ledger]) -> None:
    total = sum(parts, Ledger())
    for field in Ledger.model_fields:
        values = [getattr(part, field) for part in parts]
        expected = max(values) if field == "peak_memory_bytes" else math.fsum(values)
        assert getattr(total, field) == expected


@given(one=_ledgers, other=_ledgers, third=_ledgers)
def test_order_and_grouping_do_not_matter(one: Ledger, other: Ledger, third: Ledger) -> None:
    assert one + other == other + one
    assert (one + other) + third == one + (other + third)


@given(ledger=_ledgers)
def test_padding_share_is_over_all_tokens(ledger: Ledger) -> None:
    assert ledger.tokens == ledger.real_tokens + ledger.padding_tokens
    assert ledger.padding_share * ledger.tokens == ledger.padding_tokens or math.isclose(
        ledger.padding_share * ledger.tokens, ledger.padding_tokens, rel_tol=1e-12
    )


def test_nothing_has_no_padding() -> None:
    assert Ledger().padding_share == 0.0
    assert Ledger(real_tokens=3, padding_tokens=1).padding_share == 0.25
