"""What is kept of rows that are being written: keys and values, and which columns hold what."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flanmoe.evaluation.lm.shared_attention import KeysValues, Stored


@dataclass(slots=True)
class WrittenRows:
    """What is kept of the rows that are being written. R rows, C columns: contexts, then answers.

    Attributes:
        rows: numbers of the rows in their batch.
        stored: the prefix of each row; rows with one prefix stand together.
        layers: keys and values of the rows' own tokens, by layer.
        visible: which columns hold a token.
        positions: place in its text of every column's token.
        lengths: tokens of each text so far, the shared ones included.
        column: the next column to write.
    """

    rows: list[int]
    stored: list[Stored | None]
    layers: dict[int, KeysValues]
    visible: Bool[Tensor, "R C"]
    positions: Int[Tensor, "R C"]
    lengths: Int[Tensor, " R"]
    column: int = 0

    @classmethod
    def empty(
        cls,
        lengths: Sequence[int],
        stored: Sequence[Stored | None],
        num_columns: int,
        device: torch.device,
    ) -> "WrittenRows":
        """Return rows of which nothing has been read yet.

        Args:
            lengths: tokens of each row's own context.
            stored: the prefix of each row.
            num_columns: tokens of the longest context and answer together.
            device: where the tensors go.
        """
        own = torch.tensor(lengths, device=device)
        before = torch.tensor([one.length if one else 0 for one in stored], device=device)
        columns = torch.arange(num_columns, device=device)
        return cls(
            rows=list(range(len(lengths))),
            stored=list(stored),
            layers={},
            visible=columns < own[:, None],
            positions=before[:, None] + columns,
            lengths=before + own,
        )

    def take(self, start: int, kept: dict[int, KeysValues]) -> None:
        """Keep the keys and values of the rows from `start` on."""
        for layer, own in kept.items():
            if layer not in self.layers:
                self.layers[layer] = KeysValues(self._room(own.keys), self._room(own.values))
            here = self.layers[layer]
            stop, length = start + len(own.keys), own.keys.shape[2]
            here.keys[start:stop, :, :length] = own.keys
            here.values[start:stop, :, :length] = own.values

    def _room(self, own: Tensor) -> Tensor:
        num_rows, num_columns = self.visible.shape
        return own.new_zeros(num_rows, own.shape[1], num_columns, own.shape[3])

    def grow(self) -> Int[Tensor, " R"]:
        """Make the next column hold a token; return the tokens' places in their texts."""
        positions = self.lengths
        self.visible[:, self.column] = True
        self.positions[:, self.column] = positions
        self.lengths = positions + 1
        return positions

    def only(self, rows: Sequence[int]) -> "WrittenRows":
        """Return the state of some rows, in their order."""
        places = torch.tensor([self.rows.index(row) for row in rows], device=self.visible.device)
        return WrittenRows(
            rows=list(rows),
            stored=[self.stored[self.rows.index(row)] for row in rows],
            layers={
                layer: KeysValues(own.keys[places], own.values[places])
                for layer, own in self.layers.items()
            },
            visible=self.visible[places],
            positions=self.positions[places],
            lengths=self.lengths[places],
            column=self.column,
        )

    def prefixes(self) -> list[tuple[Stored | None, int]]:
        """Return each prefix with the number of rows that stand behind it, in order."""
        together = (list(rows) for _, rows in groupby(self.stored, key=id))
        return [(rows[0], len(rows)) for rows in together]
