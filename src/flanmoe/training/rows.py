"""Rows on their way into the trainer: the stream it reads, micro-batches, and what a step holds."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from flanmoe.core.errors import DataError
from flanmoe.data.collate import collate
from flanmoe.data.example import IGNORED_LABEL, Packed, PackedPair

Row = Packed | PackedPair
Batch = dict[str, Tensor]


@runtime_checkable
class RowStream(Protocol):
    """What the trainer asks of a source of rows. It slices by rank itself."""

    @property
    def shares_rows(self) -> bool:
        """Whether a row may hold more than one example."""
        ...

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks that rows may hold, all different and the same on all processes."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """Go on after the row given last."""
        ...

    def state_after(self, rows: int) -> Mapping[str, Any]:
        """Return the position after `rows` rows since the start of training, as JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position, so that the next row is the one that followed it."""
        ...


class FixedRows:
    """A `RowStream` over rows that are already there, from the first again after the last.

    Args:
        rows: the rows; at least one.
        task_names: the tasks of their examples where other processes have other rows; without it those
            of these rows.

    Raises:
        DataError: if there are no rows.
    """

    def __init__(self, rows: Sequence[Row], *, task_names: Sequence[str] | None = None) -> None:
        if not rows:
            raise DataError("Training needs at least 1 packed row, but there are 0. Add examples.")
        self._rows = tuple(rows)
        self._given = 0
        own = sorted({task for row in rows for task in row.tasks})
        self._task_names = tuple(own if task_names is None else task_names)

    @property
    def shares_rows(self) -> bool:
        """Whether any row holds more than one example."""
        return any(len(row.tasks) > 1 for row in self._rows)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks of the rows."""
        return self._task_names

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        row = self._rows[self._given % len(self._rows)]
        self._given += 1
        return row

    def state_after(self, rows: int) -> dict[str, int]:
        """Return the position after `rows` rows."""
        return {"rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._given = int(state["rows"])


class _Rows(IterableDataset[Row]):
    def __init__(self, stream: Iterable[Row]) -> None:
        super().__init__()
        self._stream = stream

    def __iter__(self) -> Iterator[Row]:
        return iter(self._stream)


def micro_batches(
    stream: Iterable[Row], *, rows: int, collated: Callable[[list[Any]], Batch] = collate
) -> DataLoader[Any]:
    """Return a loader of micro-batches of `rows` rows each.

    Args:
        stream: the rows, in order.
        rows: rows of a micro-batch.
        collated: makes a batch of them.
    """
    # A generator of its own: a loader draws a number when iteration starts, which would shift the
    # draws of a resumed run.
    return DataLoader(
        _Rows(stream),
        batch_size=rows,
        collate_fn=collated,
        num_workers=0,
        generator=torch.Generator(),
    )


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What the micro-batches of one optimizer step hold together, over all processes.

    Of a decoder, of one side of an encoder-decoder, or of both sides together.

    Attributes:
        rows: packed rows.
        micro_batches: forward-backward passes, counted on every process.
        examples: segments, padding left out.
        real_tokens: tokens that belong to an example; router losses are means over them.
        padding_tokens: tokens that fill up rows.
        loss_tokens: tokens whose prediction enters the cross-entropy.
    """

    rows: int
    micro_batches: int
    examples: int
    real_tokens: int
    padding_tokens: int
    loss_tokens: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "StepTotals":
        """Count the micro-batches of one process, those of a decoder."""
        return cls.of_segments(
            [batch["segment_ids"] for batch in batches],
            loss_tokens=sum(int(_is_target(batch).sum()) for batch in batches),
        )

    @classmethod
    def of_segments(
        cls, segments: Sequence[Int[Tensor, "_ _"]], *, loss_tokens: int
    ) -> "StepTotals":
        """Count micro-batches of one process by the segment ids of their tokens, 0 for padding."""
        real = [int((ids != 0).sum()) for ids in segments]
        return cls(
            rows=sum(len(ids) for ids in segments),
            micro_batches=len(segments),
            examples=sum(_num_examples(ids) for ids in segments),
            real_tokens=sum(real),
            padding_tokens=sum(ids.numel() for ids in segments) - sum(real),
            loss_tokens=loss_tokens,
        )

    @property
    def tokens(self) -> int:
        """Real and padding tokens together."""
        return self.real_tokens + self.padding_tokens

    @classmethod
    def together(cls, sides: Collection["StepTotals"]) -> "StepTotals":
        """Put all sides of the same rows together: their tokens add up, and nothing else does."""
        return cls(
            rows=max(side.rows for side in sides),
            micro_batches=max(side.micro_batches for side in sides),
            examples=max(side.examples for side in sides),
            real_tokens=sum(side.real_tokens for side in sides),
            padding_tokens=sum(side.padding_tokens for side in sides),
            loss_tokens=sum(side.loss_tokens for side in sides),
        )


def valid_tokens(batch: Batch) -> Bool[Tensor, " T"]:
    """Return True for each token that is not padding, row after row."""
    return (batch["segment_ids"] != 0).reshape(-1)


def example_numbers(batch: Batch) -> Int[Tensor, " T"]:
    """Return for each token a number that only the tokens of the same example in the batch share."""
    return _numbers(batch["segment_ids"]).reshape(-1)


def target_positions(batch: Batch) -> Int[Tensor, " K"]:
    """Return the positions at which any row of the batch predicts a token that enters the loss."""
    return _is_target(batch).any(dim=0).nonzero().squeeze(1)


def _is_target(batch: Batch) -> Bool[Tensor, "B M"]:
    return batch["labels"][:, 1:] != IGNORED_LABEL


def _numbers(segments: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    rows = torch.arange(len(segments), device=segments.device).unsqueeze(1)
    return rows * (segments.max() + 1) + segments


def _num_examples(segments: Int[Tensor, "B L"]) -> int:
    return len(_numbers(segments)[segments != 0].unique())
