"""What recording the routing and its alerts adds to a training step: the same steps with and without them.

    OMP_NUM_THREADS=2 python benchmarks/routing_overhead.py --pairs 9 \\
        --out benchmarks/results/routing_overhead.json

One trainer trains one model; it is given every row twice in a row of steps, and records the routing in one
of the two steps, in the first and in the second by turns. So a pair differs in nothing but the recording:
sums by task of every layer, measures, alerts, and a row of `routing.jsonl`. Router losses have scope
`lagged`, whose steps hold nothing else that counts experts. On a CPU time is that of the processor and not of
the clock, so that other work on the machine hardly shows. Equal steps differ by several percent all the same,
more than recording takes, so the calls that record are timed themselves too (on a CPU; on an accelerator they
only start work). Prints one JSON object: for a model upcycled from `--model` and for a small one medians of
seconds, of paired ratios (with over without), and of a recorded step over what it is without the seconds inside
recording calls.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedModel

from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig, TokenizedExample, packed_row
from flanmoe.data.stream import PackedStream
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_model, load_tokenizer
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.moe.stacked_sums import StackedSums
from flanmoe.testing.tiny_models import VOCABULARY_SIZE, tiny_model
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.callbacks.routing_alerts import RoutingAlerts
from flanmoe.training.callbacks.routing_log import RoutingLog
from flanmoe.training.report import StepReport
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

GOAL = 1.02
# Wide enough that a step is arithmetic and not the calling of small functions.
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_local_experts": 8,
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2}
NUM_TASKS = 57


def now() -> float:
    """Return the processor's seconds; on an accelerator those of the clock, once its work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@final
class Inside:
    """Adds up the processor's seconds inside some calls; a call within a call counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is timed."""

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            start = now()
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += now() - start

        return run


@final
class Clock(StepCallback):
    """Notes how long each step took, after all other callbacks."""

    name = "clock"

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.recording: list[float] = []
        self.inside = Inside()
        self._last = now()

    def start(self, step: int) -> None:
        """Measure the first step from here."""
        self._last = now()

    def after_step(self, report: StepReport) -> None:
        """Note a step."""
        reached = now()
        self.seconds.append(reached - self._last)
        self.recording.append(self.inside.seconds)
        self.inside.seconds = 0.0
        self._last = reached


def records(step: int) -> bool:
    """Whether a step (from 0) records: of pairs the first, then the second, by turns."""
    pair, place = divmod(step, 2)
    return place == pair % 2


class TakingTurns(SparseTrainer):
    """Records in one step of each pair. Without sums the callbacks have nothing to do."""

    def _sums(self, *arguments: Any) -> StackedSums | None:
        return super()._sums(*arguments) if records(self.state.global_step) else None


def real_rows(reference: str, number: int, length: int) -> list[Packed]:
    """Pack rows of the embedded instructions, of 57 tasks."""
    config = MixtureConfig.parse({"tasks": ["exemplars/mmlu_cot/*"]})
    mixture = Mixture.load(config, data_dir=None, seeds=SeedTree(0))
    packing = PackingConfig(length=length)
    stream = PackedStream(mixture, load_tokenizer(reference), packing, SeedTree(0))
    return [next(stream) for _ in range(number)]


def random_rows(number: int, length: int) -> list[Packed]:
    """Pack random tokens, as many examples in a row as there are in real ones, of as many tasks."""
    rng = np.random.default_rng(0)
    rows: list[Packed] = []
    for row in range(number):
        cuts = np.sort(rng.choice(np.arange(1, length - length // 16), 3, replace=False))
        examples = [
            TokenizedExample(
                input_ids=rng.integers(3, VOCABULARY_SIZE, size),
                loss_mask=np.arange(size) >= size // 2,
                task=f"task {rng.integers(NUM_TASKS)}",
                key=str(row),
                content_hash="",
            )
            for size in np.diff(cuts, prepend=0)
        ]
        rows.append(packed_row(examples, length=length))
    return rows


def measured(
    model: PreTrainedModel, rows: Sequence[Packed], *, pairs: int, rows_per_step: int
) -> dict[str, Any]:
    """Train so many pairs of steps, and one pair more to warm up."""
    config = TuneConfig.parse(
        {
            "steps": 2 * (pairs + 1),
            "rows_per_step": rows_per_step,
            "precision": "auto",
            "router": {"scope": "lagged"},
        }
    )
    twice = [
        row
        for start in range(0, len(rows), rows_per_step)
        for row in 2 * list(rows[start : start + rows_per_step])
    ]
    stream = FixedRows(twice)
    blocks = moe_blocks(model)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        alerts = RoutingAlerts(config.routing.alerts, blocks)
        log = RoutingLog(run, blocks, task_names=stream.task_names, alerts=alerts)
        trainer = TakingTurns(
            model,
            training_arguments(config, run.file("checkpoints"), SeedTree(0)),
            stream=stream,
            router=config.router,
            routing=config.routing,
            callbacks=(alerts, log, clock),
        )
        inside = Inside()
        for part, method in ((trainer, "_sums"), (alerts, "after_step"), (log, "after_step")):
            setattr(part, method, inside.timed(getattr(part, method)))
        clock.inside = inside
        with mock.patch.object(StackedSums, "__add__", inside.timed(StackedSums.__add__)):
            trainer.train()
        trainer.close()
        logged = len(run.rows("routing.jsonl"))
    assert logged == pairs + 1
    chosen = {
        kind: [x for step, x in enumerate(clock.seconds) if step > 1 and records(step) == kind]
        for kind in (False, True)
    }
    recording = [x for step, x in enumerate(clock.recording) if step > 1 and records(step)]
    ratios = [b / a for a, b in zip(chosen[False], chosen[True], strict=True)]
    return {
        "layers": len(blocks),
        "experts": blocks[0].num_experts,
        "tasks": len(stream.task_names),
        "tokens_per_step": sum(row.num_real_tokens for row in rows) // (len(rows) // rows_per_step),
        "seconds_without": statistics.median(chosen[False]),
        "seconds_with": statistics.median(chosen[True]),
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "recording_seconds": statistics.median(recording),
        "recording_ratio_median": statistics.median(
            1 + part / (whole - part) for part, whole in zip(recording, chosen[True], strict=True)
        ),
    }


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="dense; it is upcycled")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step, one a micro-batch")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="a toy alone, to try the script")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = TINY if arguments.tiny else SMALL
    sizes = {"pairs": arguments.pairs, "rows_per_step": arguments.rows}
    number = arguments.rows * (arguments.pairs + 1)
    small_rows = random_rows(number, arguments.length)
    models = {"small": measured(tiny_model("mixtral", **shape), small_rows, **sizes)}
    if not arguments.tiny:
        rows = real_rows(arguments.model, number, arguments.length)
        sparse = upcycle(load_model(arguments.model), UpcycleConfig(), SeedTree(0))
        name = arguments.model + "+upcycled-8x2-granular"
        models[name] = measured(sparse, rows, **sizes)
    result = {
        "benchmark": "routing_overhead",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "length": arguments.length,
        "rows_per_step": arguments.rows,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pairs": arguments.pairs,
        "goal": GOAL,
        "small": shape,
        "models": models,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
