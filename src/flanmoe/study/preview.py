"""Looking at examples as the model will see them."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.text import Text

from flanmoe.core.console import console, say
from flanmoe.core.errors import DataError
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Example, Rendered
from flanmoe.data.renderers.template import NoExemplarError
from flanmoe.data.statistics import Length, length_of
from flanmoe.data.tasks import Rejected, Task
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.stages.held_model import HeldModel
from flanmoe.study.data_groups import DataGroup, group_of_task, groups_of_file

_MOST_REJECTED_SHOWN = 10
# Of a longer text the beginning and the end are shown.
_MOST_CHARACTERS_SHOWN = 4000


@dataclasses.dataclass(frozen=True, slots=True)
class PreviewConfig:
    """How much is shown.

    Attributes:
        number: examples of each task.
        all_rejected: show every rejected record and not just the first ten.
    """

    number: int = 10
    all_rejected: bool = False


def preview_task(
    name: str, *, split: str | None, model: str, shown: PreviewConfig, data_dir: Path | None
) -> dict[str, Any]:
    """Show the first examples of a task (or of every task of a family), and what is rejected.

    `split` None takes `train` where the task has splits.
    """
    group = group_of_task(name, split=split, model=model)
    return {"tasks": _previews([group], shown, data_dir=data_dir)}


def preview_file(path: Path, *, shown: PreviewConfig, data_dir: Path | None) -> dict[str, Any]:
    """Show the first examples of every task that a recipe or a study tunes on.

    Raises:
        DataError: if nothing is tuned in it.
    """
    groups = [group for group in groups_of_file(path) if group.use == "tuned"]
    if not groups:
        raise DataError(f"The file {path} needs a `tune` stage to preview its data, but has none.")
    return {"tasks": _previews(groups, shown, data_dir=data_dir)}


def _previews(
    groups: Sequence[DataGroup], shown: PreviewConfig, *, data_dir: Path | None
) -> dict[str, Any]:
    """Show the tasks of each model once, by name; behind a name that is taken stands the model too."""
    previews: dict[str, Any] = {}
    for model, tasks in _tasks_by_model(groups, data_dir).items():
        tokenizer = HeldModel(model).text_tokenizer()
        for name, task in tasks.items():
            title = f"{name} ({model})" if name in previews else name
            previews[title] = _preview(task, title, shown, tokenizer)
    return previews


def _tasks_by_model(
    groups: Sequence[DataGroup], data_dir: Path | None
) -> Mapping[str, dict[str, Task]]:
    tasks: dict[str, dict[str, Task]] = {}
    for group in groups:
        found, _ = group.load(data_dir)
        tasks.setdefault(group.model, {}).update({task.name: task for task in found})
    return tasks


def _preview(task: Task, title: str, shown: PreviewConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    say(f"{title}: {task.size} examples, {len(task.rejected)} rejected")
    samples = [_sample(example, task, tokenizer) for example in islice(task.examples, shown.number)]
    _show_rejected(task.rejected, shown)
    return {
        "size": task.size,
        "rejected": len(task.rejected),
        "rejected_records": [dataclasses.asdict(record) for record in task.rejected],
        "examples": [sample for sample in samples if sample is not None],
        "without_exemplars": samples.count(None),
    }


def _sample(example: Example, task: Task, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Show one sample; None for one that is left out of training, since no exemplar fits before it."""
    try:
        rendered = render_chat(example, task.renderer, tokenizer, task.name)
    except NoExemplarError as error:
        say(f"left out: {error}")
        return None
    length = length_of(rendered, tokenizer)
    _show(rendered, length)
    return {
        "key": rendered.key,
        "prompt": rendered.prompt,
        "response": rendered.response,
        "tokens": length.tokens,
        "loss_tokens": length.response_tokens,
    }


def _show(rendered: Rendered, length: Length) -> None:
    size = f"{length.tokens} tokens, {length.response_tokens} with loss"
    if console.is_terminal:
        console.print(_panel(rendered, size))
        return
    say(f"--- {rendered.key}: {size}")
    say("[prompt]")
    say(_shortened(rendered.prompt).rstrip("\n"))
    say("[response, with loss]")
    say(_shortened(rendered.response))


def _panel(rendered: Rendered, size: str) -> Panel:
    text = Text()
    text.append(_shortened(rendered.prompt), style="dim")
    text.append(_shortened(rendered.response), style="bold green")
    return Panel(text, title=Text(rendered.key), subtitle=size, title_align="left")


def _shortened(text: str) -> str:
    left_out = len(text) - _MOST_CHARACTERS_SHOWN
    if left_out <= 0:
        return text
    half = _MOST_CHARACTERS_SHOWN // 2
    return f"{text[:half]}\n... {left_out:,} characters are not shown; `--json` has all ...\n{text[-half:]}"


def _show_rejected(rejected: Sequence[Rejected], shown: PreviewConfig) -> None:
    most = len(rejected) if shown.all_rejected else _MOST_REJECTED_SHOWN
    for record in rejected[:most]:
        # The reason begins with the place, as every message about a record does.
        say(f"rejected: {record.reason}")
    if len(rejected) > most:
        say(f"and {len(rejected) - most} more; `--json` lists all, `--all-rejected` shows all")
