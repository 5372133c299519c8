"""A linear layer under bfloat16 autocast beside float32: what `precision: auto` goes by.

    python benchmarks/precision.py --out benchmarks/results/precision.json

Forward and backward of a layer of SmolLM2's FFN shape, contenders taking turns. Prints one JSON object with
medians, the median of paired ratios (bfloat16's seconds over float32's), and whether torch reports
instructions for bfloat16.
"""

import argparse
import json
import statistics
import time
from importlib import metadata
from pathlib import Path

import torch

from flanmoe.models.precision import computes_bfloat16
from flanmoe.study.machine import hardware


def seconds(layer: torch.nn.Linear, rows: torch.Tensor, *, autocast: bool) -> float:
    """Return the seconds of one forward and backward pass."""
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = layer(rows)
    found.float().sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    layer = torch.nn.Linear(576, 1536, bias=False)
    rows = torch.randn(arguments.rows, 576, requires_grad=True)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for number in range(arguments.rounds + 1):
        for autocast in (False, True):
            found = seconds(layer, rows, autocast=autocast)
            if number:  # the first round compiles kernels
                taken[autocast].append(found)
    result = {
        "benchmark": "precision",
        "rows": arguments.rows,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "machine": hardware().to_mapping(),
        "instructions_for_bfloat16": computes_bfloat16(),
        "versions": {"torch": metadata.version("torch")},
        "seconds": {
            "float32": statistics.median(taken[False]),
            "bfloat16": statistics.median(taken[True]),
        },
        "paired_ratio": statistics.median(
            low / full for full, low in zip(taken[False], taken[True], strict=True)
        ),
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
