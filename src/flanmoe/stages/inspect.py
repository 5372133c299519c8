"""Looking at a sparse model: who goes to which expert, layer by layer and task by task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from flanmoe.core.console import progress, show_table
from flanmoe.data.chat import render_chat
from flanmoe.data.collate import collate
from flanmoe.data.packing import packed_row, tokenize
from flanmoe.data.sources.finding import DEFAULT_SPLIT
from flanmoe.data.tasks import Task, load_tasks
from flanmoe.models.blocks import require_moe_blocks
from flanmoe.models.plan import count_parameters
from flanmoe.moe.recorder import ExpertLoad, RoutingRecorder
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.task_names import named_tasks


def inspect_reference(
    reference: str, names: Sequence[str], *, split: str | None, limit: int, data_dir: Path | None
) -> dict[str, Any]:
    """Send examples of each task through a sparse model and count where its routers send them.

    `split` None takes `train` where a task has splits.

    Raises:
        ModelError: if the model is dense.
        ConfigError: if `split` has no effect.
        DataError: if a task is not known.
    """
    configs = named_tasks(names, split=split, default_split=DEFAULT_SPLIT)
    tasks = load_tasks(configs, data_dir=data_dir)
    held = HeldModel(reference)
    model = held.model().eval()
    blocks = require_moe_blocks(model)
    loads: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        loads[task.name] = _task_load(held, task, limit)
    layers = [block.layer for block in blocks]
    for name, load in loads.items():
        show_table(_load_table(name, layers, load))
    return {
        "model": reference,
        "parameters": count_parameters(model).to_mapping(),
        "num_experts": [block.num_experts for block in blocks],
        "top_k": [block.top_k for block in blocks],
        "layers": layers,
        "tasks": loads,
    }


def _task_load(held: HeldModel, task: Task, limit: int) -> list[dict[str, Any]]:
    model, tokenizer = held.model(), held.text_tokenizer()
    blocks = require_moe_blocks(model)
    load = ExpertLoad([block.num_experts for block in blocks])
    recorder = RoutingRecorder(blocks)
    examples = task.examples[:limit]
    with progress(f"  {task.name}", total=len(examples), unit="examples") as advance:
        for example in examples:
            tokens = tokenize(render_chat(example, task.renderer, tokenizer, task.name), tokenizer)
            batch = collate([packed_row([tokens], length=len(tokens))])
            load.update(_counts(model, recorder, batch))
            advance()
    return load.to_mapping()


def _counts(
    model: PreTrainedModel, recorder: RoutingRecorder, batch: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    with torch.no_grad(), recorder.recording() as layers:
        model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            logits_to_keep=1,
        )
    return [routing.expert_counts() for routing in layers]


def _load_table(name: str, layers: Sequence[int], load: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Share of assignments, % ({name})")
    table.add_column("layer", justify="right")
    num_experts = max(len(layer["fractions"]) for layer in load)
    for expert in range(num_experts):
        table.add_column(f"e{expert}", justify="right")
    table.add_column("unused", justify="right")
    table.add_column("busiest / mean", justify="right")
    for number, layer in zip(layers, load, strict=True):
        shares = [f"{100 * share:.0f}" for share in layer["fractions"]]
        padding = [""] * (num_experts - len(shares))
        unused = f"{100 * layer['unused_share']:.0f} %"
        table.add_row(str(number), *shares, *padding, unused, f"{layer['max_over_mean']:.2f}")
    return table
