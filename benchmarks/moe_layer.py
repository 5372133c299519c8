"""One sparse layer's experts: flanmoe, transformers' ways, its Switch layer, st-moe-pytorch, a dense FFN.

    python benchmarks/moe_layer.py --out benchmarks/results/moe_layer.json
    python benchmarks/moe_layer.py --device cuda --out benchmarks/results/moe_layer_NAME.json

A shape is a number of experts, of experts a token, a hidden size, an expert width and a number of tokens. All
that compute gated experts (SiLU) have the same weights and the same random choices; the dense FFN has the
same activation and top-k times the width, so the same FLOPs. transformers' Switch has no gate: it is compared
with flanmoe's experts without a gate, both 1.5 times as wide, at top-1. st-moe-pytorch routes by itself, with
room for all choices on average, in float32, from top-2 on; its layer is timed with its router. `flanmoe, kept`
keeps activations instead of computing them again. On CUDA flanmoe's Triton kernels take part, and ScatterMoE
and sonic-moe where they are installed (`cuda_peers.py`). `products` is the six matrix
products of the experts alone, written into place. Contenders take turns, round after round; a step is a forward
and a backward pass to inputs, gates and weights.

Memory is what tensors hold, as the allocator reports it. `saved`: alive after a forward pass that a backward
pass may follow, without the output. `peak`: the most during forward and backward, without the gradients that
are left behind at the end. On the CPU this is read from torch's profiler.

Prints a table and one JSON object: medians of seconds, medians of paired ratios to the dense FFN, memory, and
what was to be reached. `--tiny` runs one small shape for two rounds; its figures mean nothing.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

# Shapes are checked in tests; here the checks would be timed.
os.environ.setdefault("FLANMOE_CHECK_SHAPES", "0")

import torch
from cuda_peers import cuda_peers
from rich.table import Table
from st_moe_pytorch import MoE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from flanmoe.core.console import show_table
from flanmoe.moe.compute import FusedExperts, Gated, Plain, expert_ffn, product_path

OURS, DENSE = "flanmoe", "dense"
OURS_KEEPING, OURS_TRITON = "flanmoe, kept", "flanmoe, Triton"
OURS_UNGATED = "flanmoe, no gate"
SWITCH, ST_MOE, PRODUCTS = "transformers Switch", "st-moe-pytorch", "products"
TRANSFORMERS = {"transformers eager": "eager", "transformers grouped_mm": "grouped_mm"}
UNGATED_WIDTH = 1.5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a layer, and how much slower than the dense FFN it may be."""

    experts: int
    top_k: int
    hidden: int
    width: int
    tokens: int
    goal: float | None = None

    @property
    def name(self) -> str:
        """How results call it."""
        return ", ".join(
            str(value) for value in (self.experts, self.top_k, self.hidden, self.width, self.tokens)
        )


CPU_SHAPES = (
    Shape(8, 2, 576, 1536, 2048, goal=1.08),
    Shape(8, 2, 1024, 3584, 1024, goal=1.12),
    Shape(64, 8, 576, 256, 2048, goal=1.30),
    Shape(32, 1, 512, 1024, 4096, goal=1.25),
    Shape(128, 8, 1024, 384, 2048),
)
# Layers of Mixtral-8x7B, Qwen3-30B-A3B and OLMoE; the goal is 0.75 of the dense rate.
CUDA_SHAPES = (
    Shape(8, 2, 4096, 14336, 16384, goal=1 / 0.75),
    Shape(128, 8, 2048, 768, 16384, goal=1 / 0.75),
    Shape(64, 8, 2048, 1024, 16384, goal=1 / 0.75),
)
TINY = (Shape(4, 1, 16, 32, 24, goal=1.0), Shape(4, 2, 16, 32, 24, goal=1.0))


class Contender(NamedTuple):
    """What takes turns: a forward pass, and what a step differentiates; None without a backward pass."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor] | None


class Inputs(NamedTuple):
    """What all contenders of one shape and dtype share."""

    hidden: Tensor
    expert_ids: Tensor
    gates: Tensor
    gate_up: nn.Parameter
    down: nn.Parameter


def inputs_of(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Draw hidden states, choices and weights."""
    torch.manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    scores = torch.randn(shape.tokens, shape.experts, device=device).softmax(dim=-1)
    gates, expert_ids = scores.topk(shape.top_k)
    return Inputs(
        hidden=drawn(shape.tokens, shape.hidden).requires_grad_(),
        expert_ids=expert_ids,
        gates=(gates / gates.sum(dim=-1, keepdim=True)).to(dtype).requires_grad_(),
        gate_up=nn.Parameter(0.02 * drawn(shape.experts, 2 * shape.width, shape.hidden)),
        down=nn.Parameter(0.02 * drawn(shape.experts, shape.hidden, shape.width)),
    )


def ours(inputs: Inputs, **options: Any) -> Contender:
    """Return flanmoe's expert compute."""
    experts = FusedExperts(inputs.gate_up, inputs.down, Gated("silu"), **options)
    return Contender(
        lambda: expert_ffn(inputs.hidden, inputs.expert_ids, inputs.gates, experts),
        inputs_leaves(inputs),
    )


def inputs_leaves(inputs: Inputs) -> Sequence[Tensor]:
    """Return everything that a step differentiates."""
    return (inputs.hidden, inputs.gates, inputs.gate_up, inputs.down)


def native(implementation: str, shape: Shape, inputs: Inputs) -> Contender:
    """Return transformers' Mixtral experts with the shared weights."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation  # pyright: ignore[reportPrivateUsage]
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = inputs.gate_up, inputs.down
    return Contender(
        lambda: module(inputs.hidden, inputs.expert_ids, inputs.gates), inputs_leaves(inputs)
    )


def dense(shape: Shape, inputs: Inputs) -> Contender:
    """Return a dense FFN of the same FLOPs."""
    width, like = shape.top_k * shape.width, inputs.hidden
    first = nn.Parameter(0.02 * torch.randn(2 * width, shape.hidden).to(like))
    second = nn.Parameter(0.02 * torch.randn(shape.hidden, width).to(like))

    def forward() -> Tensor:
        gate, up = F.linear(like, first).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, second)

    return Contender(forward, (like, first, second))


def ungated(shape: Shape, inputs: Inputs) -> dict[str, Contender]:
    """Return transformers' Switch experts and ours without a gate."""
    width = int(UNGATED_WIDTH * shape.width)
    config = SwitchTransformersConfig(
        d_model=shape.hidden, d_ff=width, num_experts=shape.experts, dropout_rate=0.0
    )
    module = SwitchTransformersExperts(config).to(inputs.hidden)
    chosen = F.one_hot(inputs.expert_ids, shape.experts)
    first = nn.Parameter(torch.stack([expert.wi.weight.detach() for expert in module.values()]))
    second = nn.Parameter(torch.stack([expert.wo.weight.detach() for expert in module.values()]))
    experts = FusedExperts(first, second, Plain("relu"))
    return {
        SWITCH: Contender(
            lambda: module(inputs.hidden, chosen, inputs.gates),
            (inputs.hidden, inputs.gates, *module.parameters()),
        ),
        OURS_UNGATED: Contender(
            lambda: expert_ffn(inputs.hidden, inputs.expert_ids, inputs.gates, experts),
            (inputs.hidden, inputs.gates, first, second),
        ),
    }


def st_moe(shape: Shape, inputs: Inputs) -> Contender:
    """Return st-moe-pytorch's layer, router included."""
    layer = MoE(
        shape.hidden,
        num_experts=shape.experts,
        expert_hidden_mult=UNGATED_WIDTH * shape.width / shape.hidden,
        gating_top_n=shape.top_k,
        threshold_train=0.0,
        threshold_eval=0.0,
        capacity_factor_train=float(shape.top_k),
        capacity_factor_eval=float(shape.top_k),
    ).to(inputs.hidden)
    leaves = [p for p in layer.parameters() if p.requires_grad]
    return Contender(lambda: layer(inputs.hidden[None])[0][0], (inputs.hidden, *leaves))


def products(shape: Shape, inputs: Inputs) -> Contender:
    """Return the six products of every expert alone, in a forward pass of their own."""
    hidden = inputs.hidden.detach()
    counts = inputs.expert_ids.flatten().bincount(minlength=shape.experts).tolist()
    first, second = inputs.gate_up.detach(), inputs.down.detach()
    of_first, of_second = torch.empty_like(first), torch.empty_like(second)
    most = max(counts)
    rows, inner, product = (
        torch.randn(most, width).to(hidden)
        for width in (shape.hidden, shape.width, 2 * shape.width)
    )
    places = [torch.empty_like(tensor) for tensor in (rows, inner, product)]

    def forward() -> Tensor:
        for expert, count in enumerate(counts):
            if not count:
                continue
            x, h, p = rows[:count], inner[:count], product[:count]
            torch.mm(x, first[expert].t(), out=places[2][:count])
            torch.mm(h, second[expert].t(), out=places[0][:count])
            if torch.is_grad_enabled():
                torch.mm(x, second[expert], out=places[1][:count])
                torch.mm(x.t(), h, out=of_second[expert])
                torch.mm(p, first[expert], out=places[0][:count])
                torch.mm(p.t(), x, out=of_first[expert])
        return places[0]

    return Contender(forward, None)


def contenders_of(shape: Shape, inputs: Inputs, skipped: Sequence[str]) -> dict[str, Contender]:
    """Return all that can compute a shape."""
    found = {
        DENSE: dense(shape, inputs),
        OURS: ours(inputs),
        OURS_KEEPING: ours(inputs, keep_activation=True),
    }
    for name, implementation in TRANSFORMERS.items():
        found[name] = native(implementation, shape, inputs)
    found[PRODUCTS] = products(shape, inputs)
    if shape.top_k == 1:
        found |= ungated(shape, inputs)
    elif inputs.hidden.dtype == torch.float32:
        found[ST_MOE] = st_moe(shape, inputs)
    if inputs.hidden.is_cuda:
        found[OURS_TRITON] = ours(inputs, kernels="triton")
        peers = cuda_peers(
            inputs.hidden,
            inputs.expert_ids,
            inputs.gates,
            num_experts=shape.experts,
            width=shape.width,
        )
        found |= {name: Contender(*peer) for name, peer in peers.items()}
    return {name: contender for name, contender in found.items() if name not in skipped}


def step(contender: Contender) -> None:
    """Do a forward and a backward pass, and forget the gradients."""
    if contender.leaves is None:
        contender.forward()
        return
    output = contender.forward()
    torch.autograd.backward(output, torch.ones_like(output))
    for leaf in contender.leaves:
        leaf.grad = None


def seconds_of(function: Callable[[], object], device: str) -> float:
    """Return how long a call takes."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def forward_only(contender: Contender) -> None:
    """Do a forward pass that nothing follows."""
    with torch.no_grad():
        contender.forward()


def timed(
    contenders: dict[str, Contender],
    function: Callable[[Contender], None],
    arguments: argparse.Namespace,
) -> dict[str, list[float]]:
    """Let all contenders take turns; some rounds more come first."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(arguments.warm_up + arguments.rounds):
        for name, contender in contenders.items():
            taken = seconds_of(lambda: function(contender), arguments.device)  # noqa: B023
            if number >= arguments.warm_up:
                seconds[name].append(taken)
    return seconds


def held_bytes(function: Callable[[], object], device: str) -> tuple[int, int]:
    """Return the most that tensors made by a call hold at a time, and what they hold at its end."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = function()
        end = torch.cuda.memory_allocated() - before
        del kept
        return torch.cuda.max_memory_allocated() - before, end
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    events: list[Any] = list(record.profiler.kineto_results.experimental_event_tree())  # pyright: ignore
    totals: list[tuple[int, int, int]] = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            totals.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
    del kept
    totals.sort()
    before = totals[0][1] - totals[0][2]
    return max(total for _, total, _ in totals) - before, totals[-1][1] - before


def memory_of(contender: Contender, device: str) -> dict[str, int]:
    """Measure what a contender saves and the most that it holds."""
    if contender.leaves is None:
        return {}
    step(contender)
    _, saved = held_bytes(contender.forward, device)
    output = contender.forward()
    size = output.numel() * output.element_size()
    gradient = torch.ones_like(output)
    del output

    def whole() -> None:
        torch.autograd.backward(contender.forward(), gradient)

    peak, left = held_bytes(whole, device)
    for leaf in contender.leaves:
        leaf.grad = None
    return {"saved_bytes": saved - size, "peak_bytes": peak - left}


def floor_of(shape: Shape, inputs: Inputs, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the rates that bound a step, and work out the bound.

    FLOPs over the rate of the dense FFN's first product, and bytes over the rate of a copy: each
    visit's rows gathered (inputs twice, gradients once) and added up (twice), and the activation
    forward and backward, each number read or written once. Beside the bound, what new memory for the
    gradients of the experts' matrices costs: writing it less writing the same again. The dense FFN's
    matrices are smaller by the number of experts over top-k.
    """
    width = shape.top_k * shape.width
    left, right = inputs.hidden.detach(), torch.randn(shape.hidden, 2 * width).to(inputs.hidden)
    out, other = (torch.randn(shape.tokens, 2 * width).to(left) for _ in range(2))
    calls = range(arguments.rounds + 2)
    product = min(
        seconds_of(lambda: torch.mm(left, right, out=out), arguments.device) for _ in calls
    )
    copy = min(seconds_of(lambda: out.copy_(other), arguments.device) for _ in calls)
    weights = (inputs.gate_up.detach(), inputs.down.detach())
    kept = [torch.zeros_like(weight) for weight in weights]
    new = min(
        seconds_of(
            lambda: [torch.empty_like(weight).zero_() for weight in weights], arguments.device
        )
        for _ in calls
    )
    again = min(
        seconds_of(lambda: [weight.zero_() for weight in kept], arguments.device) for _ in calls
    )
    flops = 18 * shape.tokens * shape.top_k * shape.hidden * shape.width
    product_rate = 2 * left.shape[0] * right.numel() / product
    copy_rate = 2 * out.numel() * out.element_size() / copy
    visits = shape.tokens * shape.top_k
    moved = visits * (12 * shape.hidden + 9 * shape.width) * out.element_size()
    return {
        "product_flops_per_second": product_rate,
        "copy_bytes_per_second": copy_rate,
        "step_flops": flops,
        "step_bytes": moved,
        "seconds": flops / product_rate + moved / copy_rate,
        "new_gradients_seconds": max(new - again, 0.0),
    }


def paired(one: list[float], other: list[float]) -> float:
    """Return the median of the ratios of rounds."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def goals_of(
    shape: Shape, step_seconds: dict[str, list[float]], results: dict[str, Any]
) -> dict[str, Any]:
    """Set what was measured beside what was to be reached."""
    peers = [name for name in TRANSFORMERS if name in step_seconds]
    values: dict[str, tuple[float, float, bool]] = {}
    if shape.goal is not None:
        ratio = paired(step_seconds[OURS], step_seconds[DENSE])
        values["step over dense"] = (ratio, shape.goal, ratio <= shape.goal)
    if peers:
        best = min(peers, key=lambda name: statistics.median(step_seconds[name]))
        ratio = paired(step_seconds[best], step_seconds[OURS])
        values["best of transformers over ours"] = (ratio, 1.1, ratio >= 1.1)
    if SWITCH in step_seconds:
        ratio = paired(step_seconds[SWITCH], step_seconds[OURS_UNGATED])
        values["Switch over ours without a gate"] = (ratio, 8.0, ratio >= 8.0)
    if "transformers grouped_mm" in results:
        ratio = results[OURS]["peak_bytes"] / results["transformers grouped_mm"]["peak_bytes"]
        values["peak over grouped_mm's"] = (ratio, 0.7, ratio <= 0.7)
    return {
        name: {"value": value, "goal": goal, "reached": reached}
        for name, (value, goal, reached) in values.items()
    }


def difference_to_eager(inputs: Inputs, shape: Shape) -> float:
    """Return the largest difference of our outputs to those of transformers' loop, over the largest output."""
    with torch.no_grad():
        expected, found = native("eager", shape, inputs).forward(), ours(inputs).forward()
    return float((expected - found).abs().max() / expected.abs().max())


def result_of(shape: Shape, dtype_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape in one dtype."""
    inputs = inputs_of(shape, getattr(torch, dtype_name), arguments.device)
    contenders = contenders_of(shape, inputs, arguments.skip)
    difference = difference_to_eager(inputs, shape)
    forward = timed(contenders, forward_only, arguments)
    whole = timed(contenders, step, arguments)
    results = {
        name: {
            "forward_seconds": statistics.median(forward[name]),
            "forward_over_dense": paired(forward[name], forward[DENSE]),
            "step_seconds": statistics.median(whole[name]),
            "step_over_dense": paired(whole[name], whole[DENSE]),
            **memory_of(contender, arguments.device),
        }
        for name, contender in contenders.items()
    }
    experts = FusedExperts(inputs.gate_up, inputs.down, Gated("silu"))
    chosen = product_path(inputs.hidden, experts)
    return {
        "shape": shape.name,
        "dtype": dtype_name,
        "path": {"name": chosen.path, "reason": chosen.reason},
        "largest_difference_to_eager": difference,
        "floor": floor_of(shape, inputs, arguments),
        "results": results,
        "goals": goals_of(shape, whole, results),
    }


def tables_of(result: dict[str, Any]) -> list[Table]:
    """Show one shape in one dtype: what was measured, and what was to be reached."""
    table = Table(title=f"{result['shape']} ({result['dtype']}, path {result['path']['name']})")
    table.add_column("", no_wrap=True)
    for column in ("forward ms", "/ dense", "step ms", "/ dense", "saved MiB", "peak MiB"):
        table.add_column(column, justify="right")
    for name, found in result["results"].items():
        sizes = [found.get(key) for key in ("saved_bytes", "peak_bytes")]
        table.add_row(
            name.replace("transformers ", "hf "),
            f"{1e3 * found['forward_seconds']:.1f}",
            f"{found['forward_over_dense']:.2f}",
            f"{1e3 * found['step_seconds']:.1f}",
            f"{found['step_over_dense']:.2f}",
            *("" if size is None else f"{size / 2**20:.1f}" for size in sizes),
        )
    for name, key in (("floor", "seconds"), ("new gradients", "new_gradients_seconds")):
        table.add_row(name, "", "", f"{1e3 * result['floor'][key]:.1f}", "", "", "")
    goals = Table("", "found", "goal", "")
    for name, goal in result["goals"].items():
        sign = "reached" if goal["reached"] else "missed"
        goals.add_row(name, f"{goal['value']:.2f}", f"{goal['goal']:.2f}", sign)
    return [table, goals]


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before those that count")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", type=int, help="numbers of shapes, counted from 0")
    parser.add_argument("--skip", nargs="+", default=[], help="contenders to leave out, by name")
    parser.add_argument("--out", type=Path, help="a file for the JSON object")
    parser.add_argument("--tiny", action="store_true", help="small shapes, two rounds")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, print its table and its JSON."""
    arguments = parsed()
    cuda = arguments.device == "cuda"
    shapes = TINY if arguments.tiny else CUDA_SHAPES if cuda else CPU_SHAPES
    if arguments.tiny:
        arguments.rounds = 2
    dtypes = arguments.dtypes or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    results: list[dict[str, Any]] = []
    for number in arguments.shapes or range(len(shapes)):
        for dtype in dtypes:
            results.append(result_of(shapes[number], dtype, arguments))
            for table in tables_of(results[-1]):
                show_table(table)
    text = json.dumps(
        {
            "benchmark": "moe_layer",
            "device": torch.cuda.get_device_name()
            if cuda
            else torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
            "warm_up": arguments.warm_up,
            "versions": {
                name: metadata.version(name) for name in ("torch", "transformers", "st-moe-pytorch")
            },
            "results": results,
        },
        indent=2,
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
