"""Collation: packed rows to one batch of tensors."""

from collections.abc import Sequence, Set

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from flanmoe.data.example import Packed, PackedPair


def collate(rows: Sequence[Packed]) -> dict[str, Int[Tensor, "B L"]]:
    """Stack packed rows into a batch for a native transformers decoder. B rows, L positions.

    Gives `input_ids`, `labels` (unshifted, -100 where there is no loss), `position_ids` (restarting
    in every segment) and `segment_ids` (0 for padding; for router statistics, not for the model).
    There is no attention mask, and the model is to be called with `use_cache=False`: with either
    one, transformers no longer reads the restarts, and the examples of a row see each other.

    Raises:
        ValueError: if there are no rows or their lengths differ.
    """
    _check_lengths({len(row.input_ids) for row in rows})
    return {
        "input_ids": _stacked([row.input_ids for row in rows]),
        "labels": _stacked([row.labels for row in rows]),
        "position_ids": _stacked([row.position_ids for row in rows]),
        "segment_ids": _stacked([row.segment_ids for row in rows]),
    }


def collate_pairs(rows: Sequence[PackedPair]) -> dict[str, Int[Tensor, "B _"]]:
    """Stack packed pairs into a batch for an encoder-decoder. B rows, M and L positions.

    Gives `input_ids` and `segment_ids` (B x M), `decoder_input_ids`, `decoder_segment_ids` and `labels`
    (B x L; aligned with `decoder_input_ids`, -100 where there is no loss). Segments are 0 for padding.

    Raises:
        ValueError: if there are no rows or their lengths differ.
    """
    _check_lengths({len(row.input_ids) for row in rows})
    _check_lengths({len(row.labels) for row in rows})
    return {
        "input_ids": _stacked([row.input_ids for row in rows]),
        "segment_ids": _stacked([row.segment_ids for row in rows]),
        "decoder_input_ids": _stacked([row.decoder_input_ids for row in rows]),
        "decoder_segment_ids": _stacked([row.decoder_segment_ids for row in rows]),
        "labels": _stacked([row.labels for row in rows]),
    }


def _check_lengths(lengths: Set[int]) -> None:
    if len(lengths) != 1:
        raise ValueError(
            f"A batch needs rows of one length, but these have lengths {sorted(lengths)}."
        )


def _stacked(columns: Sequence[Int[np.ndarray, " L"]]) -> Int[Tensor, "B L"]:
    return torch.as_tensor(np.stack(columns), dtype=torch.long)
