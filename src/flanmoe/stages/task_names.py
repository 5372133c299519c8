"""Tasks as a command line names them: a name each, and one `--split` for all."""

from collections.abc import Sequence

from flanmoe.core.errors import ConfigError
from flanmoe.data.sources.finding import DEFAULT_SPLIT, unsplit_kind
from flanmoe.data.tasks import TaskConfig
from flanmoe.evaluation.tasks.harness import HARNESS_PREFIX


def named_tasks(names: Sequence[str], *, split: str | None, default_split: str) -> list[TaskConfig]:
    """Return the tasks of these names.

    Args:
        names: as in `TaskConfig.name`.
        split: what the user asked for, None for nothing.
        default_split: taken where nothing was asked for and the task may have splits.

    Raises:
        ConfigError: if a split is asked for, and a task has none to choose from.
    """
    return [_named(name, split, default_split) for name in names]


def _named(name: str, split: str | None, default_split: str) -> TaskConfig:
    kind = "a task of lm-eval" if name.startswith(HARNESS_PREFIX) else unsplit_kind(name)
    if kind is None:
        return TaskConfig(name=name, split=split or default_split)
    if split is not None:
        raise ConfigError(
            f"`--split` must go with tasks that have splits, but `{name}` is {kind} and has none. "
            "Leave `--split` out."
        )
    return TaskConfig(name=name, split=DEFAULT_SPLIT)
