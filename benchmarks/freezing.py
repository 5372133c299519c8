"""Forward and backward pass of a sparse model with parts frozen, and with expert dropout.

    OMP_NUM_THREADS=1 python benchmarks/freezing.py --rounds 5

One real packed row, bfloat16 autocast, router losses left out. The settings take turns on one model. Time
is that of the processor and not of the clock, so that other work on the machine hardly shows. Prints one
JSON object: for each setting the smallest number of seconds, and its ratio to nothing frozen.
"""

import argparse
import json
import time

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from flanmoe.core.seeds import SeedTree
from flanmoe.data.collate import collate
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.data.stream import PackedStream
from flanmoe.models.expert_dropout import expert_dropout
from flanmoe.models.freezing import FreezePreset, frozen
from flanmoe.models.loading import load_model, load_tokenizer
from flanmoe.models.upcycle import UpcycleConfig, upcycle

Batch = dict[str, torch.Tensor]

# Name to what is frozen and the rate of expert dropout.
SETTINGS: dict[str, tuple[list[FreezePreset], float]] = {
    "nothing": ([], 0.0),
    "gate": (["gate"], 0.0),
    "experts": (["experts"], 0.0),
    "moe": (["moe"], 0.0),
    "non_moe": (["non_moe"], 0.0),
    "attention": (["attention"], 0.0),
    "expert_dropout 0.2": ([], 0.2),
}


def real_row(reference: str, length: int) -> Batch:
    """Pack one row of the embedded instructions."""
    config = MixtureConfig.parse({"tasks": ["exemplars/mmlu_cot/*"]})
    mixture = Mixture.load(config, data_dir=None, seeds=SeedTree(0))
    packing = PackingConfig(length=length)
    stream = PackedStream(mixture, load_tokenizer(reference), packing, SeedTree(0))
    return collate([next(stream)])


def processor_seconds(model: PreTrainedModel, batch: Batch, name: str) -> float:
    """Run one forward and backward pass with a setting; returns the processor's seconds."""
    presets, rate = SETTINGS[name]
    with frozen(model, presets), expert_dropout(model, rate):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        F.cross_entropy(logits[0, :-1].float(), batch["labels"][0, 1:]).backward()
        seconds = time.process_time() - start
        model.zero_grad()
    return seconds


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="dense; it is upcycled")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    batch = real_row(arguments.model, arguments.length)
    model = upcycle(load_model(arguments.model), UpcycleConfig(), SeedTree(0)).train()
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for number in range(arguments.rounds + 1):
        for name, values in seconds.items():
            values.append(processor_seconds(model, batch, name))
            if number == 0:
                values.clear()
    smallest = {name: min(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "freezing",
                "model": arguments.model + "+upcycled-8x2-granular",
                "tokens": arguments.length,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "rounds": arguments.rounds,
                "seconds": smallest,
                "ratio": {name: value / smallest["nothing"] for name, value in smallest.items()},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
