"""Looking at examples as the model will see them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.text import Text

from flanmoe.core.console import console, say
from flanmoe.core.errors import DataError
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Rendered
from flanmoe.data.packing import tokenize
from flanmoe.data.sources.finding import DEFAULT_SPLIT
from flanmoe.data.tasks import Rejected, Task, TaskConfig, load_tasks
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import TuneStage
from flanmoe.stages.task_names import named_tasks
from flanmoe.study.study import load_study

_MOST_REJECTED_SHOWN = 10


def preview_task(
    name: str, *, split: str | None, number: int, model: str, data_dir: Path | None
) -> dict[str, Any]:
    """Show the first examples of a task (or of every task of a family), and what is rejected.

    `split` None takes `train` where the task has splits.
    """
    configs = named_tasks([name], split=split, default_split=DEFAULT_SPLIT)
    return {"tasks": _previews({model: configs}, number, data_dir=data_dir)}


def _previews(
    configs: Mapping[str, Sequence[TaskConfig]], number: int, *, data_dir: Path | None
) -> dict[str, Any]:
    """Show the tasks of each model once, by name; behind a name that is taken stands the model too."""
    previews: dict[str, Any] = {}
    for model, of_model in configs.items():
        # A preview is there to find bad records, so it never stops at one.
        lenient = [config.model_copy(update={"on_bad_record": "skip"}) for config in of_model]
        tasks = {task.name: task for task in load_tasks(lenient, data_dir=data_dir)}
        tokenizer = HeldModel(model).text_tokenizer()
        for name, task in tasks.items():
            title = f"{name} ({model})" if name in previews else name
            previews[title] = _preview(task, title, number, tokenizer)
    return previews


def _preview(task: Task, title: str, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    say(f"{title}: {task.size} examples, {len(task.rejected)} rejected")
    shown: list[dict[str, Any]] = []
    for example in task.examples[:number]:
        rendered = render_chat(example, task.renderer, tokenizer, task.name)
        tokens = tokenize(rendered, tokenizer)
        loss_tokens = int(tokens.loss_mask.sum())
        console.print(_panel(rendered, f"{len(tokens)} tokens, {loss_tokens} with loss"))
        shown.append(
            {
                "key": rendered.key,
                "prompt": rendered.prompt,
                "response": rendered.response,
                "tokens": len(tokens),
                "loss_tokens": loss_tokens,
            }
        )
    _show_rejected(task.rejected)
    return {
        "size": task.size,
        "rejected": len(task.rejected),
        "rejected_records": [dataclasses.asdict(record) for record in task.rejected],
        "examples": shown,
    }


def _show_rejected(rejected: Sequence[Rejected]) -> None:
    for record in rejected[:_MOST_REJECTED_SHOWN]:
        # The reason begins with the place, as every message about a record does.
        say(f"rejected: {record.reason}")
    if len(rejected) > _MOST_REJECTED_SHOWN:
        say(f"and {len(rejected) - _MOST_REJECTED_SHOWN} more; `--json` lists all")


def _panel(rendered: Rendered, size: str) -> Panel:
    text = Text()
    text.append(rendered.prompt, style="dim")
    text.append(rendered.response, style="bold green")
    return Panel(text, title=rendered.key, subtitle=size, title_align="left")


def preview_file(path: Path, *, number: int, data_dir: Path | None) -> dict[str, Any]:
    """Show the first examples of every task that a recipe or a study tunes on.

    Raises:
        DataError: if nothing is tuned in it.
    """
    configs: dict[str, list[TaskConfig]] = {}
    for arm in load_study(path).arms.values():
        for stage in arm.stages:
            if isinstance(stage, TuneStage):
                configs.setdefault(arm.model, []).extend(stage.data.tasks)
    if not configs:
        raise DataError(f"The file {path} needs a `tune` stage to preview its data, but has none.")
    return {"tasks": _previews(configs, number, data_dir=data_dir)}
