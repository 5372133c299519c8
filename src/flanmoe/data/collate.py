"""Collation: packed rows to one batch of tensors."""

from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from flanmoe.core.errors import DataError
from flanmoe.data.example import Packed, PackedPair


def collate(
    rows: Sequence[Packed], *, task_numbers: Mapping[str, int] | None = None
) -> dict[str, Int[Tensor, "B L"]]:
    """Stack packed rows into a batch for a native transformers decoder. B rows, L positions.

    Gives `input_ids`, `labels` (unshifted, -100 where there is no loss), `position_ids` (restarting
    in every segment) and `segment_ids` (0 for padding; for router statistics, not for the model).
    There is no attention mask, and the model is to be called with `use_cache=False`: with either
    one, transformers no longer reads the restarts, and the examples of a row see each other.

    Args:
        rows: the rows.
        task_numbers: number of each task by its name. With it there are `task_ids` too (0 for padding;
            for router statistics, not for the model).

    Raises:
        ValueError: if there are no rows or their lengths differ.
        DataError: if a row holds an example of a task that has no number.
    """
    _check_lengths({len(row.input_ids) for row in rows})
    batch = {
        "input_ids": _stacked([row.input_ids for row in rows]),
        "labels": _stacked([row.labels for row in rows]),
        "position_ids": _stacked([row.position_ids for row in rows]),
        "segment_ids": _stacked([row.segment_ids for row in rows]),
    }
    if task_numbers is not None:
        batch["task_ids"] = _task_ids(rows, [row.segment_ids for row in rows], task_numbers)
    return batch


def collate_pairs(
    rows: Sequence[PackedPair], *, task_numbers: Mapping[str, int] | None = None
) -> dict[str, Int[Tensor, "B _"]]:
    """Stack packed pairs into a batch for an encoder-decoder. B rows, M and L positions.

    Gives `input_ids` and `segment_ids` (B x M), `decoder_input_ids`, `decoder_segment_ids` and `labels`
    (B x L; aligned with `decoder_input_ids`, -100 where there is no loss). Segments are 0 for padding.

    Args:
        rows: the rows.
        task_numbers: as in `collate`; there are `task_ids` and `decoder_task_ids` then.

    Raises:
        ValueError: if there are no rows or their lengths differ.
        DataError: if a row holds an example of a task that has no number.
    """
    _check_lengths({len(row.input_ids) for row in rows})
    _check_lengths({len(row.labels) for row in rows})
    batch = {
        "input_ids": _stacked([row.input_ids for row in rows]),
        "segment_ids": _stacked([row.segment_ids for row in rows]),
        "decoder_input_ids": _stacked([row.decoder_input_ids for row in rows]),
        "decoder_segment_ids": _stacked([row.decoder_segment_ids for row in rows]),
        "labels": _stacked([row.labels for row in rows]),
    }
    if task_numbers is not None:
        batch["task_ids"] = _task_ids(rows, [row.segment_ids for row in rows], task_numbers)
        of_decoder = [row.decoder_segment_ids for row in rows]
        batch["decoder_task_ids"] = _task_ids(rows, of_decoder, task_numbers)
    return batch


def _task_ids(
    rows: Sequence[Packed | PackedPair],
    segments: Sequence[Int[np.ndarray, " L"]],
    numbers: Mapping[str, int],
) -> Int[Tensor, "B L"]:
    """Return the number of each token's task, 0 for padding."""
    unknown = sorted({task for row in rows for task in row.tasks if task not in numbers})
    if unknown:
        raise DataError(
            f"Rows must hold examples of the {len(numbers)} tasks that their stream names, but one is of "
            f"the task {unknown[0]}. Add it to the stream's `task_names`."
        )
    of_segments = [np.array([0, *(numbers[task] for task in row.tasks)]) for row in rows]
    return _stacked([own[ids] for own, ids in zip(of_segments, segments, strict=True)])


def _check_lengths(lengths: Set[int]) -> None:
    if len(lengths) != 1:
        raise ValueError(
            f"A batch needs rows of one length, but these have lengths {sorted(lengths)}."
        )


def _stacked(columns: Sequence[Int[np.ndarray, " L"]]) -> Int[Tensor, "B L"]:
    return torch.as_tensor(np.stack(columns), dtype=torch.long)
