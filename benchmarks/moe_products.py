"""Ways to do the matrix products of experts, and to add up their rows: what `CHOICES` rests on.

    python benchmarks/moe_products.py --out benchmarks/results/moe_products.json

Products are those of a first matrix and of its gradient, all experts with as many rows: one product an expert
written into place (`expert`), one batched product (`batched`), torch's grouped_mm (`grouped`), and one product
an expert on threads of Python with one thread of torch each (`threads`). Sums add 8 or 2 rows a token: expert
after expert (`added`), fetched by each token in one kernel (`bags`), or fetched and then reduced (`gathered`).
`fresh` and `reused` write the same bytes into a new tensor and into an old one. Ways take turns, round after
round. Prints a table and one JSON object of medians in milliseconds. `--tiny` shows that it runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from flanmoe.core.console import show_table

# Experts, rows of each, inputs, outputs.
PRODUCTS = (
    (8, 512, 576, 3072),
    (64, 256, 576, 512),
    (32, 128, 512, 2048),
    (128, 128, 1024, 768),
    (64, 16, 576, 512),
    (64, 1, 576, 512),
)
# Experts, experts a token, hidden size, tokens.
SUMS = ((8, 2, 576, 2048), (64, 8, 576, 2048), (128, 8, 1024, 2048))
FRESH_BYTES = (2**24, 2**26)
TINY = {"products": ((4, 8, 16, 32),), "sums": ((4, 2, 16, 24),), "fresh": (2**12,)}

Ways = dict[str, Callable[[], object]]


def turns(ways: Ways, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each way; two rounds more come first."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number >= 2:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def forward_ways(shape: tuple[int, int, int, int], pool: ThreadPoolExecutor) -> Ways:
    """Return ways to multiply rows by the matrices of their experts."""
    experts, count, inputs, outputs = shape
    rows = torch.randn(experts * count, inputs)
    matrices = torch.randn(experts, outputs, inputs).transpose(1, 2)
    out = torch.empty(experts * count, outputs)
    ends = torch.arange(count, experts * count + 1, count, dtype=torch.int32)
    parts = list(zip(rows.split(count), matrices.unbind(), out.split(count), strict=True))

    def one(part: tuple[Tensor, Tensor, Tensor]) -> None:
        torch.mm(part[0], part[1], out=part[2])

    return {
        "expert": lambda: [one(part) for part in parts],
        "batched": lambda: torch.bmm(
            rows.view(experts, count, inputs), matrices, out=out.view(experts, count, outputs)
        ),
        "grouped": lambda: F.grouped_mm(rows, matrices, offs=ends),
        "threads": lambda: list(pool.map(one, parts)),
    }


def gradient_ways(shape: tuple[int, int, int, int], pool: ThreadPoolExecutor) -> Ways:
    """Return ways to multiply columns: the gradients of matrices."""
    experts, count, inputs, outputs = shape
    rows, gradient = torch.randn(experts * count, inputs), torch.randn(experts * count, outputs)
    out = torch.empty(experts, outputs, inputs)
    ends = torch.arange(count, experts * count + 1, count, dtype=torch.int32)
    parts = list(zip(gradient.split(count), rows.split(count), out.unbind(), strict=True))

    def one(part: tuple[Tensor, Tensor, Tensor]) -> None:
        torch.mm(part[0].t(), part[1], out=part[2])

    return {
        "expert": lambda: [one(part) for part in parts],
        "batched": lambda: torch.bmm(
            gradient.view(experts, count, outputs).transpose(1, 2),
            rows.view(experts, count, inputs),
            out=out,
        ),
        "grouped": lambda: F.grouped_mm(gradient.t(), rows, offs=ends),
        "threads": lambda: list(pool.map(one, parts)),
    }


def sum_ways(shape: tuple[int, int, int, int]) -> Ways:
    """Return ways to add the rows of experts to their tokens, times gates."""
    experts, top_k, hidden, tokens = shape
    expert_ids = torch.rand(tokens, experts).topk(top_k).indices.flatten()
    order = expert_ids.argsort(stable=True)
    counts = expert_ids.bincount(minlength=experts).tolist()
    token_ids, gates = order // top_k, torch.rand(tokens, top_k)
    rows, sorted_gates = torch.randn(tokens * top_k, hidden), gates.flatten()[order].unsqueeze(1)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    scaled = torch.empty(max(counts), hidden)

    def added() -> Tensor:
        total = torch.zeros(tokens, hidden)
        own = zip(
            rows.split(counts), sorted_gates.split(counts), token_ids.split(counts), strict=True
        )
        for part, part_gates, part_tokens in own:
            product = torch.mul(part, part_gates, out=scaled[: len(part)])
            total.index_add_(0, part_tokens, product)
        return total

    def gathered() -> Tensor:
        return (rows[places].view(tokens, top_k, hidden) * gates.unsqueeze(-1)).sum(dim=1)

    return {
        "added": added,
        "bags": lambda: F.embedding_bag(
            places.view(tokens, top_k), rows, per_sample_weights=gates, mode="sum"
        ),
        "gathered": gathered,
    }


def fresh_ways(size: int) -> Ways:
    """Return ways to write so many bytes."""
    source, old = torch.ones(size // 4), torch.ones(size // 4)
    return {"fresh": source.clone, "reused": lambda: old.copy_(source)}


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure everything; threads of Python go last, since they change the number of torch's."""
    products = TINY["products"] if arguments.tiny else PRODUCTS
    found: list[dict[str, Any]] = []

    def add(what: str, shape: object, ways: Ways) -> None:
        name = ", ".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)
        found.append({"what": what, "shape": name, "ms": turns(ways, arguments.rounds)})

    with ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for shape in products:
            add("product", shape, forward_ways(shape, pool))
            add("gradient", shape, gradient_ways(shape, pool))
    for shape in TINY["sums"] if arguments.tiny else SUMS:
        add("sum", shape, sum_ways(shape))
    for size in TINY["fresh"] if arguments.tiny else FRESH_BYTES:
        add("bytes", size, fresh_ways(size))
    return found


def main() -> None:
    """Run the benchmark, print its table and its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a file for the JSON object")
    parser.add_argument("--tiny", action="store_true", help="one small shape each, two rounds")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.rounds = 2
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    results = measured(arguments)
    table = Table("", "shape", "ms")
    for result in results:
        ways = ", ".join(f"{name} {value:.2f}" for name, value in result["ms"].items())
        table.add_row(result["what"], result["shape"], ways)
    show_table(table)
    text = json.dumps(
        {
            "benchmark": "moe_products",
            "threads": threads,
            "rounds": arguments.rounds,
            "torch": torch.__version__,
            "results": results,
        },
        indent=2,
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
