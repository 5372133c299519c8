"""`StatisticsBatch`: what one forward pass is given, and which task each of its tokens belongs to.

T tokens of one side, row after row, padding included: those that the side's routers see.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from flanmoe.core.errors import DataError
from flanmoe.models.flan_moe_t5.configuration import Side


@dataclass(frozen=True)
class StatisticsBatch:
    """One batch of a pass over data.

    A decoder has the side "decoder" alone; an encoder-decoder has "encoder" and "decoder", which see
    different tokens.

    Attributes:
        inputs: keyword arguments of the model's forward.
        valid: by side, False where a token is padding (T).
        groups: by side, the number of each token's group, which is its task; arbitrary for padding (T).
        starts: by side, how many real tokens of the whole data come before this batch. None where it
            follows the batch before it, which is so in a single process; see `share_of_rank`.
    """

    inputs: dict[str, Tensor]
    valid: dict[str, Bool[Tensor, " _"]]
    groups: dict[str, Int[Tensor, " _"]]
    starts: dict[str, int] | None = None

    def tokens(self) -> dict[str, int]:
        """Return the number of real tokens by side."""
        return {side: int(valid.sum()) for side, valid in self.valid.items()}


def numbered(batches: Iterable[StatisticsBatch]) -> Iterator[StatisticsBatch]:
    """Give every batch its `starts`; a batch that has them sets where those after it go on."""
    following: dict[str, int] = {}
    for batch in batches:
        tokens = batch.tokens()
        starts = batch.starts or {side: following.get(side, 0) for side in tokens}
        following = {side: start + tokens[side] for side, start in starts.items() if side in tokens}
        yield replace(batch, starts=starts)


def share_of_rank(
    batches: Iterable[StatisticsBatch], rank: int, world_size: int
) -> Iterator[StatisticsBatch]:
    """Yield every `world_size`-th batch, from the `rank`-th on, with its place in the whole data.

    All ranks go through all batches, which costs making them; each runs the model on its own.

    Raises:
        ValueError: unless 0 <= rank < world_size.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"A rank must be from 0 to {world_size - 1}, but is {rank}.")
    for place, batch in enumerate(numbered(batches)):
        if place % world_size == rank:
            yield batch


def require_sound(
    batch: StatisticsBatch,
    sides: Collection[Side],
    groups: Collection[str],
    inputs: Mapping[Side, str],
) -> None:
    """Refuse a batch whose sides, tokens or groups do not fit the model or each other.

    Args:
        batch: the batch.
        sides: those of the model that have sparse layers.
        groups: names of the groups.
        inputs: by side, the argument of the model's forward that holds its token ids.

    Raises:
        DataError: says what does not fit.
    """
    for side in sides:
        for name, given in _by_side(batch).items():
            if side not in given:
                raise DataError(
                    f"A batch must say `{name}` for the {side}, but says it for "
                    f"{', '.join(given) or 'no side'}. Give it for every side that has experts."
                )
        _require_lengths(batch, side, inputs[side])
        _require_groups(batch, side, len(groups))


def _by_side(batch: StatisticsBatch) -> dict[str, Mapping[str, Any]]:
    given: dict[str, Mapping[str, Any]] = {"valid": batch.valid, "groups": batch.groups}
    return given if batch.starts is None else {**given, "starts": batch.starts}


def _require_lengths(batch: StatisticsBatch, side: Side, inputs: str) -> None:
    sizes = {"valid": len(batch.valid[side]), "groups": len(batch.groups[side])}
    if inputs in batch.inputs:
        sizes[inputs] = batch.inputs[inputs].numel()
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(
            f"A batch must have one entry for each token of the {side}, but has {found}. Padding counts "
            "here too, row after row."
        )


def _require_groups(batch: StatisticsBatch, side: Side, num_groups: int) -> None:
    used = batch.groups[side][batch.valid[side]]
    wrong = used[(used < 0) | (used >= num_groups)]
    if len(wrong):
        raise DataError(
            f"The number of a token's group must be from 0 to {num_groups - 1} for {num_groups} groups, but "
            f"{len(wrong)} tokens of the {side} have others, the first {int(wrong[0])}. Number the tokens by "
            "the places of their tasks among `groups`."
        )
