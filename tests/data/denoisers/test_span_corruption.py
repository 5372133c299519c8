"""Span corruption: nothing is lost, and everything against definitions written out token by token."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.denoisers import Denoised, SpanCorruption
from flanmoe.data.denoisers.span_corruption import SpanCounts, corrupted, random_spans, restored

# As in T5's tokenizer the first sentinel has the highest id; tokens of texts are below.
SENTINELS = tuple(range(999, 799, -1))

_masks = st.lists(st.booleans(), min_size=1, max_size=60)
_corruptions = st.builds(
    SpanCorruption,
    noise_density=st.floats(0.02, 0.6),
    mean_span_length=st.floats(1, 12),
)


def text_of(length: int) -> np.ndarray:
    """A text in which every token stands once."""
    return np.arange(1, length + 1, dtype=np.int64)


def corrupted_written_out(
    tokens: Sequence[int], mask: Sequence[bool], sentinels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token by token: a sentinel for a span's first token on the one side, before it on the other."""
    inputs: list[int] = []
    targets: list[int] = []
    before, used = False, 0
    for token, noise in zip(tokens, mask, strict=True):
        if noise and not before:
            inputs.append(sentinels[used])
            targets.append(sentinels[used])
            used += 1
        (targets if noise else inputs).append(token)
        before = noise
    return inputs, targets


@given(mask=_masks)
def test_any_mask_is_applied_as_written_out(mask: list[bool]) -> None:
    tokens = text_of(len(mask))
    inputs, targets = corrupted(tokens, np.array(mask), SENTINELS)
    expected = corrupted_written_out(tokens.tolist(), mask, SENTINELS)
    assert (inputs.tolist(), targets.tolist()) == expected


def test_the_example_of_the_paper() -> None:
    """Without the last sentinel of its target: see the module."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    mask = np.array([word in ("for", "inviting", "last") for word in words])
    inputs, targets = corrupted(text_of(len(words)), mask, [100, 99])
    said = dict(enumerate(words, start=1)) | {100: "<X>", 99: "<Y>"}
    assert " ".join(said[token] for token in inputs) == "Thank you <X> me to your party <Y> week"
    assert " ".join(said[token] for token in targets) == "<X> for inviting <Y> last"


@given(mask=_masks, values=st.data())
def test_the_text_is_restored(mask: list[bool], values: st.DataObject) -> None:
    """Whatever the tokens are, as long as none is a sentinel."""
    tokens = np.array(
        values.draw(st.lists(st.integers(0, 700), min_size=len(mask), max_size=len(mask)))
    )
    assert restored(corrupted(tokens, np.array(mask), SENTINELS), SENTINELS).tolist() == (
        tokens.tolist()
    )


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [([5, 999], [998, 6]), ([5, 999], [6]), ([5], [999, 6]), ([999, 998], [998, 6, 999, 7])],
)
def test_sides_that_do_not_belong_together_are_refused(
    inputs: list[int], targets: list[int]
) -> None:
    with pytest.raises(ValueError, match="must be those of the input"):
        restored(Denoised(np.array(inputs), np.array(targets)), SENTINELS)


@given(corruption=_corruptions, length=st.integers(2, 500), seed=st.integers(0, 99))
def test_nothing_is_lost_and_the_shares_are_as_asked(
    corruption: SpanCorruption, length: int, seed: int
) -> None:
    counts = corruption.counts(length)
    assume(counts.spans <= len(SENTINELS))
    tokens = text_of(length)
    denoised = corruption(tokens, SENTINELS, np.random.default_rng(seed))
    marks = [[t for t in side.tolist() if t in SENTINELS] for side in denoised]
    kept, noise = ([t for t in side.tolist() if t not in SENTINELS] for side in denoised)
    assert sorted(kept + noise) == tokens.tolist()
    assert kept == sorted(kept)
    assert noise == sorted(noise)
    assert marks[0] == marks[1] == list(SENTINELS[: counts.spans])
    assert (len(kept), len(noise)) == (counts.kept, counts.noise)
    assert abs(len(noise) - length * corruption.noise_density) <= 0.5 or len(noise) == 1
    assert kept[0] == 1
    assert noise[-1] == length
    assert restored(denoised, SENTINELS).tolist() == tokens.tolist()


def test_the_same_seed_leaves_out_the_same_and_another_does_not() -> None:
    tokens = text_of(300)
    first, again, other = (
        SpanCorruption()(tokens, SENTINELS, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.target_ids.tolist() == again.target_ids.tolist()
    assert first.target_ids.tolist() != other.target_ids.tolist()


def spans_of(mask: np.ndarray) -> int:
    return int((np.diff(mask.astype(int), prepend=0) == 1).sum())


def test_all_ways_to_cut_are_equally_likely() -> None:
    """6 kept and 4 left-out tokens in 3 spans: C(5, 2) * C(3, 2) = 30 masks."""
    generator = np.random.default_rng(0)
    draws = 3000
    masks = [random_spans(SpanCounts(kept=6, noise=4, spans=3), generator) for _ in range(draws)]
    assert all(mask.sum() == 4 and len(mask) == 10 and spans_of(mask) == 3 for mask in masks)
    assert all(not mask[0] and mask[-1] for mask in masks)
    found = Counter(tuple(mask.tolist()) for mask in masks)
    number = comb(5, 2) * comb(3, 2)
    assert len(found) == number
    # Chi square with 29 degrees of freedom is below 58 but once in a thousand times.
    expected = draws / number
    assert sum((times - expected) ** 2 / expected for times in found.values()) < 58


def lengths_written_out(input_length: int, density: float, mean: float) -> tuple[int, int]:
    """The largest text whose input is no longer, found by trying; and its target."""
    best = (0, 0)
    for text in range(2, 3 * input_length + 10):
        noise = max(round(text * density), 1)
        spans = max(round(noise / mean), 1)
        if text - noise + spans + 1 <= input_length:
            best = (text, noise + spans + 1)
    return best


@pytest.mark.parametrize("density", [0.15, 0.3])
def test_lengths_are_those_found_by_trying(density: float) -> None:
    corruption = SpanCorruption(noise_density=density)
    for input_length in range(3, 160):
        found = corruption.lengths(input_length)
        assert (found.text, found.targets) == lengths_written_out(input_length, density, 3.0)


def test_the_lengths_that_t5_was_trained_with() -> None:
    assert SpanCorruption().lengths(512) == (568, 512, 114, 28)


@given(corruption=_corruptions, input_length=st.integers(3, 300), seed=st.integers(0, 9))
def test_texts_of_the_length_become_inputs_and_targets_of_theirs(
    corruption: SpanCorruption, input_length: int, seed: int
) -> None:
    try:
        lengths = corruption.lengths(input_length)
    except ConfigError:
        # Only where spans are so many that one more token of text adds two to the input.
        assert corruption.noise_density / corruption.mean_span_length > 0.3
        return
    assume(lengths.sentinels <= len(SENTINELS))
    inputs, targets = corruption(text_of(lengths.text), SENTINELS, np.random.default_rng(seed))
    assert len(inputs) + 1 == lengths.inputs == input_length
    assert len(targets) + 1 == lengths.targets
    assert sum(token in SENTINELS for token in inputs.tolist()) == lengths.sentinels


def test_a_length_that_no_text_gives_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        SpanCorruption(noise_density=0.5, mean_span_length=1).lengths(4)
    assert str(caught.value) == (
        "No text becomes an input of 4 tokens with `noise_density` 0.5 and `mean_span_length` 1.0: 3 tokens "
        "become 3, one more 5. Take one of these lengths."
    )


def test_more_spans_than_sentinels_are_refused() -> None:
    with pytest.raises(DataError, match="but there are 28 spans and 27 sentinels"):
        SpanCorruption()(text_of(568), SENTINELS[:27], np.random.default_rng(0))


def test_a_text_too_short_to_leave_something_out_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, but has 1"):
        SpanCorruption().counts(1)
