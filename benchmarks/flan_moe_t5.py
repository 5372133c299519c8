"""One training step of a sparse encoder-decoder: FlanMoeT5, transformers' Switch, a dense T5 of equal FLOPs.

    python benchmarks/flan_moe_t5.py --experts 32 --out benchmarks/results/flan_moe_t5.json

Every contender has the same attention, norms, vocabulary and sparse layers (every second, one expert of the
FFN's width for a token; `top_2` has two of half the width), random weights, float32, random tokens of full
length, and does forward, backward and a fused AdamW step. Sparse ones compute balance and z-loss, each as its
own code does. transformers' Switch gets room for every token, so that all compute the same. Contenders take
turns after a step that is not timed; their peak memory is that of processes of their own. Prints one JSON
object: medians of seconds, medians of paired ratios to FlanMoeT5 with one expert a token (above 1: slower
than it), peak memory.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from flanmoe.core.memory import peak_memory_bytes
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.moe.losses import balance_loss, z_loss
from flanmoe.moe.recorder import RoutingRecorder

Batch = dict[str, torch.Tensor]
OURS = "flanmoe/switch"
HEAD_SIZE = 64


def shape(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all contenders share."""
    return {
        "vocab_size": arguments.vocabulary,
        "d_model": arguments.hidden,
        "d_kv": HEAD_SIZE,
        "d_ff": arguments.width,
        "num_layers": arguments.layers,
        "num_decoder_layers": arguments.layers,
        "num_heads": arguments.hidden // HEAD_SIZE,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }


def ours(
    arguments: argparse.Namespace, router: dict[str, Any], width: int
) -> FlanMoeT5ForConditionalGeneration:
    """Return a FlanMoeT5 with one router on both sides."""
    values = shape(arguments) | {
        "feed_forward_proj": "relu",
        "tied_head": True,
        "scale_decoder_outputs": True,
        "encoder_router": router,
        "decoder_router": router,
        "expert_width": width,
    }
    return FlanMoeT5ForConditionalGeneration(FlanMoeT5Config(**values))


def native_switch(arguments: argparse.Namespace) -> PreTrainedModel:
    """Return transformers' Switch of the same shape, with room for every token."""
    values = shape(arguments) | {
        "num_sparse_encoder_layers": arguments.layers // 2,
        "num_sparse_decoder_layers": arguments.layers // 2,
        "num_experts": arguments.experts,
        "expert_capacity": 2**31 - 1,
        "router_jitter_noise": 0.0,
    }
    return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**values))


def builders(arguments: argparse.Namespace) -> dict[str, Callable[[], PreTrainedModel]]:
    """Return how to make each contender."""
    number = arguments.experts
    one = {"kind": "switch.v1", "num_experts": number, "capacity": {"train": None}}
    two = {"kind": "top_k.v1", "num_experts": 2 * number, "top_k": 2}
    dense = shape(arguments) | {"feed_forward_proj": "relu"}
    return {
        OURS: lambda: ours(arguments, one, arguments.width),
        "flanmoe/top_2": lambda: ours(arguments, two, arguments.width // 2),
        "transformers/switch": lambda: native_switch(arguments),
        "transformers/t5 dense": lambda: T5ForConditionalGeneration(T5Config(**dense)),
    }


def loss_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return cross-entropy and router losses."""
    if isinstance(model, SwitchTransformersForConditionalGeneration):
        return model(**batch, use_cache=False, output_router_logits=True).loss
    recorder = RoutingRecorder(moe_blocks(model))
    with recorder.recording() as layers:
        loss = model(**batch, use_cache=False).loss
    for routing in layers:
        loss = loss + (0.01 * balance_loss(routing) + 0.001 * z_loss(routing)) / len(layers)
    return loss


def stepper(model: PreTrainedModel, batch: Batch) -> Callable[[], float]:
    """Return a function that does one step and returns its seconds."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> float:
        start = time.perf_counter()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def tokens(arguments: argparse.Namespace) -> Batch:
    """Return a batch without padding."""
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> torch.Tensor:
        return torch.randint(2, arguments.vocabulary, (arguments.rows, length), generator=generator)

    return {"input_ids": drawn(arguments.length), "labels": drawn(arguments.target_length)}


def peak_of(name: str, arguments: argparse.Namespace) -> int:
    """Return the peak memory of two steps of one contender, less what was there before it was built."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(said.strip().splitlines()[-1])


def measure_peak(arguments: argparse.Namespace) -> None:
    """Print what `peak_of` reads."""
    before = peak_memory_bytes()
    torch.manual_seed(0)
    step = stepper(builders(arguments)[arguments.peak_of](), tokens(arguments))
    step()
    step()
    print(peak_memory_bytes() - before)


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4, help="of each side")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--target-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        measure_peak(arguments)
        return
    seconds: dict[str, list[float]] = {}
    made = builders(arguments)
    batch = tokens(arguments)
    torch.manual_seed(0)
    steps = {name: stepper(build(), batch) for name, build in made.items()}
    for step in steps.values():
        step()
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            seconds.setdefault(name, []).append(step())
    result = {
        "benchmark": "flan_moe_t5",
        **{name: value for name, value in vars(arguments).items() if isinstance(value, int)},
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "results": {
            name: {
                "seconds_median": statistics.median(seconds[name]),
                "ratio_to_flanmoe_median": statistics.median(
                    a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)
                ),
                "parameters": sum(p.numel() for p in made[name]().parameters()),
                "peak_memory_bytes": peak_of(name, arguments),
            }
            for name in made
        },
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
