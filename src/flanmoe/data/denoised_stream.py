"""The stream of denoising rows that pre-training reads: documents, cut into windows and taken apart.

A row is one window (`flanmoe.data.text_windows`) taken apart by a denoiser, and since all windows have one
length there is no padding. What a row holds follows from its number alone, so a position is that number.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from flanmoe.core.cache import fingerprint
from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError, DataError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.denoisers import DenoisedLengths, Denoiser, denoiser_named
from flanmoe.data.documents import Document
from flanmoe.data.example import PackedPair
from flanmoe.data.packing import PackingReport, TaskCounts
from flanmoe.data.pairs import TokenizedPair, packed_pair_row
from flanmoe.data.text_windows import TokenizedTexts
from flanmoe.data.tokenizer import Tokenizer, end_of_text_id


class DenoisingConfig(Config):
    """How documents become rows.

    Attributes:
        length: tokens of a row on the encoder's side, all of them used; how many the decoder's side has
            follows from the denoiser.
        denoiser: name of what takes texts apart.
        options: options of the denoiser, by name.
    """

    length: int = Field(default=512, ge=3)
    denoiser: str = "span_corruption"
    options: dict[str, float] = Field(default_factory=dict[str, float])

    @model_validator(mode="after")
    def _something_to_make(self) -> "DenoisingConfig":
        try:
            self.built().lengths(self.length)
        except ConfigError as error:
            raise ValueError(
                f"must name a denoiser, its options and a length, but found: {error}"
            ) from error
        return self

    def built(self) -> Denoiser:
        """Return the denoiser with its options."""
        return denoiser_named(self.denoiser, **self.options)


class DenoisedStream:
    """Endless iterator over denoising rows, the same for the same seed, documents and settings.

    With several ranks, row r of the whole stream goes to rank r % world_size; counts are those of the whole
    stream and equal on all ranks. The tokens of the documents are held in memory, 4 bytes each.

    Args:
        documents: what to read.
        tokenizer: the model's tokenizer.
        config: row length and denoiser.
        seeds: the branch of the seed tree that belongs to this stream.
        sentinels: ids of the sentinels in the order in which they are used (`denoisers.sentinel_ids`).
        decoder_start_token_id: what the decoder is given first; the model's configuration says it.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        DataError: if the documents do not fill one row or hold sentinels, there are too few sentinels, or the
            tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        config: DenoisingConfig,
        seeds: SeedTree,
        *,
        sentinels: Sequence[int],
        decoder_start_token_id: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be between 0 and {world_size - 1}, but is {rank}.")
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.rows_given = 0
        self._seeds = seeds
        self._sentinels = tuple(sentinels)
        self._start = decoder_start_token_id
        self._end = end_of_text_id(tokenizer)
        self._denoiser = config.built()
        self.lengths: DenoisedLengths = self._denoiser.lengths(config.length)
        self._hashes = frozenset(document.content_hash for document in documents)
        self._texts = TokenizedTexts.of(documents, tokenizer)
        self._check()
        self._epoch = self._texts.epoch(0, seeds, self.lengths.text)

    def __iter__(self) -> Iterator[PackedPair]:
        return self

    def __next__(self) -> PackedPair:
        row = self._row(self.rows_given * self.world_size + self.rank)
        self.rows_given += 1
        return row

    @property
    def shares_rows(self) -> bool:
        """Whether a row may hold more than one example: never."""
        return False

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks that rows are of: the denoiser stands in the place of one."""
        return (self.config.denoiser,)

    @property
    def rows_per_epoch(self) -> int:
        """Rows in which an epoch's documents are given, over all ranks."""
        return self._texts.num_tokens // self.lengths.text

    @property
    def epochs(self) -> float:
        """How often the documents have been gone through, over all ranks."""
        return self.rows_given * self.world_size / self.rows_per_epoch

    @property
    def report(self) -> PackingReport:
        """What has been given so far, over all ranks; the denoiser stands in the place of a task."""
        rows = self.rows_given * self.world_size
        if not rows:
            return PackingReport()
        tokens = rows * (self.lengths.inputs + self.lengths.targets)
        return PackingReport(
            rows=rows,
            real_tokens=tokens,
            loss_tokens=rows * self.lengths.targets,
            tasks={self.config.denoiser: TaskCounts(examples=rows, tokens=tokens)},
        )

    @property
    def seen_hashes(self) -> frozenset[str]:
        """Content hashes of every document, once a row was given: a superset of what was trained on."""
        return self._hashes if self.rows_given else frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the row given last, as plain JSON types."""
        return self.state_after(self.rows_given)

    def state_after(self, rows: int) -> dict[str, Any]:
        """Return the position after `rows` rows of this rank, counted from the beginning of training.

        Raises:
            ValueError: if the stream has not given that many rows yet.
        """
        if not 0 <= rows <= self.rows_given:
            raise ValueError(f"`rows` must be between 0 and {self.rows_given}, but is {rows}.")
        return {"identity": self._identity, "world_size": self.world_size, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position, so that the next row is the one that followed it.

        Raises:
            RunError: if the position was written for other documents, settings, seed or number of ranks.
        """
        if state["identity"] != self._identity or state["world_size"] != self.world_size:
            raise RunError(
                "The saved position belongs to another data stream: its documents, tokenizer, denoiser, "
                f"seed or number of processes differ (saved {state['identity']} x {state['world_size']}, "
                f"here {self._identity} x {self.world_size}). Resume with the recipe and data that the run "
                "was started with."
            )
        self.rows_given = int(state["rows"])

    def _row(self, number: int) -> PackedPair:
        epoch, place = divmod(number, self.rows_per_epoch)
        if self._epoch.number != epoch:
            self._epoch = self._texts.epoch(epoch, self._seeds, self.lengths.text)
        tokens = self._texts.window(self._epoch, place)
        generator = self._seeds.child("noise", number).numpy()
        inputs, targets = self._denoiser(tokens, self._sentinels, generator)
        pair = TokenizedPair(
            input_ids=np.append(inputs, self._end),
            target_ids=np.append(targets, self._end),
            task=self.config.denoiser,
            key=str(number),
            content_hash="",
        )
        return packed_pair_row(
            [pair],
            length=self.lengths.inputs,
            target_length=self.lengths.targets,
            decoder_start_token_id=self._start,
        )

    def _check(self) -> None:
        if self._texts.num_tokens < self.lengths.text:
            raise DataError(
                f"The documents must hold at least {self.lengths.text} tokens, from which one row of "
                f"{self.config.length} is made, but hold {self._texts.num_tokens}. Add documents, or lower "
                "`length`."
            )
        if len(self._sentinels) < self.lengths.sentinels:
            raise DataError(
                f"Rows of {self.config.length} tokens need {self.lengths.sentinels} sentinels, but the "
                f"tokenizer has {len(self._sentinels)}. Lower `length`, or train a tokenizer with more."
            )
        inside = int(np.isin(self._texts.tokens, self._sentinels).sum())
        if inside:
            raise DataError(
                f"The documents must hold no sentinels, or a span could not be told from their text, but hold "
                f"{inside}. Take what reads like `<extra_id_0>` out of them."
            )

    @cached_property
    def _identity(self) -> str:
        return fingerprint(
            {
                "texts": self._texts.digest(),
                "config": self.config.to_mapping(),
                "denoiser": self._denoiser.to_mapping(),
                "sentinels": self._sentinels,
                "tokens": [self._start, self._end],
                "seed": [self._seeds.root, *self._seeds.path],
            }
        )
