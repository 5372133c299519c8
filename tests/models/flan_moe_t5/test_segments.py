"""Masks and shifts of packed batches against loops over places."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.models.flan_moe_t5.segments import own_segment, shifted_right

SEGMENTS = st.lists(st.integers(0, 3), min_size=1, max_size=9).map(sorted)


@given(SEGMENTS, SEGMENTS, st.booleans())
def test_a_query_sees_its_own_segment(queries: list[int], keys: list[int], causal: bool) -> None:
    keys = queries if causal else keys
    found = own_segment(torch.tensor([queries]), torch.tensor([keys]), causal=causal)[0, 0]
    for row, query in enumerate(queries):
        for column, key in enumerate(keys):
            sees = query == key or (query == 0 and 0 not in keys)
            if causal:
                sees = sees and column <= row
            assert bool(found[row, column]) == sees


@given(SEGMENTS, st.data())
def test_every_example_is_shifted_by_itself(segments: list[int], data: st.DataObject) -> None:
    labels = data.draw(
        st.lists(st.sampled_from([-100, 5, 6, 7]), min_size=len(segments), max_size=len(segments))
    )
    found = shifted_right(
        torch.tensor([labels]), torch.tensor([segments]), start_token_id=1, pad_token_id=9
    )[0].tolist()
    for place in range(len(segments)):
        if place == 0 or segments[place] != segments[place - 1]:
            assert found[place] == 1
        else:
            assert found[place] == (9 if labels[place - 1] == -100 else labels[place - 1])
