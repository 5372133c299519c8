"""Rows of tokens gathered for experts, and rows of experts added up for tokens.

On the CPU rows are added to their tokens expert after expert: no tensor of all rows is ever made. On
other devices additions into one place would come in any order, so all rows are made, and each token
fetches its own in the order of its choices. Both repeat to the bit.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from flanmoe.moe.compute.buffers import Buffers
from flanmoe.moe.compute.grouping import Grouping, Segments


def gather_rows(
    tokens: Float[Tensor, "T H"],
    grouping: Grouping,
    segments: Segments,
    *,
    out: Float[Tensor, "N H"],
) -> Float[Tensor, "N H"]:
    """Write the rows of the segments' tokens into `out`."""
    return torch.index_select(tokens, 0, grouping.token_ids[segments.rows], out=out)


def add_rows(
    total: Float[Tensor, "T H"],
    rows: Float[Tensor, "N H"],
    grouping: Grouping,
    segments: Segments,
    *,
    gates: Float[Tensor, " N"] | None,
    buffers: Buffers,
) -> None:
    """Add the rows of the segments, times their gates, to those of their tokens.

    Args:
        total: where they are added; products with gates are made in its dtype.
        rows: the segments' rows, which may be overwritten.
        grouping: of the batch.
        segments: whose rows they are; all of the batch but on the CPU.
        gates: of the segments' rows, None for 1.
        buffers: for a moment.
    """
    if total.device.type != "cpu":
        fetch_rows(total, rows, grouping, gates)
        return
    if gates is not None:
        place = rows
        if rows.dtype != total.dtype:
            place = buffers.take("added", *rows.shape, dtype=total.dtype)
        rows = torch.mul(rows, gates.unsqueeze(1), out=place)
    total.index_add_(0, grouping.token_ids[segments.rows], rows.to(total.dtype))


def fetch_rows(
    total: Float[Tensor, "T H"],
    rows: Float[Tensor, "N H"],
    grouping: Grouping,
    gates: Float[Tensor, " N"] | None,
) -> None:
    """Add to each token the rows of its choices, one choice after the other."""
    if not rows.shape[0]:
        return
    places = grouping.places()
    complete = rows.shape[0] == places.numel()
    for choice in places.unbind(dim=1):
        fetched = choice if complete else choice.clamp(max=rows.shape[0] - 1)
        own = rows.index_select(0, fetched).to(total.dtype)
        if gates is not None:
            own *= gates.index_select(0, fetched).unsqueeze(1)
        if not complete:
            own.masked_fill_((choice == rows.shape[0]).unsqueeze(1), 0)
        total += own
