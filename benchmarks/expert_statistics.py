"""What gathering statistics of experts adds to a forward pass: the same batches with and without it.

    OMP_NUM_THREADS=2 python benchmarks/expert_statistics.py --out benchmarks/results/expert_statistics.json

Two models: a dense one upcycled to 8 experts, and a random one shaped like OLMoE (64 experts, 8 a token), its
layers and vocabulary cut. Both contenders run the same batches in evaluation mode, without a cache and with the
logits of the last position alone, and take turns in going first. `collect` is timed whole but for the hash of
the weights, which it takes once for any number of batches and is timed apart. Time is that of the processor.
Prints one JSON object: for each model the medians of seconds and of paired ratios (with over without), for
everything and with parts left out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from flanmoe.core.seeds import SeedTree
from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.models.loading import load_model
from flanmoe.models.model_hash import model_hash
from flanmoe.models.router_precision import run_routers_outside_autocast
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.statistics import StatisticsBatch, StatisticsParts, collect, held_bytes

GOAL = 1.3
GROUPS = tuple(f"task {number}" for number in range(10))
KINDS = {
    "everything": StatisticsParts(),
    "no_outputs": StatisticsParts(outputs=False),
    "no_coactivation": StatisticsParts(coactivation=False),
    "no_logit_sample": StatisticsParts(logit_sample=0),
    "routing_alone": StatisticsParts(outputs=False, coactivation=False, logit_sample=0),
}


def like_olmoe(num_layers: int, hidden_size: int) -> PreTrainedModel:
    """Return a random model with the shape of OLMoE's sparse blocks (arXiv 2409.02060, table 1)."""
    config = OlmoeConfig(
        vocab_size=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        hidden_size=hidden_size,
        intermediate_size=hidden_size // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        num_experts=64,
        num_experts_per_tok=8,
    )
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    run_routers_outside_autocast(model)
    return model.eval()


def random_batches(
    model: PreTrainedModel, number: int, rows: int, length: int
) -> list[StatisticsBatch]:
    """Return batches of random tokens, the last eighth of every row padding."""
    generator = torch.Generator().manual_seed(1)
    valid = (torch.arange(length) < length - length // 8).expand(rows, -1)
    return [
        StatisticsBatch(
            inputs={
                "input_ids": torch.randint(
                    4, model.config.vocab_size, (rows, length), generator=generator
                ),
                "attention_mask": valid.long(),
            },
            valid={"decoder": valid.flatten()},
            groups={
                "decoder": torch.randint(len(GROUPS), (rows, 1), generator=generator)
                .expand(-1, length)
                .flatten()
            },
        )
        for _ in range(number)
    ]


@torch.no_grad()
def plain(model: PreTrainedModel, batches: Sequence[StatisticsBatch]) -> None:
    """Run the batches and nothing else."""
    for batch in batches:
        model(**batch.inputs, use_cache=False, logits_to_keep=1)


def processor_seconds(run: Callable[[], object]) -> float:
    """Return the processor's seconds that a call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(
    model: PreTrainedModel, batches: Sequence[StatisticsBatch], rounds: int
) -> dict[str, dict[str, float]]:
    """Return for each kind the medians over rounds; the contenders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *KINDS)}
    for number in range(rounds + 1):
        # The first round warms up.
        order = ["plain", *KINDS] if number % 2 else [*KINDS, "plain"]
        for name in order:
            if name == "plain":
                taken = processor_seconds(lambda: plain(model, batches))
            else:
                parts = KINDS[name]
                taken = processor_seconds(
                    lambda parts=parts: collect(
                        model, batches, groups=GROUPS, data_hash="random", parts=parts
                    )
                )
            if number:
                seconds[name].append(taken)
    return {
        name: {
            "seconds": statistics.median(own),
            "ratio_median": statistics.median(
                with_it / without for without, with_it in zip(seconds["plain"], own, strict=True)
            ),
        }
        for name, own in seconds.items()
    }


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="dense; it is upcycled")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--olmoe-layers", type=int, default=4)
    parser.add_argument("--olmoe-hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("upcycled", "olmoe"), help="one of the two models")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    builders: dict[str, Callable[[], PreTrainedModel]] = {
        "upcycled": lambda: upcycle(
            load_model(arguments.model), UpcycleConfig(), SeedTree(0)
        ).eval(),
        "olmoe": lambda: like_olmoe(arguments.olmoe_layers, arguments.olmoe_hidden),
    }
    names = {
        "upcycled": f"{arguments.model}+upcycled-8x2-granular",
        "olmoe": f"random-olmoe-64x8-{arguments.olmoe_layers}-layers-{arguments.olmoe_hidden}",
    }
    models: dict[str, object] = {}
    for kind, build in builders.items():
        if arguments.only in (None, kind):
            model = build()
            batches = random_batches(model, arguments.batches, arguments.rows, arguments.length)
            with patch("flanmoe.statistics.collect.model_hash", lambda model: "0" * 24):
                kinds = measured(model, batches, arguments.rounds)
            models[names[kind]] = {
                "held_mib": held_bytes(model, len(GROUPS), StatisticsParts()).total / 2**20,
                "hash_seconds": processor_seconds(lambda model=model: model_hash(model)),
                "kinds": kinds,
            }
    result = {
        "benchmark": "expert_statistics",
        "batches": arguments.batches,
        "rows": arguments.rows,
        "length": arguments.length,
        "groups": len(GROUPS),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "goal": GOAL,
        "models": models,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
