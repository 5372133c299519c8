"""The stream of packed rows that a training run reads, and its position as a small piece of state.

The stream works in windows: so many draws from the mixture, packed by themselves, their rows in a
seeded order. A position is therefore the number of a window, a row within it, and how often each
task had been drawn before it. Everything else is computed again. What kind of rows it gives is its form's to
say (`flanmoe.data.row_forms`).
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

from typing_extensions import TypeVar

from flanmoe.core.cache import fingerprint
from flanmoe.core.errors import DataError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed, PackedPair, Rendered
from flanmoe.data.mixture import Draw, Mixture
from flanmoe.data.packing import PackingConfig, PackingReport, PackingTally, report_from_state
from flanmoe.data.renderers.template import NoExemplarError
from flanmoe.data.row_forms import DecoderForm, RowForm
from flanmoe.data.tokenizer import Tokenizer, padding_id

RowT = TypeVar("RowT", bound=Packed | PackedPair, default=Packed)

# A loader may be this many windows ahead of the training step that a checkpoint is taken at.
_KEPT_WINDOWS = 256
# After so many draws in a row without one that fits, the fault is in the settings.
_FRUITLESS_DRAWS = 10_000

_DECODER: RowForm[Any, Any] = DecoderForm()


@dataclass(frozen=True, slots=True)
class _WindowStart:
    """The position before the first draw of a window.

    Attributes:
        window: number of the window.
        first_row: rows that all windows before it gave, over all ranks.
        counts: draws of each task before it.
        tally: what had been packed before it.
        num_dropped: how many draws had been left out before it.
    """

    window: int
    first_row: int
    counts: dict[str, int]
    tally: PackingTally
    num_dropped: int


@dataclass(frozen=True, slots=True)
class _Row(Generic[RowT]):
    """A packed row and the content hashes of the examples that stand in it."""

    packed: RowT
    content_hashes: tuple[str, ...]


class PackedStream(Generic[RowT]):
    """Endless iterator over packed rows, the same for the same seed, tasks and settings.

    With several ranks, row r of the whole stream goes to rank r % world_size. Every rank
    computes every window, so that counts, report and hashes are those of the whole stream and
    equal on all ranks.

    Args:
        mixture: what to draw from.
        tokenizer: the model's tokenizer.
        config: row length, window, what happens to examples that are too long.
        seeds: the branch of the seed tree that belongs to this stream.
        form: what kind of rows it gives; without it rows for a decoder. `PairForm` gives an
            encoder-decoder's.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ConfigError: if the config lacks what the form needs, or sets what has no effect on it.
        DataError: on reading on, if none of very many draws fits in a row.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        config: PackingConfig,
        seeds: SeedTree,
        *,
        form: RowForm[Any, RowT] = _DECODER,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be between 0 and {world_size - 1}, but is {rank}.")
        self.mixture = mixture
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self._tokenizer = tokenizer
        self._seeds = seeds
        self._form = form
        self._identity = self._fingerprint()
        nothing = _WindowStart(
            window=0, first_row=0, counts={}, tally=PackingTally(), num_dropped=0
        )
        self._start_at(nothing, dropped=())

    def __iter__(self) -> Iterator[RowT]:
        return self

    def __next__(self) -> RowT:
        rows = [self._next_row() for _ in range(self.world_size)]
        self.rows_given += 1
        return rows[self.rank]

    @property
    def shares_rows(self) -> bool:
        """Whether a row may hold more than one example."""
        return self.config.examples_per_row != 1

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks that examples of rows may be of, the same on all ranks."""
        return tuple(task.name for task in self.mixture.tasks)

    @property
    def report(self) -> PackingReport:
        """What has been packed so far, over all ranks: rows given, drops of windows begun."""
        return self._tally.report()

    @property
    def seen_hashes(self) -> frozenset[str]:
        """Content hashes of every example drawn so far, to the end of the window begun.

        A superset of what was trained on: it holds dropped examples and the rest of the window too.
        """
        return self.mixture.drawn_hashes(self._counts)

    @property
    def row_hashes(self) -> frozenset[str]:
        """Content hashes of the examples that stand in the rows given so far, over all ranks."""
        start = self._starts[-1]
        dropped = Counter(self._dropped[: start.num_dropped])
        found = {
            self.mixture.content_hash(draw)
            for draw, times in self.mixture.times_drawn(start.counts)
            if dropped[self._place(draw)] < times
        }
        return frozenset(found).union(
            *(row.content_hashes for row in self._rows[: self._given_of_window])
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the row given last, as plain JSON types."""
        return self.state_after(self.rows_given)

    def state_after(self, rows: int) -> dict[str, Any]:
        """Return the position after `rows` rows of this rank,
        counted from the beginning of training.

        A loader reads ahead of the training step; the state to save is that of the rows trained on.

        Raises:
            ValueError: if the stream has not given that many rows yet, or gave them too long ago.
        """
        reached = rows * self.world_size
        oldest = self._starts[0].first_row
        if not oldest <= reached <= self.rows_given * self.world_size:
            raise ValueError(
                f"`rows` must be between {-(-oldest // self.world_size)} and {self.rows_given}, "
                f"but is {rows}."
            )
        firsts = [start.first_row for start in self._starts]
        start = self._starts[bisect_right(firsts, reached) - 1]
        return {
            "identity": self._identity,
            "world_size": self.world_size,
            "rows": rows,
            "window": start.window,
            "first_row": start.first_row,
            "counts": dict(start.counts),
            "report": start.tally.report().model_dump(mode="json"),
            "dropped": [list(place) for place in self._dropped[: start.num_dropped]],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position, so that the next row is the one that followed it.

        Raises:
            RunError: if the position was written for other tasks, settings, seed or
                number of ranks.
        """
        if state["identity"] != self._identity or state["world_size"] != self.world_size:
            raise RunError(
                "The saved position belongs to another data stream: its tasks, sizes, rates, "
                f"packing, seed or number of processes differ (saved {state['identity']} x "
                f"{state['world_size']}, here {self._identity} x {self.world_size}). Resume with "
                "the recipe and data that the run was started with."
            )
        dropped = [(str(task), int(row)) for task, row in state["dropped"]]
        start = _WindowStart(
            window=int(state["window"]),
            first_row=int(state["first_row"]),
            counts={name: int(count) for name, count in state["counts"].items()},
            tally=PackingTally(report_from_state(state["report"])),
            num_dropped=len(dropped),
        )
        self._start_at(start, dropped=dropped)
        self.rows_given = int(state["rows"])
        for _ in range(self.rows_given * self.world_size - int(state["first_row"])):
            self._next_row()

    def _start_at(self, start: _WindowStart, *, dropped: Iterable[tuple[str, int]]) -> None:
        self._starts: deque[_WindowStart] = deque([start], maxlen=_KEPT_WINDOWS)
        self._window = start.window
        self._counts = dict(start.counts)
        self._tally = start.tally.copy()
        # Task and row of each draw left out. A drawn wording can be too long in one epoch and fit in
        # another.
        self._dropped = list(dropped)
        self._rows: list[_Row[RowT]] = []
        self._given_of_window = 0
        self._global_row = start.first_row
        self.rows_given = start.first_row // self.world_size

    def _next_row(self) -> RowT:
        fruitless = 0
        while self._given_of_window == len(self._rows):
            if fruitless >= _FRUITLESS_DRAWS:
                raise DataError(
                    f"None of the last {fruitless} examples drawn fits in a row of "
                    f"{self._form.room(self.config)}, or set `packing.on_too_long` to `truncate`."
                )
            self._open_window()
            fruitless = 0 if self._rows else fruitless + self.config.window
        row = self._rows[self._given_of_window].packed
        self._given_of_window += 1
        self._global_row += 1
        self._tally.add_row(row)
        return row

    def _open_window(self) -> None:
        start = _WindowStart(
            window=self._window,
            first_row=self._global_row,
            counts=dict(self._counts),
            tally=self._tally.copy(),
            num_dropped=len(self._dropped),
        )
        if self._starts[-1].window == start.window:
            self._starts.pop()
        self._starts.append(start)
        rows = self._packed(self._fitting_window())
        order = self._seeds.child("rows", self._window).numpy().permutation(len(rows))
        self._rows = [rows[position] for position in order]
        self._given_of_window = 0
        self._window += 1

    def _packed(self, examples: Sequence[Any]) -> list[_Row[RowT]]:
        """Rows of the examples, each with the hashes of those that stand in it."""
        padding = padding_id(self._tokenizer)
        return [
            _Row(
                self._form.row(row, self.config, padding=padding),
                tuple(example.content_hash for example in row),
            )
            for row in self._form.grouped(examples, self.config)
        ]

    def _fitting_window(self) -> list[Any]:
        """Draw a window; return the examples that fit in a row, and count the others."""
        draws: list[Draw] = []
        rendered: list[Rendered | None] = []
        first = self._window * self.config.window
        used_up = self._used_up()
        for index in range(first, first + self.config.window):
            draw = self.mixture.draw(index, counts=self._counts, used_up=used_up)
            draws.append(draw)
            rendered.append(self._rendered(draw))
        texts = [one for one in rendered if one is not None]
        tokenized = iter(self._tokenize_all(texts))
        examples: list[Any] = []
        for draw, one in zip(draws, rendered, strict=True):
            fitting = (
                self._without_exemplars(draw) if one is None else self._fitting(next(tokenized))
            )
            if fitting is None:
                self._dropped.append(self._place(draw))
            else:
                examples.append(fitting)
        return examples

    def _used_up(self) -> frozenset[str]:
        """Tasks whose budget of tokens the rows given so far have reached; asked between windows."""
        return frozenset(
            task.name
            for task in self.mixture.tasks
            if task.config.max_tokens is not None
            and self._tally.tokens_of(task.name) >= task.config.max_tokens
        )

    @cached_property
    def _tokenize_all(self) -> Callable[[Sequence[Rendered]], list[Any]]:
        # Every rank tokenises the same texts: one of them keeps the tokens.
        return self._form.tokenizing(self._tokenizer, self.config, writes=self.rank == 0)

    def _rendered(self, draw: Draw) -> Rendered | None:
        """Count and render a draw; None where exemplars are to be shown and not one fits."""
        task = self.mixture.tasks[draw.task]
        self._counts[task.name] = self._counts.get(task.name, 0) + 1
        example = self.mixture.example(draw)
        seeds = self.mixture.sample_seeds(draw)
        try:
            return self._form.render(
                example, task.renderer, task.name, tokenizer=self._tokenizer, seeds=seeds
            )
        except NoExemplarError:
            return None

    def _without_exemplars(self, draw: Draw) -> None:
        self._tally.add_change(self.mixture.tasks[draw.task].name, "without_exemplars")

    def _fitting(self, example: Any) -> Any | None:
        fitting, change = self._form.fitted(example, self.config)
        if change is not None:
            self._tally.add_change(example.task, change)
        return fitting

    def _place(self, draw: Draw) -> tuple[str, int]:
        return self.mixture.tasks[draw.task].name, draw.row

    def _fingerprint(self) -> str:
        tasks = [
            [task.config.to_mapping(), task.size, self.mixture.rates[task.name]]
            for task in self.mixture.tasks
        ]
        seed = [self._seeds.root, *self._seeds.path]
        packing = self._form.settings(self.config)
        return fingerprint({"tasks": tasks, "packing": packing, "seed": seed})
