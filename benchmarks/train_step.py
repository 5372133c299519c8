"""One optimizer step on packed rows: flanmoe beside transformers' own training path, in the same run.

    python benchmarks/train_step.py --model smollm2-135m-instruct --upcycle --rounds 5

Every contender does the same step (same packed rows, float32 weights, bfloat16 autocast, fused AdamW) on its
own copy of the model; contenders take turns, so that a drift of the machine falls on all of them. Prints one
JSON object with medians of seconds and tokens per second and the median of paired ratios to flanmoe.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from flanmoe.core.seeds import SeedTree
from flanmoe.data.collate import collate
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.data.stream import PackedStream
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_model, load_tokenizer
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.moe.losses import balance_loss, z_loss
from flanmoe.moe.recorder import RoutingRecorder

Batch = dict[str, torch.Tensor]
LossOf = Callable[[PreTrainedModel, Batch], torch.Tensor]


def flanmoe_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits only where the next token enters the loss; router losses per layer."""
    recorder = RoutingRecorder(moe_blocks(model))
    targets = batch["labels"][:, 1:]
    positions = (targets != -100).any(dim=0).nonzero().squeeze(1)
    with recorder.recording(valid=(batch["segment_ids"] != 0).reshape(-1)) as layers:
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            logits_to_keep=positions,
        ).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets[:, positions].flatten())
    for routing in layers:
        loss = loss + (0.01 * balance_loss(routing) + 0.001 * z_loss(routing)) / len(layers)
    return loss


def transformers_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """What transformers' Trainer computes: all logits, the model's own auxiliary loss if it is sparse."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
    extra = {"output_router_logits": True} if moe_blocks(model) else {}
    return model(**inputs, use_cache=False, **extra).loss


def contender(model: PreTrainedModel, loss_of: LossOf, batches: list[Batch]) -> Callable[[], float]:
    """Return a function that does one optimizer step and returns its seconds."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> float:
        start = time.perf_counter()
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch) / len(batches)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def build(reference: str, *, sparse: bool, experts: str) -> PreTrainedModel:
    """Load the model, upcycled if asked, with one implementation of expert compute."""
    model = load_model(reference)
    if sparse:
        model = upcycle(model, UpcycleConfig(), SeedTree(0))
        model.set_experts_implementation(experts)
    return model


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--upcycle", action="store_true", help="measure the 8-expert top-2 twin")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    batches = real_rows(arguments.model, arguments.length, arguments.rows)
    kinds: dict[str, tuple[LossOf, str]] = {"flanmoe": (flanmoe_loss, "flanmoe")}
    for experts in ("grouped_mm", "eager") if arguments.upcycle else ("none",):
        kinds[f"transformers/{experts}"] = (transformers_loss, experts)
    seconds: dict[str, list[float]] = {}
    for name, (loss_of, experts) in kinds.items():
        # One model at a time in memory; flanmoe runs again beside every peer for paired ratios.
        pair = {name: (loss_of, experts), "flanmoe": kinds["flanmoe"]}
        steps = {
            key: contender(
                build(arguments.model, sparse=arguments.upcycle, experts=kind[1]), kind[0], batches
            )
            for key, kind in pair.items()
        }
        for step in steps.values():
            step()
        for _ in range(arguments.rounds):
            for key, step in steps.items():
                seconds.setdefault(f"{key}|{name}", []).append(step())
    print(json.dumps(_result(arguments, batches, list(kinds), seconds), indent=2))


def real_rows(reference: str, length: int, rows: int) -> list[Batch]:
    """Pack a few rows of the embedded instructions."""
    config = MixtureConfig.parse({"tasks": ["exemplars/mmlu_cot/*"]})
    packing = PackingConfig(length=length)
    stream = PackedStream(
        Mixture.load(config, data_dir=None, seeds=SeedTree(0)),
        load_tokenizer(reference),
        packing,
        SeedTree(0),
    )
    return [collate([next(stream)]) for _ in range(rows)]


def _result(
    arguments: argparse.Namespace,
    batches: list[Batch],
    names: list[str],
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    found: dict[str, Any] = {}
    for name in names:
        own, ours = seconds[f"{name}|{name}"], seconds[f"flanmoe|{name}"]
        found[name] = {
            "seconds_median": statistics.median(own),
            "tokens_per_second_median": tokens / statistics.median(own),
            "ratio_to_flanmoe_median": statistics.median(
                a / b for a, b in zip(own, ours, strict=True)
            ),
        }
    return {
        "benchmark": "train_step",
        "model": arguments.model + ("+upcycled-8x2-granular" if arguments.upcycle else ""),
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "contenders": found,
    }


if __name__ == "__main__":
    main()
