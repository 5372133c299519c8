"""Parts of the data, read apart, give the statistics of the whole."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flanmoe.core.errors import RunError
from flanmoe.statistics import (
    ExpertStatistics,
    StatisticsBatch,
    StatisticsParts,
    collect,
    share_of_rank,
)
from flanmoe.statistics.batches import numbered

from .rows import GROUPS, batches_of, decoder, encoder_decoder, rows
from .test_collect import assert_alike

PARTS = StatisticsParts(logit_sample=7)


def collected(
    name: str, batches: list[StatisticsBatch], *, parts: StatisticsParts = PARTS, data: str = "data"
) -> ExpertStatistics:
    model = decoder() if name == "decoder" else encoder_decoder("top_k")
    return collect(model, batches, groups=GROUPS, data_hash=data, parts=parts)


@cache
def by_row(name: str) -> tuple[ExpertStatistics, list[ExpertStatistics]]:
    """The statistics of eight rows, together and one by one."""
    model = decoder() if name == "decoder" else encoder_decoder("top_k")
    batches = batches_of(model, rows(8), 1)
    return collected(name, batches), [collected(name, [one]) for one in numbered(batches)]


@pytest.mark.parametrize("name", ["decoder", "encoder-decoder"])
@given(data=st.data())
@settings(max_examples=5)
def test_any_split_merges_to_the_whole(name: str, data: st.DataObject) -> None:
    whole, parts = by_row(name)
    order = data.draw(st.permutations(range(8)))
    cuts = data.draw(st.sets(st.integers(1, 7), max_size=3))
    edges = [0, *sorted(cuts), 8]
    shares = [
        ExpertStatistics.merged(parts[place] for place in order[start:stop])
        for start, stop in pairwise(edges)
    ]
    assert_alike(ExpertStatistics.merged(shares), whole)


def test_three_ranks_merge_to_the_whole() -> None:
    model = decoder()
    batches = batches_of(model, rows(8), 2)
    whole = collected("decoder", batches)
    shares = [collected("decoder", list(share_of_rank(batches, rank, 3))) for rank in range(3)]
    assert [share.tokens["decoder"] for share in shares] == [14 + 14, 15, 11]
    assert_alike(shares[2] + shares[0] + shares[1], whole)


def test_a_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="A rank must be from 0 to 2, but is 3"):
        list(share_of_rank([], 3, 3))


def test_ranks_that_did_not_number_their_tokens_are_noticed() -> None:
    batches = batches_of(decoder(), rows(8), 2)
    first, second = collected("decoder", batches[:2]), collected("decoder", batches[2:])
    with pytest.raises(RunError, match="must come from different tokens of the data"):
        first + second


def test_a_part_cannot_be_added_twice() -> None:
    whole, _ = by_row("decoder")
    with pytest.raises(RunError, match="7 sampled tokens are in both"):
        whole + whole


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(RunError, match="needs at least 1 part, but there are 0"):
        ExpertStatistics.merged([])


def test_statistics_of_another_kind_are_refused_by_name() -> None:
    whole, _ = by_row("decoder")
    batches = batches_of(decoder(), rows(2), 2)
    other = collected(
        "decoder", batches, parts=StatisticsParts(logit_sample=0, outputs=False), data="other"
    )
    with pytest.raises(RunError) as raised:
        whole + other
    assert str(raised.value) == (
        "Statistics that are added must agree, but differ in data_hash (expected data, found other); "
        "parts.outputs (expected True, found False); parts.logit_sample (expected 7, found 0). Collect them "
        "alike."
    )


def test_statistics_of_another_model_are_refused_by_name() -> None:
    whole, _ = by_row("decoder")
    other = collect(
        decoder("mixtral", seed=1),
        batches_of(decoder(), rows(2), 2),
        groups=GROUPS,
        data_hash="data",
        parts=PARTS,
    )
    with pytest.raises(RunError) as raised:
        whole + other
    assert str(raised.value) == (
        f"Statistics that are added must agree, but differ in model_hash (expected {whole.model_hash}, found "
        f"{other.model_hash}). Collect them alike."
    )


def test_numbers_of_batches_go_on_after_a_given_one() -> None:
    batch = batches_of(decoder(), rows(2), 2)[0]
    given_start = StatisticsBatch(batch.inputs, batch.valid, batch.groups, {"decoder": 100})
    found = [one.starts for one in numbered([batch, batch, given_start, batch])]
    assert found == [{"decoder": 0}, {"decoder": 14}, {"decoder": 100}, {"decoder": 114}]


def test_sampled_tokens_of_a_side_are_held_once() -> None:
    whole, _ = by_row("encoder-decoder")
    for side in ("encoder", "decoder"):
        samples = [layer.logit_sample for layer in whole.layers if layer.side == side]
        assert len({sample.token_numbers.data_ptr() for sample in samples}) == 1
    assert torch.equal(samples[0].token_numbers.sort().values, samples[0].token_numbers)
