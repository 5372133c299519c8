"""Passes over arbitrary tokens, whose time says how long real ones will take."""

import torch
from jaxtyping import Int
from torch import Tensor

from flanmoe.evaluation.lm.forward import Forward
from flanmoe.evaluation.lm.prefixes import Prefixes
from flanmoe.evaluation.lm.shared_attention import RowsView
from flanmoe.evaluation.lm.token_tree import Prefix
from flanmoe.evaluation.lm.work import Work


class Trial:
    """Makes passes of any shape; nothing of it is counted as work.

    Args:
        forward: runs the model.
        sharing: whether the model can keep tokens before a row; without it there are none.
    """

    def __init__(self, forward: Forward, *, sharing: bool) -> None:
        self._forward = forward
        self._sharing = sharing
        self._prefixes = Prefixes(forward, Work())
        self._before: Prefix | None = None

    def run(self, rows: int, length: int, before: int) -> None:
        """Make one pass.

        Args:
            rows, length: its shape.
            before: tokens before each row that are kept; read the first time that a number is asked for.
        """
        tokens = self._tokens(rows * length).view(rows, length)
        first = torch.zeros(1, dtype=torch.long, device=tokens.device)
        if not self._sharing:
            self._forward.logits(tokens, None, (first, first), None)
            return
        positions = before + torch.arange(length, device=tokens.device).expand(rows, length)
        with self._forward.sharing():
            stored = self._prefixes.stored(self._prefix(before))
            view = RowsView(stored, positions, None)
            self._forward.logits(tokens, positions, (first, first), view)

    def _prefix(self, length: int) -> Prefix | None:
        if length and (self._before is None or self._before.length != length):
            self._before = Prefix(tuple(int(token) for token in self._tokens(length)))
        return self._before if length else None

    def _tokens(self, number: int) -> Int[Tensor, " N"]:
        tokens = torch.arange(number, device=self._forward.device)
        return tokens % self._forward.vocabulary_size
