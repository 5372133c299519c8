"""The sample: whose tokens, that every token has the same chance, and that parts give the whole."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import RunError
from flanmoe.statistics.logit_sample import (
    Candidates,
    LogitSample,
    drawn,
    joined,
    mixed,
    priorities,
)


def test_bits_are_mixed_as_in_splitmix64() -> None:
    # The first numbers of the published generator with seed 1234567.
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.uint64(1234567) + golden * np.arange(1, 6, dtype=np.uint64)
    assert mixed(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_priorities_stay_the_same() -> None:
    """A file says which tokens it drew only through them."""
    assert priorities(torch.tensor([0, 1, 2**40]), 0).tolist() == [
        2794587916655025534,
        1358905817937652631,
        11511633025612395599,
    ]


def test_different_tokens_have_different_priorities() -> None:
    assert len(set(priorities(torch.arange(100_000), 0).tolist())) == 100_000


def test_every_token_has_the_same_chance() -> None:
    draws = torch.zeros(50)
    for seed in range(2000):
        draws[drawn(torch.arange(50), size=10, seed=seed)] += 1
    # Binomial(2000, 0.2): standard deviation 18.
    assert abs(draws - 400).max() < 4.5 * 18


def test_neighbours_are_drawn_independently() -> None:
    both = sum(
        {0, 1} <= set(drawn(torch.arange(50), size=25, seed=seed).tolist()) for seed in range(2000)
    )
    # 25/50 * 24/49 of 2000, standard deviation 19.
    assert abs(both - 490) < 4.5 * 19


@given(
    count=st.integers(0, 60),
    size=st.integers(1, 20),
    cuts=st.sets(st.integers(0, 60)),
    padding=st.integers(1, 4),
)
def test_batches_give_the_sample_of_the_whole(
    count: int, size: int, cuts: set[int], padding: int
) -> None:
    logits = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    groups = torch.arange(count) % 4
    sample = LogitSample.none(3)
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    for start, stop in pairwise(edges):
        # Between real tokens lie some of padding.
        valid = torch.arange((stop - start) * padding) % padding == 0
        spread = torch.full((len(valid), 3), float("nan"))
        spread[valid] = logits[start:stop]
        of_token = torch.full((len(valid),), 99)
        of_token[valid] = groups[start:stop]
        chosen = Candidates.of(valid, of_token, start=start, sample=sample, size=size, seed=1)
        [sample] = joined([sample], [chosen.sample(spread)], size=size, seed=1)
    order = sorted(range(count), key=priorities(torch.arange(count), 1).tolist().__getitem__)
    expected = sorted(order[:size])
    assert sample.token_numbers.tolist() == expected
    assert sample.groups.tolist() == groups[expected].tolist()
    assert torch.equal(sample.logits, logits[expected])


def test_few_candidates_are_left_late_in_the_data() -> None:
    """A batch copies the logits of tokens that may enter the sample, not of all."""
    numbers = torch.arange(10_000)
    places = drawn(numbers, size=100, seed=0)
    sample = LogitSample(numbers[places], torch.zeros(100, dtype=torch.long), torch.zeros(100, 1))
    valid, groups = torch.ones(1000, dtype=torch.bool), torch.zeros(1000, dtype=torch.long)
    chosen = Candidates.of(valid, groups, start=10_000, sample=sample, size=100, seed=0)
    # Each of the 1000 has a chance of 100 in 10,000.
    assert 1 <= len(chosen.token_numbers) <= 25


def test_a_token_cannot_be_drawn_twice() -> None:
    sample = LogitSample(torch.tensor([3, 5]), torch.zeros(2, dtype=torch.long), torch.zeros(2, 1))
    with pytest.raises(RunError) as raised:
        joined([sample], [sample], size=4, seed=0)
    assert str(raised.value) == (
        "Parts of statistics must come from different tokens of the data, but 2 sampled tokens are in both. "
        "Give each process its own batches with `flanmoe.statistics.share_of_rank`, and add no part twice."
    )
