"""One optimizer step of low-rank experts beside PEFT's LoRA on fused experts and full tuning.

    python benchmarks/expert_lora.py --out benchmarks/results/expert_lora.json

Random Mixtral models of 8 and of 64 experts, the same tokens and AdamW for all. A step is a forward pass, a
backward pass and an optimizer step. Every way has its own copy of the model; they take turns, round after
round, so that a drift of the machine falls on all. PEFT and full tuning run on the faster of transformers'
expert paths that are given (`--peer-experts`), and full tuning on flanmoe's as well. Peak memory is that of
each way in a process of its own, beyond what the process holds before there is a model. Prints a table and one
JSON object: median seconds, medians of paired ratios, peaks, and what was to be reached.

`--tiny` runs a small shape for two rounds, to see that everything works; its figures mean nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from flanmoe.core.console import show_table
from flanmoe.core.memory import peak_memory_bytes, reset_peak_memory
from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.tuners.low_rank import LowRankConfig, attach_low_rank

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
OURS, FULL = "low-rank", f"full, {EXPERTS_IMPLEMENTATION}"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model, and tokens of a step."""

    experts: int
    top_k: int
    expert_width: int
    hidden: int = 576
    layers: int = 4
    tokens: int = 512
    rows: int = 2

    @property
    def name(self) -> str:
        """How results call it."""
        return f"{self.experts} experts, top-{self.top_k}, {self.hidden} x {self.expert_width}"

    def model(self) -> MixtralForCausalLM:
        """Build the model, the same weights every time."""
        torch.manual_seed(0)
        config = MixtralConfig(
            hidden_size=self.hidden,
            intermediate_size=self.expert_width,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            vocab_size=2000,
        )
        return MixtralForCausalLM(config)

    def batch(self) -> torch.Tensor:
        """Random tokens."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(2000, (self.rows, self.tokens), generator=generator)


SHAPES = (Shape(8, 2, 1536), Shape(64, 8, 256))
TINY = (Shape(4, 2, 64, hidden=128, layers=2, tokens=32),)
# What issue "Experts at the speed of the matrix units" asks for: (numerator, denominator, goal, best is).
GOALS: dict[str, tuple[float, Callable[[float, float], bool]]] = {
    "step over full tuning": (0.72, float.__le__),
    "PEFT's step over ours": (1.4, float.__ge__),
    "peak memory over PEFT's": (0.6, float.__le__),
}


def prepared(way: str, shape: Shape, arguments: argparse.Namespace) -> nn.Module:
    """Build the model as one way tunes it."""
    kind, _, experts = way.partition(", ")
    model = shape.model()
    model.set_experts_implementation(experts or EXPERTS_IMPLEMENTATION)
    if kind == "PEFT":
        settings = LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules=[],
            target_parameters=TARGETS,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, settings).train().to(arguments.device)
    if kind == OURS:
        config = LowRankConfig(rank=arguments.rank, alpha=2.0 * arguments.rank)
        attach_low_rank(model, config, torch.Generator().manual_seed(0))
    return model.train().to(arguments.device)


class Stepper:
    """Makes optimizer steps of one way."""

    def __init__(self, way: str, shape: Shape, arguments: argparse.Namespace) -> None:
        self._model: Any = prepared(way, shape, arguments)
        self._ids = shape.batch().to(arguments.device)
        self._device = torch.device(arguments.device)
        self._autocast = arguments.precision == "bfloat16"
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(self) -> tuple[float, float]:
        """Make a step; returns its seconds and its loss."""
        self._wait()
        start = time.perf_counter()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss = self._model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - start, float(loss.detach())

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def ways_of(arguments: argparse.Namespace) -> list[str]:
    """Name all ways: kind and expert path."""
    peers = [f"{kind}, {path}" for kind in ("PEFT", "full") for path in arguments.peer_experts]
    return [OURS, FULL, *peers]


def timed(
    shape: Shape, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Let all ways take turns; returns the seconds of every round, and how many numbers train.

    Raises:
        RuntimeError: if the first losses differ: a new low-rank change is one of nothing.
    """
    steppers = {way: Stepper(way, shape, arguments) for way in ways_of(arguments)}
    first = {way: stepper.step()[1] for way, stepper in steppers.items()}
    largest = max(first.values()) - min(first.values())
    if largest > (0.02 if arguments.precision == "bfloat16" else 1e-4):
        raise RuntimeError(
            f"All ways begin with the same model, but their first losses are {first}."
        )
    seconds: dict[str, list[float]] = {way: [] for way in steppers}
    for _ in range(arguments.rounds):
        for way, stepper in steppers.items():
            seconds[way].append(stepper.step()[0])
    return seconds, {way: stepper.trained for way, stepper in steppers.items()}


def peak_of(way: str, shape: Shape, arguments: argparse.Namespace) -> int:
    """Measure the peak of one way in this process, in bytes beyond what it holds without a model."""
    if arguments.device == "cuda":
        stepper = Stepper(way, shape, arguments)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            stepper.step()
        return torch.cuda.max_memory_allocated()
    reset_peak_memory()
    before = peak_memory_bytes()
    stepper = Stepper(way, shape, arguments)
    for _ in range(3):
        stepper.step()
    return peak_memory_bytes() - before


def peaks_of(number: int, arguments: argparse.Namespace) -> dict[str, int]:
    """Measure the peak of every way, each in a process of its own."""
    found: dict[str, int] = {}
    for way in ways_of(arguments):
        command = [sys.executable, __file__, "--peak", way, "--shape", str(number)]
        for name in ("rank", "precision", "device"):
            command += [f"--{name}", str(getattr(arguments, name))]
        command += ["--tiny"] if arguments.tiny else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = int(done.stdout.split()[-1])
    return found


def paired(one: list[float], other: list[float]) -> float:
    """Return the median of the ratios of rounds."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def result_of(number: int, shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape."""
    seconds, trained = timed(shape, arguments)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    peaks = peaks_of(number, arguments)
    peer = min((way for way in medians if way.startswith("PEFT")), key=medians.__getitem__)
    full = min((way for way in medians if way.startswith("full")), key=medians.__getitem__)
    values = {
        "step over full tuning": paired(seconds[OURS], seconds[full]),
        "PEFT's step over ours": paired(seconds[peer], seconds[OURS]),
        "peak memory over PEFT's": peaks[OURS] / peaks[peer],
    }
    return {
        "shape": shape.name,
        "tokens": shape.rows * shape.tokens,
        "layers": shape.layers,
        "seconds": medians,
        "trained": trained,
        "peak_bytes": peaks,
        "against": {"full": full, "PEFT": peer},
        "goals": {
            name: {"value": values[name], "goal": goal, "reached": reached(values[name], goal)}
            for name, (goal, reached) in GOALS.items()
        },
    }


def table_of(result: dict[str, Any]) -> Table:
    """Show one shape."""
    table = Table(title=result["shape"])
    for column in ("", "seconds", "over ours", "trained", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    for way, seconds in result["seconds"].items():
        table.add_row(
            way,
            f"{seconds:.3f}",
            f"{seconds / result['seconds'][OURS]:.2f}",
            f"{result['trained'][way]:,}",
            f"{result['peak_bytes'][way] / 2**20:,.0f}",
        )
    for name, goal in result["goals"].items():
        sign = "reached" if goal["reached"] else "missed"
        table.add_row(name, f"{goal['value']:.2f}", f"{goal['goal']}", sign, "")
    return table


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peer-experts", nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--out", type=Path, help="a file for the JSON object")
    parser.add_argument("--tiny", action="store_true", help="a small shape, two rounds")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its JSON."""
    arguments = parsed()
    shapes = TINY if arguments.tiny else SHAPES
    if arguments.peak:
        print(peak_of(arguments.peak, shapes[arguments.shape], arguments))
        return
    if arguments.tiny:
        arguments.rounds = 2
    results = [result_of(number, shape, arguments) for number, shape in enumerate(shapes)]
    for result in results:
        show_table(table_of(result))
    text = json.dumps(
        {
            "benchmark": "expert_lora",
            "rank": arguments.rank,
            "precision": arguments.precision,
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "results": results,
        },
        indent=2,
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
