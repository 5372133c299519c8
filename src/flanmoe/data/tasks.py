"""Tasks: where examples come from, how they are rendered, which scorer they want."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Int
from pydantic import Field, field_validator, model_validator

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.core.seeds import SeedTree
from flanmoe.data.catalogue import known_set
from flanmoe.data.chosen import Chosen
from flanmoe.data.example import Example
from flanmoe.data.renderers import AUTO, Renderer, renderer_named, renderers
from flanmoe.data.renderers.template import AUTO_FAMILY, TemplateConfig, TemplateRenderer
from flanmoe.data.sources.base import Source
from flanmoe.data.sources.exemplars import PREFIX, exemplar_families, exemplar_index
from flanmoe.data.sources.finding import DEFAULT_SPLIT, find_source, resolve_data_dir
from flanmoe.data.store import ExampleStore, example_store
from flanmoe.data.store import Rejected as Rejected
from flanmoe.data.templates.flan import FLAN_PREFIX
from flanmoe.data.templates.folder import families

CHOICE_SCORER = "choice_likelihood"
REFERENCE_SCORER = "reference_likelihood"

_EVERY = "/*"

_Item = TypeVar("_Item")


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
        cap_by: field of the records whose values are tasks of their own (`task` of P3): `cap` holds for each
            of them.
        max_examples: keep so many examples, drawn once: the same in every run and for every seed, those of a
            smaller number among those of a larger one. For few-shot training.
        max_tokens: budget of tokens, prompts included. Once the rows trained on hold as many of it, the task
            is drawn no more, and the others share its rate.
        cluster: name under which results are grouped; by default the family, or the name.
        labels: names of a classification's labels in words, in the order in which they are offered
            (`{entailment: "yes", contradiction: "no"}`); they become the choices.
        template: wordings, exemplars and option styles that are drawn for each sample; in place of
            `renderer`.
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
    cap_by: str | None = None
    max_examples: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    cluster: str | None = None
    labels: dict[str, str] | None = Field(default=None, min_length=2)
    template: TemplateConfig | None = None
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

    @model_validator(mode="after")
    def _a_cap_to_apply(self) -> "TaskConfig":
        if self.cap_by is not None and self.cap is None:
            raise ValueError(f"`cap_by` needs a `cap` to apply, but found only `{self.cap_by}`")
        return self

    @model_validator(mode="after")
    def _one_way_to_render(self) -> "TaskConfig":
        if self.template is not None and self.renderer != AUTO:
            raise ValueError(
                f"`template` takes the place of `renderer`, but both are set (`{self.renderer}`); take "
                "one out"
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
        named = self.template.family if self.template else self.renderer
        renderer = "" if named == AUTO else f"@{named}"
        return f"{self.name}{subset}{split}{renderer}"


def without_format(identity: str) -> str:
    """Return the identity of a task without how it is put: `snips:test@intent` is `snips:test`."""
    return identity.partition("@")[0]


_AnyTask = TypeVar("_AnyTask", bound=TaskConfig)


def worded(task: _AnyTask, template: TemplateConfig | None) -> _AnyTask:
    """Return a task with a template, where it names neither a template nor a renderer of its own."""
    has_own = task.template is not None or task.renderer != AUTO
    if template is None or has_own:
        return task
    return task.model_copy(update={"template": template})


class Task:
    """A task, its examples read on first use.

    Args:
        config: what and how; no family.
        source: where its rows come from.
        exemplars: the task whose examples are shown before a question; None for the task itself.
    """

    def __init__(
        self, config: TaskConfig, source: Source, *, exemplars: "Task | None" = None
    ) -> None:
        self.config = config
        self.source = source
        self._exemplars = exemplars
        self._num_removed = 0
        self.name = config.identity
        self.cluster = config.cluster or _default_cluster(config.name)

    @cached_property
    def renderer(self) -> Renderer:
        """What turns an example of this task into text.

        Raises:
            DataError: if its template family is not known or needs a field that examples lack.
        """
        if self.config.template is None:
            return renderer_named(self.config.renderer)
        pool = self if self._exemplars is None else self._exemplars
        return TemplateRenderer(self.config.template, self.name, pool.examples)

    @property
    def evaluation_only(self) -> bool:
        """True where the authors ask that nothing is trained on it."""
        return self.source.evaluation_only

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where its rows come from, and those of the exemplars shown before a question if that is elsewhere."""
        return (self.source,) if self._exemplars is None else (self.source, self._exemplars.source)

    @property
    def examples(self) -> Sequence[Example]:
        """All examples, in the order of the source; of large sources each is read when it is asked for.

        Raises:
            DataError: with file and line, if a record cannot be read and the config says `error`;
                or if no example is left.
            DiskError: if they are to be kept in the cache and it cannot be written.
        """
        return self._chosen(self._store.examples)

    def without(self, rows: Int[np.ndarray, " R"]) -> "Task":
        """Return this task without some rows of it; exemplars come from the others too.

        Args:
            rows: positions in `examples`.

        Raises:
            DataError: if nothing would be left.
        """
        if len(rows) == self.size:
            raise DataError(
                f"The task `{self.name}` has no example left: all {self.size} are left out."
            )
        task = Task(self.config, self.source, exemplars=self._exemplars)
        before = np.arange(len(self._store.examples)) if self._kept is None else self._kept
        task._kept = np.delete(before, rows)
        task._num_removed = self._num_removed + len(rows)
        return task

    @property
    def content_hashes(self) -> Sequence[str]:
        """The content hash of every example, without reading it."""
        return self._chosen(self._store.content_hashes)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Records left out because they could not be read (with `on_bad_record: skip`)."""
        return self._store.rejected

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self._store.examples) if self._kept is None else len(self._kept)

    @property
    def num_left_out(self) -> int:
        """Examples that were left out on request (`without`)."""
        return self._num_removed

    @property
    def scorer(self) -> str:
        """Name of the scorer: of the choices where every example has them, else of the answer."""
        return CHOICE_SCORER if self._store.all_have_choices else REFERENCE_SCORER

    def _chosen(self, items: Sequence[_Item]) -> Sequence[_Item]:
        return items if self._kept is None else Chosen(items, self._kept)

    @cached_property
    def _kept(self) -> Int[np.ndarray, " K"] | None:
        """Rows of the source that are used, None for all."""
        number, total = self.config.max_examples, len(self._store.examples)
        if number is None or number >= total:
            return None
        draws = SeedTree(0).child("max_examples").child(self.config.name).numpy()
        return np.sort(draws.permutation(total)[:number])

    @cached_property
    def _store(self) -> ExampleStore:
        labels, on_bad_record = self.config.labels, self.config.on_bad_record
        store = example_store(self.source, labels=labels, on_bad_record=on_bad_record)
        if not store.examples:
            raise DataError(_empty(self.name, store.rejected))
        return store


def rows_of_parts(task: Task, field: str) -> dict[str, list[int]]:
    """Return the rows of every task that a data set holds, in the order in which they first come.

    Args:
        task: the data set.
        field: field of its records whose values are tasks of their own (`KnownSet.tasks_field`).

    Raises:
        DataError: if a record lacks the field.
    """
    rows: dict[str, list[int]] = {}
    for row, example in enumerate(task.examples):
        value = example.fields.get(field)
        if not value:
            raise DataError(
                f"Each record of `{task.name}` must say in `{field}` which task it belongs to, but "
                f"`{example.key}` does not. Add the field, or leave the record out."
            )
        rows.setdefault(value, []).append(row)
    return rows


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
    config = _with_flan_folder(with_catalogue(config), data_dir)
    source = find_source(config.name, split=config.split, subset=config.subset, data_dir=data_dir)
    return Task(config, source, exemplars=_exemplar_task(config, data_dir))


def with_catalogue(config: TaskConfig) -> TaskConfig:
    """Return the config with what it leaves out taken from the catalogue's entry of its data set.

    Raises:
        ConfigError: if the family of its template is `auto` and there is no entry.
    """
    entry, template = known_set(config.name), config.template
    if template is not None and template.family == AUTO_FAMILY:
        if entry is None:
            raise ConfigError(
                f"The data set `{config.name}` needs a `template.family`, because the catalogue does not "
                f"know it. Families: {listing(families(template.folder))}."
            )
        template = template.model_copy(update={"family": entry.family})
    if entry is None:
        return config
    if template is not None and template.family == entry.family:
        template = template.model_copy(update={"fields": {**entry.fields, **template.fields}})
    missing = {
        "cluster": config.cluster or entry.cluster,
        "labels": config.labels or entry.labels,
        "template": template,
    }
    return config.model_copy(update=missing)


def _with_flan_folder(config: TaskConfig, data_dir: Path | None) -> TaskConfig:
    """FLAN's own templates lie in the data folder, where no other folder is named."""
    template = config.template
    if template is None or template.folder or not template.family.startswith(FLAN_PREFIX):
        return config
    found = template.model_copy(update={"folder": resolve_data_dir(data_dir)})
    return config.model_copy(update={"template": found})


def _exemplar_task(config: TaskConfig, data_dir: Path | None) -> Task | None:
    """The split that exemplars come from, where it is another one: a question never shows its own split."""
    template = config.template
    if template is None or not template.few_shot_share or config.split == template.exemplar_split:
        return None
    shown = config.model_copy(update={"split": template.exemplar_split})
    source = find_source(shown.name, split=shown.split, subset=shown.subset, data_dir=data_dir)
    return Task(shown, source)


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
