"""The likeliest next token of every row that is written."""

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Rows that are finished are taken out of a batch once no more than this share is left.
SHRINK_AT = 0.75

# Called with the number of a row, or of a request, whose logits are no numbers; raises.
Complain = Callable[[int], None]


def likeliest(
    logits: Float[Tensor, "R V"], rows: Sequence[int], live: Collection[int], complain: Complain
) -> dict[int, int]:
    """Return the likeliest next token of every row; finished rows get one too, and it is ignored.

    Args:
        logits: what is expected next.
        rows: their numbers.
        live: rows that are not finished.
        complain: is told of a live row whose logits are no numbers.
    """
    finite = torch.isfinite(logits.float().sum(dim=-1)).tolist()
    for row, is_finite in zip(rows, finite, strict=True):
        if not is_finite and row in live:
            complain(row)
    return dict(zip(rows, logits.argmax(dim=-1).tolist(), strict=True))
