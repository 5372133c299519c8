"""Pairs as a batch: which column becomes which tensor, and what cannot be one batch."""

import numpy as np
import pytest
import torch

from flanmoe.data.collate import collate_pairs
from flanmoe.data.example import PackedPair
from flanmoe.data.pairs import TokenizedPair, grouped_pairs, packed_pair_row
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration


def row(first: int, *, length: int = 5, target_length: int = 4) -> PackedPair:
    pair = TokenizedPair(
        input_ids=np.array([first, first + 1, 1]),
        target_ids=np.array([first + 2, 1]),
        task="t",
        key="k",
        content_hash="h",
    )
    return packed_pair_row(
        [pair], length=length, target_length=target_length, decoder_start_token_id=7
    )


def test_a_pair_in_a_row_loses_what_it_loses_alone() -> None:
    """The sum over the tokens of a FlanMoeT5, whose router sees every token by itself."""
    config = FlanMoeT5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=2,
        encoder_router={"kind": "top_k.v1", "num_experts": 4, "top_k": 2},
        decoder_router={"kind": "top_k.v1", "num_experts": 4, "top_k": 2},
        decoder_start_token_id=7,
    )
    torch.manual_seed(0)
    model = FlanMoeT5ForConditionalGeneration(config).double().eval()
    sizes = [(5, 3), (1, 6), (7, 1), (3, 3)]
    draw = np.random.default_rng(0)
    pairs = [
        TokenizedPair(draw.integers(8, 40, inputs), draw.integers(8, 40, targets), "t", "k", "h")
        for inputs, targets in sizes
    ]

    def summed_loss(rows: list[PackedPair]) -> float:
        batch = collate_pairs(rows)
        with torch.no_grad():
            loss = model(**batch, use_cache=False).loss
        return float(loss) * int((batch["labels"] != -100).sum())

    lengths = {"length": 12, "target_length": 9}
    together = [
        packed_pair_row(group, **lengths, decoder_start_token_id=7)
        for group in grouped_pairs(pairs, **lengths)
    ]
    assert [len(row.tasks) for row in together] == [2, 2]
    alone = [
        packed_pair_row([p], length=p.sizes[0], target_length=p.sizes[1], decoder_start_token_id=7)
        for p in pairs
    ]
    assert summed_loss(together) == pytest.approx(sum(summed_loss([row]) for row in alone))


def test_a_batch_written_out() -> None:
    batch = collate_pairs([row(10), row(20)])
    expected = {
        "input_ids": [[10, 11, 1, 0, 0], [20, 21, 1, 0, 0]],
        "segment_ids": [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]],
        "decoder_input_ids": [[7, 12, 0, 0], [7, 22, 0, 0]],
        "decoder_segment_ids": [[1, 1, 0, 0], [1, 1, 0, 0]],
        "labels": [[12, 1, -100, -100], [22, 1, -100, -100]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [
        ([], r"\[\]"),
        ([row(1), row(1, length=6)], r"\[5, 6\]"),
        ([row(1), row(1, target_length=6)], r"\[4, 6\]"),
    ],
)
def test_rows_of_different_lengths_are_refused(rows: list[PackedPair], lengths: str) -> None:
    with pytest.raises(ValueError, match=f"these have lengths {lengths}"):
        collate_pairs(rows)
