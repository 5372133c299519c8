"""Assignments sorted by expert: one sort, from which every product knows which rows are whose.

The assignments of T tokens with k choices each are sorted by expert, within an expert by token;
those to "no expert" are left out. What remains are N rows in E segments, one an expert, empty ones
included. `Grouping` holds all of them, `Segments` a run of neighbouring experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.core.errors import ModelError


class Segment(NamedTuple):
    """One expert's rows.

    Attributes:
        expert: number of the expert, counted from the first one of its `Segments`.
        start, end: its rows, counted from the first one of its `Segments`.
    """

    expert: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segments:
    """A run of R neighbouring experts and their rows, one expert's behind the other's.

    Attributes:
        first_expert: number of the first one among all experts.
        first_row: place of its first row among all sorted rows.
        counts: rows of each expert of the run.
        ends: where each expert's rows end, counted from `first_row`, on the device of the rows: the
            offsets that `torch.nn.functional.grouped_mm` takes.
    """

    first_expert: int
    first_row: int
    counts: tuple[int, ...]
    ends: Int[Tensor, " R"]

    @property
    def num_rows(self) -> int:
        """Number of rows of all experts of the run."""
        return sum(self.counts)

    @property
    def experts(self) -> slice:
        """The run, as a slice along the first axis of what is stored an expert."""
        return slice(self.first_expert, self.first_expert + len(self.counts))

    @property
    def rows(self) -> slice:
        """The run's rows, as a slice of all sorted rows."""
        return slice(self.first_row, self.first_row + self.num_rows)

    def used(self) -> Iterator[Segment]:
        """Go through the experts that have rows."""
        end = 0
        for expert, count in enumerate(self.counts):
            start, end = end, end + count
            if count:
                yield Segment(expert, start, end)


@dataclass(frozen=True, slots=True)
class Grouping:
    """The assignments of one batch, sorted by expert.

    Attributes:
        order: of each of the N sorted rows, the number of its assignment: token * k + choice.
        token_ids: of each sorted row.
        counts: rows of each expert.
        ends: where each expert's rows end.
        shape: (T, k) of the choices that were sorted.
    """

    order: Int[Tensor, " N"]
    token_ids: Int[Tensor, " N"]
    counts: tuple[int, ...]
    ends: Int[Tensor, " E"]
    shape: tuple[int, int]

    @property
    def whole(self) -> Segments:
        """All experts as one run."""
        return Segments(0, 0, self.counts, self.ends)

    def runs(self, most_rows: int) -> list[Segments]:
        """Cut the experts into runs of at most so many rows; an expert with more is a run by itself.

        Runs without rows are left out; experts without rows may lie inside one.
        """
        starts = [0, *accumulate(self.counts)]
        runs: list[Segments] = []
        first = 0
        for expert in range(1, len(self.counts) + 1):
            last = expert == len(self.counts)
            if last or starts[expert + 1] - starts[first] > most_rows:
                if starts[expert] > starts[first]:
                    ends = self.ends[first:expert]
                    ends = ends - starts[first] if first else ends
                    runs.append(Segments(first, starts[first], self.counts[first:expert], ends))
                first = expert
        return runs

    def places(self) -> Int[Tensor, "T k"]:
        """Return where each assignment stands among the sorted rows, N for one to no expert."""
        found = self.order.new_full(self.shape, self.order.numel()).flatten()
        found[self.order] = torch.arange(self.order.numel(), device=self.order.device)
        return found.view(self.shape)


def group(
    expert_ids: Int[Tensor, "T k"], gates: Float[Tensor, "T k"], num_experts: int
) -> Grouping:
    """Sort assignments by expert; an id of `num_experts` stands for no expert.

    Counts are read back from the device once, and what is wrong with ids or gates with them.

    Raises:
        ModelError: if an id is negative or above `num_experts`, or the gate of an expert is NaN or
            infinite.
    """
    sorted_ids, order = expert_ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(num_experts + 2, dtype=sorted_ids.dtype, device=sorted_ids.device)
    starts = torch.searchsorted(sorted_ids, bounds)
    broken = ~gates.detach().isfinite() & (expert_ids < num_experts)
    *found, num_broken = _read(torch.cat([starts, broken.sum().view(1)]))
    if found[0] > 0 or found[-1] < order.numel():
        _refuse_ids(sorted_ids, num_experts)
    if num_broken:
        _refuse_gates(num_broken, expert_ids)
    order = order[: found[-2]]
    return Grouping(
        order=order,
        token_ids=order // max(expert_ids.shape[1], 1),
        counts=tuple(end - start for start, end in pairwise(found[:-1])),
        ends=starts[1:-1].to(torch.int32),
        shape=(expert_ids.shape[0], expert_ids.shape[1]),
    )


def _read(numbers: Int[Tensor, " n"]) -> list[int]:
    found: list[int] = numbers.tolist()  # pyright: ignore
    return found


def _refuse_ids(sorted_ids: Int[Tensor, " M"], num_experts: int) -> None:
    outside = (sorted_ids < 0) | (sorted_ids > num_experts)
    raise ModelError(
        f"Expert ids must be between 0 and {num_experts - 1}, or {num_experts} for no expert, but "
        f"{int(outside.sum())} of {sorted_ids.numel()} are not, the first is "
        f"{int(sorted_ids[outside][0])}. A router must choose from as many experts as there are."
    )


def _refuse_gates(num_broken: int, expert_ids: Int[Tensor, "T k"]) -> None:
    raise ModelError(
        f"Gates must be finite, but {num_broken} of {expert_ids.numel()} are NaN or infinite. The router's "
        "scores have overflowed: lower the learning rate, or go back to the last checkpoint."
    )
