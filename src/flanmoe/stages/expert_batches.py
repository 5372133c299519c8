"""Examples of tasks as batches whose tokens know their task: what `flanmoe inspect` sends through a model.

Of every task some examples are drawn at random, in two halves: how far the halves of a task lie apart says how
far two samples of one task do (`flanmoe.evaluation.routing.distances`). Examples are rendered as for training
and packed, and each token carries the number of its task and half. A window of examples is in memory at a time.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.core.console import progress
from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import fixed_seeds
from flanmoe.data.collate import collate, collate_pairs
from flanmoe.data.example import Packed, PackedPair
from flanmoe.data.packing import PackingConfig
from flanmoe.data.pairs import TokenizedPair
from flanmoe.data.row_forms import RowForm
from flanmoe.data.tasks import Task
from flanmoe.data.tokenizer import padding_id
from flanmoe.evaluation.routing.counts import HALVES
from flanmoe.models.packing import keeps_examples_apart
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.tune import row_form
from flanmoe.statistics import StatisticsBatch

# Examples that are rendered, tokenised and packed together.
_WINDOW = 256
# Tokens of a batch, padding included; a row may be longer.
_TOKENS_TOGETHER = 4096
_HASH_BYTES = 12


class ReadExamples(Config):
    """What of a task went through the model.

    Attributes:
        size: examples that the task has.
        drawn: examples drawn from it.
        truncated: drawn examples whose end was cut off.
        left_out: drawn examples that were left out, because nothing of the response would have been left.
    """

    size: int
    drawn: int
    truncated: int = 0
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class DrawnExamples:
    """The examples of one task that are read. D examples.

    Attributes:
        task: the task.
        rows: positions in `task.examples`, ascending.
        halves: the random half that each belongs to; the halves differ by one example at most.
    """

    task: Task
    rows: Int[np.ndarray, " D"]
    halves: Int[np.ndarray, " D"]

    @classmethod
    def of(cls, task: Task, limit: int) -> "DrawnExamples":
        """Draw `limit` examples of a task, all where it has no more; always the same ones.

        Raises:
            DataError: if the task has no examples.
        """
        generator = SeedTree(0).child("inspect").child(task.name).numpy()
        drawn = generator.permutation(task.size)[:limit]
        order = np.argsort(drawn)
        return cls(task, drawn[order], (np.arange(len(drawn)) % HALVES)[order])


def group_name(task: str, half: int) -> str:
    """Return the name of a task's half among the groups of the statistics."""
    return f"{task} (half {half + 1})"


class ExpertBatches:
    """Batches of the drawn examples of some tasks; may be gone through several times.

    Args:
        held: the model and its tokenizer.
        drawn: the examples of each task.
        length: tokens of a row, of an encoder-decoder on each side. Longer examples are cut, and counted.

    Raises:
        DataError: at the end of a pass, if nothing of a task could be read.
    """

    def __init__(self, held: HeldModel, drawn: Sequence[DrawnExamples], *, length: int) -> None:
        model = held.model()
        self._tokenizer = held.text_tokenizer()
        self._drawn = tuple(drawn)
        self._form: RowForm[Any, Any] = row_form(model.config)
        self._packing = PackingConfig(
            length=length,
            target_length=length if model.config.is_encoder_decoder else None,
            on_too_long="truncate",
            examples_per_row=None if _may_share_rows(model) else 1,
            token_cache=False,
        )
        self._changes: dict[str, dict[str, int]] = {}

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that tokens are counted in: the halves of each task, task after task."""
        names = (one.task.name for one in self._drawn)
        return tuple(group_name(name, half) for name in names for half in range(HALVES))

    @property
    def shares_rows(self) -> bool:
        """Whether a row holds several examples."""
        return self._packing.examples_per_row is None

    @property
    def data_hash(self) -> str:
        """A hash of what is read: tasks, examples, halves and the length of rows."""
        digest = hashlib.blake2b(f"{self._packing.length}\n".encode(), digest_size=_HASH_BYTES)
        for one in self._drawn:
            hashes = one.task.content_hashes
            for row, half in zip(one.rows.tolist(), one.halves.tolist(), strict=True):
                digest.update(f"{group_name(one.task.name, half)} {hashes[row]}\n".encode())
        return digest.hexdigest()

    @property
    def read(self) -> dict[str, ReadExamples]:
        """What of each task the last pass through the batches read, by task."""
        return {
            one.task.name: ReadExamples(
                size=one.task.size,
                drawn=len(one.rows),
                truncated=self._changes.get(one.task.name, {}).get("truncated", 0),
                left_out=self._changes.get(one.task.name, {}).get("dropped", 0),
            )
            for one in self._drawn
        }

    def __iter__(self) -> Iterator[StatisticsBatch]:
        self._changes = {}
        total = sum(len(one.rows) for one in self._drawn)
        with progress("  reading tasks", total=total, unit="examples") as advance:
            places = self._places()
            while window := list(islice(places, _WINDOW)):
                rows = self._rows(window)
                left_out = len(window) - sum(len(row) for row in rows)
                for batch in self._batches(rows):
                    yield self._batch(batch)
                    advance(sum(len(row) for row in batch))
                if left_out:
                    advance(left_out)
        self._require_some_of_each()

    def _require_some_of_each(self) -> None:
        empty = [name for name, one in self.read.items() if one.left_out == one.drawn]
        if empty:
            raise DataError(
                f"Every task must have an example that can be read, but all of {listing(empty, limit=6)} are "
                f"longer than the {self._packing.length} tokens of a row before their answer begins. Raise "
                "`--length`, or leave the task out."
            )

    def _places(self) -> Iterator[tuple[DrawnExamples, int, int]]:
        for one in self._drawn:
            for row, half in zip(one.rows.tolist(), one.halves.tolist(), strict=True):
                yield one, row, half

    def _rows(self, window: Sequence[tuple[DrawnExamples, int, int]]) -> list[list[Any]]:
        """Return the tokens of the examples that share each row, the fullest row first."""
        rendered = [self._rendered(one.task, row, half) for one, row, half in window]
        tokenizing = self._form.tokenizing(self._tokenizer, self._packing, writes=False)
        kept: list[Any] = []
        for (one, _, _), tokens in zip(window, tokenizing(rendered), strict=True):
            fitting, change = self._form.fitted(tokens, self._packing)
            if fitting is not None:
                kept.append(fitting)
            if change is not None:
                counts = self._changes.setdefault(one.task.name, {})
                counts[change] = counts.get(change, 0) + 1
        # Rows of like length side by side leave little padding.
        return sorted(self._form.grouped(kept, self._packing), key=_width, reverse=True)

    def _rendered(self, task: Task, row: int, half: int) -> Any:
        example = task.examples[row]
        rendered = self._form.render(
            example,
            task.renderer,
            task.name,
            tokenizer=self._tokenizer,
            seeds=fixed_seeds(task.name, example.key),
        )
        return replace(rendered, task=group_name(task.name, half))

    def _batches(self, rows: Sequence[list[Any]]) -> Iterator[list[list[Any]]]:
        start = 0
        while start < len(rows):
            stop = start + max(_TOKENS_TOGETHER // _width(rows[start]), 1)
            yield list(rows[start:stop])
            start = stop

    def _batch(self, rows: Sequence[list[Any]]) -> StatisticsBatch:
        lengths = {"length": max(map(_width, rows))}
        if self._packing.target_length is not None:
            lengths = {
                "length": max(sum(one.sizes[0] for one in row) for row in rows),
                "target_length": max(sum(one.sizes[1] for one in row) for row in rows),
            }
        config = self._packing.model_copy(update=lengths)
        padding = padding_id(self._tokenizer)
        packed = [self._form.row(row, config, padding=padding) for row in rows]
        numbers = {name: number for number, name in enumerate(self.groups)}
        if self._packing.target_length is not None:
            return _of_pairs(packed, numbers)
        return _of_rows(packed, numbers)


def named_twice(tasks: Sequence[Task]) -> str | None:
    """Say which tasks are there more than once; None where none is."""
    names = [task.name for task in tasks]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    return listing(twice, limit=6) if twice else None


def _may_share_rows(model: PreTrainedModel) -> bool:
    # An encoder-decoder that gets here is told the examples of a row by their numbers.
    return bool(model.config.is_encoder_decoder) or keeps_examples_apart(model)


def _width(row: Sequence[Any]) -> int:
    """Tokens of a row, of an encoder-decoder on its longer side."""
    sizes = [one.sizes if isinstance(one, TokenizedPair) else (len(one),) for one in row]
    return max(sum(side) for side in zip(*sizes, strict=True))


def _of_rows(rows: Sequence[Packed], numbers: Mapping[str, int]) -> StatisticsBatch:
    batch = collate(rows)
    return StatisticsBatch(
        inputs={name: batch[name] for name in ("input_ids", "position_ids")},
        valid={"decoder": (batch["segment_ids"] != 0).flatten()},
        groups={"decoder": _groups(batch["segment_ids"], rows, numbers)},
    )


def _of_pairs(rows: Sequence[PackedPair], numbers: Mapping[str, int]) -> StatisticsBatch:
    batch = collate_pairs(rows)
    segments = {"encoder": batch["segment_ids"], "decoder": batch["decoder_segment_ids"]}
    names = ("input_ids", "segment_ids", "decoder_input_ids", "decoder_segment_ids")
    return StatisticsBatch(
        inputs={name: batch[name] for name in names},
        valid={side: (ids != 0).flatten() for side, ids in segments.items()},
        groups={side: _groups(ids, rows, numbers) for side, ids in segments.items()},
    )


def _groups(
    segments: Int[Tensor, "B L"], rows: Sequence[Packed | PackedPair], numbers: Mapping[str, int]
) -> Int[Tensor, " T"]:
    """Return for each token the number of the group that its example belongs to, 0 for padding."""
    most = max(len(row.tasks) for row in rows)
    table = torch.zeros(len(rows), most + 1, dtype=torch.long)
    for place, row in enumerate(rows):
        table[place, 1 : len(row.tasks) + 1] = torch.tensor([numbers[name] for name in row.tasks])
    return table.gather(1, segments).flatten()
