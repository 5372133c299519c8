"""Saved models and tasks to inspect, and what experts do, counted one example at a time."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flanmoe.data.chat import render_chat
from flanmoe.data.tasks import Task
from flanmoe.data.text_to_text import render_text_to_text
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.loading import load_model
from flanmoe.moe.routing import Routing
from flanmoe.testing.tiny_models import tiny_model, tiny_text_tokenizer, tiny_tokenizer

NUMBERS = [{"question": f"What is {n} + {n * n}?", "answer": str(n + n * n)} for n in range(2, 11)]
WORDS = [
    {"question": f"Say {'la ' * n}backwards, please.", "answer": f"{' al' * n}!"}
    for n in range(1, 8)
]


def data_folder(folder: Path) -> Path:
    """Write two data sets and an empty one."""
    for name, rows in (("numbers", NUMBERS), ("words", WORDS), ("nothing", [])):
        (folder / name).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "train.jsonl").write_text(lines)
    return folder


def saved_decoder(folder: Path, name: str, **overrides: Any) -> Path:
    """Save a tiny decoder with its tokenizer."""
    tiny_model(name, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved_flan_moe_t5(folder: Path, **routers: Any) -> Path:
    """Save a tiny FlanMoeT5 with its tokenizer; both sides have two layers, the second one sparse."""
    top_two = {"kind": "top_k.v1", "top_k": 2}
    sides = {
        "encoder_router": {**top_two, "num_experts": 5},
        "decoder_router": {**top_two, "num_experts": 4},
    }
    config = FlanMoeT5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **(sides | routers)
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = FlanMoeT5ForConditionalGeneration(config).eval()
        for name, weight in model.named_parameters():
            if "router" in name:
                # Drawn small, routers hardly tell tokens apart.
                weight.data *= 20
    model.save_pretrained(folder)
    tiny_text_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Counted:
    """What one sparse layer did with the tokens of one task."""

    tokens: int = 0
    counts: Counter[int] = field(default_factory=Counter[int])
    mass: Counter[int] = field(default_factory=Counter[int])
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter[tuple[int, int]])
    confidence: float = 0.0
    entropy: float = 0.0


def routed_tokens(returned: Any) -> Iterator[tuple[list[float], dict[int, float]]]:
    """Yield for each token its router logits, and its experts with their gates."""
    if isinstance(returned, Routing):
        for token, logits in enumerate(returned.logits.tolist()):
            own = (returned.token_ids == token).nonzero()[:, 0].tolist()
            yield logits, {int(returned.expert_ids[n]): float(returned.gates[n]) for n in own}
        return
    logits, gates, experts = (part.reshape(-1, part.shape[-1]).tolist() for part in returned)
    for row, weights, chosen in zip(logits, gates, experts, strict=True):
        yield row, dict(zip(chosen, weights, strict=True))


def add(found: Counted, returned: Any) -> None:
    """Count the tokens of one pass."""
    for logits, experts in routed_tokens(returned):
        probabilities = torch.tensor(logits, dtype=torch.float64).softmax(dim=0)
        found.tokens += 1
        found.confidence += float(probabilities.max())
        found.entropy -= sum(p * math.log(p) for p in probabilities.tolist())
        for expert, gate in experts.items():
            found.counts[expert] += 1
            found.mass[expert] += gate
            for other in experts:
                if expert < other:
                    found.pairs[expert, other] += 1


def passes(model: PreTrainedModel, task: Task) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what the model is given for each example of a task, one at a time, without padding."""
    if model.config.is_encoder_decoder:
        tokenizer = tiny_text_tokenizer()
        for example in task.examples:
            shown = render_text_to_text(example, task.renderer, task.name, count_tokens=len)
            target = tokenizer(shown.response)["input_ids"]
            yield {
                "input_ids": torch.tensor([tokenizer(shown.prompt)["input_ids"]]),
                "decoder_input_ids": torch.tensor([[0, *target[:-1]]]),
            }
        return
    tokenizer = tiny_tokenizer()
    for example in task.examples:
        text = render_chat(example, task.renderer, tokenizer, task.name).text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield {"input_ids": torch.tensor([ids])}


def counted(folder: Path, task: Task, routers: list[str]) -> list[Counted]:
    """Count what the routers of these names do with all examples of a task."""
    model = load_model(str(folder))
    found = [Counted() for _ in routers]
    for name, own in zip(routers, found, strict=True):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _arguments, returned, own=own: add(own, returned)
        )
    with torch.no_grad():
        for inputs in passes(model, task):
            model(**inputs, use_cache=False)
    return found
