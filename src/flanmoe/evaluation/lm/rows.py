"""Rows of token trees as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flanmoe.evaluation.lm.listening import PADDING
from flanmoe.evaluation.lm.token_tree import Row


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows side by side, filled up on the right. B rows, Q tokens.

    Attributes:
        tokens: token ids, 0 where nothing stands.
        positions: place of each token in its text.
        visible: which tokens of its row a token sees; None where that is all to its left.
        texts: for each place the first text of its row that goes through it, -1 where nothing stands.
        num_real: tokens that belong to a text.
    """

    tokens: Int[Tensor, "B Q"]
    positions: Int[Tensor, "B Q"]
    visible: Bool[Tensor, "B Q Q"] | None
    texts: Int[np.ndarray, "B Q"]
    num_real: int

    @property
    def num_padding(self) -> int:
        """Places that belong to no text."""
        return self.tokens.numel() - self.num_real


def row_batch(rows: Sequence[Row], *, num_before: int, device: torch.device) -> RowBatch:
    """Put rows side by side.

    What fills them up stands on the right, where no token of a text looks.

    Args:
        rows: the rows.
        num_before: tokens of the prefix before them.
        device: where the tensors go.
    """
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    positions = np.zeros((len(rows), longest), dtype=np.int64)
    texts = np.full((len(rows), longest), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        positions[number, : len(row.tokens)] = num_before + row.depths()
        texts[number, : len(row.tokens)] = row.texts()
    visible = None
    if not all(row.is_chain for row in rows):
        seen = np.broadcast_to(np.eye(longest, dtype=bool), (len(rows), longest, longest)).copy()
        for number, row in enumerate(rows):
            length = len(row.tokens)
            seen[number, :length, :length] = row.visible()
        visible = torch.from_numpy(seen).to(device)
    return RowBatch(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(positions).to(device),
        visible,
        texts,
        sum(len(row.tokens) for row in rows),
    )


class TextLabels:
    """Which task the tokens of a batch belong to, for a listener.

    Args:
        labels: the task of each text; None where nobody listens.
    """

    def __init__(self, labels: Sequence[int] | None) -> None:
        self._labels = None if labels is None else np.array([*labels, PADDING], dtype=np.int64)

    def of(self, batch: RowBatch) -> Int[Tensor, "B Q"] | None:
        """Return the task of every token of a batch; None where nobody listens."""
        if self._labels is None:
            return None
        # Text -1 is no text: the last entry.
        return torch.from_numpy(self._labels[batch.texts]).to(batch.tokens.device)

    def of_rows(self, texts: Sequence[int]) -> Int[np.ndarray, " B"] | None:
        """Return the task of one text a row, -1 for no text; None where nobody listens."""
        return None if self._labels is None else self._labels[np.asarray(texts)]

    def first(self, rows: Sequence[Row]) -> int:
        """Return the task of the first text of some rows."""
        return PADDING if self._labels is None else int(self._labels[rows[0].ends[0][0]])
