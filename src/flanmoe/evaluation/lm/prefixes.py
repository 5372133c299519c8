"""Keys and values of the prefixes that are in use, each computed when it is first needed."""

import torch
from torch import Tensor

from flanmoe.evaluation.lm.forward import Forward
from flanmoe.evaluation.lm.listening import PADDING
from flanmoe.evaluation.lm.shared_attention import KeysValues, RowsView, Stored
from flanmoe.evaluation.lm.token_tree import Prefix
from flanmoe.evaluation.lm.work import Work

# A longer prefix is read in pieces, so that its activations fit where a batch fits.
_MOST_TOKENS_AT_ONCE = 2048


class Prefixes:
    """Prefixes along one way from the beginning of a text; those off the way are let go.

    Args:
        forward: runs the model, which must be `sharing`.
        work: counts what is read.
    """

    def __init__(self, forward: Forward, work: Work) -> None:
        self._forward = forward
        self._work = work
        self._stored: dict[Prefix, Stored] = {}

    def stored(self, prefix: Prefix | None, label: int = PADDING) -> Stored | None:
        """Return what is kept of a prefix, reading what is missing of it.

        Args:
            prefix: the prefix, None for nothing before a text.
            label: the task whose tokens they are, for a listener; by default it is not told of them.
        """
        if prefix is None:
            self._stored.clear()
            return None
        way = _way(prefix)
        for other in [other for other in self._stored if other not in way]:
            del self._stored[other]
        before: Stored | None = None
        for part in way:
            if part not in self._stored:
                self._stored[part] = self._read(part, before, label)
            before = self._stored[part]
        return before

    def _read(self, prefix: Prefix, before: Stored | None, label: int) -> Stored:
        device = self._forward.device
        nowhere = torch.zeros(0, dtype=torch.long, device=device)
        for start in range(0, len(prefix.tokens), _MOST_TOKENS_AT_ONCE):
            piece = torch.tensor(
                [prefix.tokens[start : start + _MOST_TOKENS_AT_ONCE]], device=device
            )
            length = piece.shape[1]
            done = before.length if before else 0
            positions = torch.arange(done, done + length, device=device)[None]
            view = RowsView(before, positions, None, keep=True)
            labels = None if label == PADDING else torch.full_like(piece, label)
            self._forward.logits(piece, positions, (nowhere, nowhere), view, labels)
            self._work.real_tokens += length
            before = _extended(before, view.kept, length)
        assert before is not None, "a prefix has tokens"
        return before


def _way(prefix: Prefix) -> list[Prefix]:
    way: list[Prefix] = []
    part: Prefix | None = prefix
    while part is not None:
        way.append(part)
        part = part.parent
    return way[::-1]


def _extended(before: Stored | None, kept: dict[int, KeysValues], length: int) -> Stored:
    if before is None:
        return Stored(kept, length)
    layers = {
        layer: KeysValues(
            _after(before.layers[layer].keys, own.keys),
            _after(before.layers[layer].values, own.values),
        )
        for layer, own in kept.items()
    }
    return Stored(layers, before.length + length)


def _after(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=2)
