"""Looking at examples as the model will see them."""

from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.text import Text

from flanmoe.core.console import console, say
from flanmoe.core.errors import DataError
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Rendered
from flanmoe.data.packing import tokenize
from flanmoe.data.tasks import Task, TaskConfig, expand, load_tasks
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import TuneStage
from flanmoe.study.study import load_study


def preview_task(
    name: str, *, split: str, number: int, model: str, data_dir: Path | None
) -> dict[str, Any]:
    """Show the first examples of a task (or of every task of a family)."""
    tokenizer = HeldModel(model).text_tokenizer()
    tasks = load_tasks([TaskConfig(name=name, split=split)], data_dir=data_dir)
    return {"tasks": {task.name: _preview(task, number, tokenizer) for task in tasks}}


def _preview(task: Task, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    say(f"{task.name}: {task.size} examples, {len(task.rejected)} rejected")
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
    return {"size": task.size, "rejected": len(task.rejected), "examples": shown}


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
    study = load_study(path)
    for arm in study.arms.values():
        for stage in arm.stages:
            if isinstance(stage, TuneStage):
                tokenizer = HeldModel(arm.model).text_tokenizer()
                tasks = load_tasks(expand(stage.data.tasks), data_dir=data_dir)
                return {"tasks": {task.name: _preview(task, number, tokenizer) for task in tasks}}
    raise DataError(f"The file {path} needs a `tune` stage to preview its data, but has none.")
