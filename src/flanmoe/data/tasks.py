"""Tasks: where examples come from, how they are rendered, which scorer they want."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.data.example import Example
from flanmoe.data.renderers import AUTO, Renderer, renderer_named, renderers
from flanmoe.data.rows import example_from_row
from flanmoe.data.sources.base import Source
from flanmoe.data.sources.exemplars import PREFIX, exemplar_families, exemplar_index
from flanmoe.data.sources.finding import DEFAULT_SPLIT, find_source

CHOICE_SCORER = "choice_likelihood"
REFERENCE_SCORER = "reference_likelihood"

_EVERY = "/*"


class TaskConfig(Config):
    """Which examples, and how they are shown. A plain text is read as `name`.

    Attributes:
        name: an exemplar task (`exemplars/gsm8k_cot`), all tasks of a family
            (`exemplars/mmlu_cot/*`), a folder of the data folder (`gsm8k`), a file, or a data set
            on the hub (`owner/name`).
        split: split of a folder or hub data set.
        subset: configuration of a hub data set.
        renderer: how examples become text; `auto` chooses for each example.
        rate: share of the draws, relative to the other tasks; for a family, of all its tasks
            together. Without rates, tasks are drawn by their sizes.
        cap: largest size that the task counts with when there are no rates.
        cluster: name under which results are grouped; by default the family, or the name.
        exclude: with `family/*`, names or patterns below the family that are left out.
        on_bad_record: what a record that cannot be read does: stop with an `error`, or be left out
            (`skip`) and counted in `Task.rejected`.
        group: tasks of one group share one rate; expansion sets it to the family.
    """

    name: str = Field(min_length=1)
    split: str = DEFAULT_SPLIT
    subset: str | None = None
    renderer: str = AUTO
    rate: float | None = Field(default=None, gt=0)
    cap: int | None = Field(default=None, ge=1)
    cluster: str | None = None
    exclude: tuple[str, ...] = ()
    on_bad_record: Literal["error", "skip"] = "error"
    group: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("renderer")
    @classmethod
    def _known_renderer(cls, value: str) -> str:
        try:
            renderer_named(value)
        except ConfigError as error:
            known = [AUTO, *(name.rpartition(".v")[0] for name in renderers)]
            raise ValueError(
                f"must be one of {listing(known)}, but is `{value}`.{nearest_name_hint(value, known)}"
            ) from error
        return value

    @model_validator(mode="after")
    def _exclude_needs_a_family(self) -> "TaskConfig":
        if self.exclude and not self.is_family:
            raise ValueError(
                "`exclude` only works with a family such as `exemplars/mmlu_cot/*`, but is set "
                f"for `{self.name}`"
            )
        return self

    @property
    def is_family(self) -> bool:
        """Whether the name stands for every task below it."""
        return self.name.endswith(_EVERY)

    @property
    def identity(self) -> str:
        """Name of the task in reports: `name`, with `:split` and `@renderer` if not the default."""
        subset = f"[{self.subset}]" if self.subset else ""
        split = "" if self.split == DEFAULT_SPLIT else f":{self.split}"
        renderer = "" if self.renderer == AUTO else f"@{self.renderer}"
        return f"{self.name}{subset}{split}{renderer}"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that was left out.

    Attributes:
        locator: file and line.
        reason: why it cannot be read.
    """

    locator: str
    reason: str


class Task:
    """A task, its examples read on first use.

    Args:
        config: what and how; no family.
        source: where its rows come from.
    """

    def __init__(self, config: TaskConfig, source: Source) -> None:
        self.config = config
        self.source = source
        self.name = config.identity
        self.cluster = config.cluster or _default_cluster(config.name)
        self.renderer: Renderer = renderer_named(config.renderer)

    @property
    def evaluation_only(self) -> bool:
        """True where the authors ask that nothing is trained on it."""
        return self.source.evaluation_only

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """All examples, in the order of the source.

        Raises:
            DataError: with file and line, if a record cannot be read and the config says `error`;
                or if no example is left.
        """
        return self._read[0]

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Records left out because they could not be read (with `on_bad_record: skip`)."""
        return self._read[1]

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.examples)

    @property
    def scorer(self) -> str:
        """Name of the scorer: of the choices where every example has them, else of the answer."""
        every = all(example.choices for example in self.examples)
        return CHOICE_SCORER if every else REFERENCE_SCORER

    @cached_property
    def _read(self) -> tuple[tuple[Example, ...], tuple[Rejected, ...]]:
        examples: list[Example] = []
        rejected: list[Rejected] = []
        for locator, row in self.source.rows():
            try:
                examples.append(example_from_row(row, locator))
            except DataError as error:
                if self.config.on_bad_record == "error":
                    raise
                rejected.append(Rejected(locator=str(locator), reason=str(error)))
        if not examples:
            raise DataError(_empty(self.name, rejected))
        return tuple(examples), tuple(rejected)


def num_rejected(tasks: Sequence[Task]) -> dict[str, int]:
    """Return how many records were left out of each task that lacks some."""
    return {task.name: len(task.rejected) for task in tasks if task.rejected}


def load_task(config: TaskConfig, *, data_dir: Path | None = None) -> Task:
    """Find the source of one task. Its examples are read when they are first asked for.

    Raises:
        DataError: if there is no such task; names the nearest one.
        ConfigError: if the name stands for a family (see `load_tasks`).
    """
    if config.is_family:
        raise ConfigError(
            f"One task is needed here, but `{config.name}` stands for all tasks of a family. Name "
            "one of them."
        )
    source = find_source(config.name, split=config.split, subset=config.subset, data_dir=data_dir)
    return Task(config, source)


def load_tasks(configs: Sequence[TaskConfig], *, data_dir: Path | None = None) -> list[Task]:
    """Find the sources of several tasks, families included."""
    return [load_task(config, data_dir=data_dir) for config in expand(configs)]


def expand(configs: Sequence[TaskConfig]) -> list[TaskConfig]:
    """Replace each `family/*` by one config for every task of the family.

    Raises:
        DataError: if a family is unknown, or an `exclude` leaves nothing or matches nothing.
    """
    return [single for config in configs for single in _expanded(config)]


def _expanded(config: TaskConfig) -> list[TaskConfig]:
    if not config.is_family:
        return [config]
    prefix = config.name.removesuffix("*")
    below = [name for name in exemplar_index().tasks if name.startswith(prefix)]
    if not below:
        raise DataError(_no_family(config.name))
    kept = _without(below, prefix, config.exclude)
    if not kept:
        raise DataError(f"The task `{config.name}` leaves nothing: `exclude` matches all of it.")
    shared: Mapping[str, Any] = {"exclude": (), "group": config.group or config.name}
    return [config.model_copy(update={**shared, "name": name}) for name in kept]


def _without(names: Sequence[str], prefix: str, patterns: Sequence[str]) -> list[str]:
    kept = list(names)
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name.removeprefix(prefix), pattern)]
        if not matched:
            short = [name.removeprefix(prefix) for name in names]
            raise DataError(
                f"The `exclude` pattern `{pattern}` matches no task below `{prefix}`."
                f"{nearest_name_hint(pattern, short)} Tasks: {listing(short)}."
            )
        kept = [name for name in kept if name not in matched]
    return kept


def _no_family(name: str) -> str:
    families = [family for family in exemplar_families() if family.endswith(_EVERY)]
    return (
        f"No tasks are called `{name}`.{nearest_name_hint(name, families)} `/*` works for "
        f"exemplars: {listing(families)}."
    )


def _empty(name: str, rejected: Sequence[Rejected]) -> str:
    if not rejected:
        return (
            f"The task `{name}` must hold at least one example, but its source has 0 records. "
            "Check the file."
        )
    return (
        f"The task `{name}` must hold at least one example, but none of its {len(rejected)} "
        f"records can be used; the first: {rejected[0].reason}"
    )


def _default_cluster(name: str) -> str:
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX).split("/")[0]
    return name
