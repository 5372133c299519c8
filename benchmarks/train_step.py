"""Optimizer steps of whole trainers on the same packed rows: flanmoe beside TRL's SFTTrainer.

    python benchmarks/train_step.py --upcycle --out benchmarks/results/train_step_sparse.json

Both train the same model on the same rows with the same learning rate, AdamW and precision, as their users
start them; TRL is given the tokens without the padding at the ends of rows. They take turns, round after
round, each time from the same weights, so that a drift of the machine falls on both. Prints one JSON object:
median seconds of a step and tokens a second (the first step of every round is warm-up), the median of paired
ratios, and the largest difference between the two loss curves. `pip install trl` first.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.data.stream import PackedStream
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_model, load_tokenizer
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.callbacks.metrics_log import MetricsLog
from flanmoe.training.callbacks.routing_alerts import RoutingAlerts
from flanmoe.training.callbacks.routing_log import RoutingLog
from flanmoe.training.interruption import StopRequest
from flanmoe.training.report import StepReport
from flanmoe.training.router_losses import RouterLossConfig
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

_BALANCE_COEFFICIENT = 0.01


@dataclass(slots=True)
class Course:
    """Seconds and cross-entropy of every step of one round."""

    seconds: list[float] = field(default_factory=list[float])
    losses: list[float] = field(default_factory=list[float])


@final
class Clock(StepCallback):
    """Notes when flanmoe's steps end, after all other callbacks."""

    name = "clock"

    def __init__(self, course: Course) -> None:
        self._course = course
        self._last = time.perf_counter()

    def start(self, step: int) -> None:
        """Measure the first step from here."""
        self._last = time.perf_counter()

    def after_step(self, report: StepReport) -> None:
        """Note a step."""
        now = time.perf_counter()
        self._course.seconds.append(now - self._last)
        self._course.losses.append(report.cross_entropy)
        self._last = now


@final
class PeerClock(TrainerCallback):
    """Notes when TRL's steps end."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Measure the first step from here."""
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note a step."""
        now = time.perf_counter()
        self._course.seconds.append(now - self._last)
        self._last = now

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Note the loss of a step, TRL's auxiliary loss taken out again."""
        if logs and "loss" in logs:
            auxiliary = _BALANCE_COEFFICIENT * logs.get("aux_loss", 0.0)
            self._course.losses.append(logs["loss"] - auxiliary)


def flanmoe_course(
    model: PreTrainedModel, rows: list[Packed], arguments: argparse.Namespace
) -> Course:
    """Train with flanmoe, its records and monitor on, as `flanmoe run` does."""
    course = Course()
    config = TuneConfig(
        steps=arguments.steps,
        rows_per_step=arguments.rows,
        micro_batch_rows=arguments.rows,
        length=arguments.length,
        learning_rate=arguments.learning_rate,
        schedule="constant",
        precision=arguments.precision,
        router=RouterLossConfig(
            balance_coefficient=_BALANCE_COEFFICIENT, z_coefficient=0.0, scope="lagged"
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        stream, blocks = FixedRows(rows), moe_blocks(model)
        alerts = RoutingAlerts(config.routing.alerts, blocks)
        log = RoutingLog(run, blocks, task_names=stream.task_names, alerts=alerts)
        trainer = SparseTrainer(
            model,
            training_arguments(config, run.file("checkpoints"), SeedTree(0)),
            stream=stream,
            router=config.router,
            callbacks=(MetricsLog(run), alerts, log, Clock(course)),
            stop=StopRequest(),
        )
        trainer.train()
        trainer.close()
    return course


def trl_course(model: PreTrainedModel, rows: list[Packed], arguments: argparse.Namespace) -> Course:
    """Train with TRL on rows that are packed already, with the model's own auxiliary loss."""
    course = Course()
    if arguments.upcycle:
        model.set_experts_implementation(arguments.peer_experts)
    is_sparse = bool(moe_blocks(model))
    if is_sparse:
        model.config.output_router_logits = True
        model.config.router_aux_loss_coef = _BALANCE_COEFFICIENT
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_length=arguments.length,
                packing=True,
                dataset_kwargs={"skip_prepare_dataset": True},
                per_device_train_batch_size=arguments.rows,
                max_steps=arguments.steps,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="constant",
                bf16=arguments.precision == "bfloat16",
                activation_checkpointing=False,
                use_cpu=True,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Dataset.from_list([_as_peers_row(row) for row in rows]),
            processing_class=load_tokenizer(arguments.model),
            callbacks=[PeerClock(course)],
        )
        trainer.train()
    return course


def _as_peers_row(row: Packed) -> dict[str, Any]:
    """Return a row as TRL packs it: real tokens, their labels, and the lengths of the examples."""
    real = row.segment_ids != 0
    return {
        "input_ids": row.input_ids[real].tolist(),
        "labels": row.labels[real].tolist(),
        "seq_lengths": list(row.segment_sizes[1:]),
    }


def build(arguments: argparse.Namespace) -> PreTrainedModel:
    """Load the model, upcycled if asked; the same weights every time."""
    model = load_model(arguments.model)
    return upcycle(model, UpcycleConfig(), SeedTree(0)) if arguments.upcycle else model


def real_rows(arguments: argparse.Namespace) -> list[Packed]:
    """Pack the embedded instructions, as many rows as the steps read."""
    config = MixtureConfig.parse({"tasks": ["exemplars/mmlu_cot/*"]})
    stream = PackedStream(
        Mixture.load(config, data_dir=None, seeds=SeedTree(0)),
        load_tokenizer(arguments.model),
        PackingConfig(length=arguments.length),
        SeedTree(0),
    )
    return [next(stream) for _ in range(arguments.rows * arguments.steps)]


def summary(
    arguments: argparse.Namespace, rows: list[Packed], courses: dict[str, list[Course]]
) -> dict[str, Any]:
    """Return what is printed."""
    tokens = sum(row.num_real_tokens for row in rows) / arguments.steps
    # The first step allocates and compiles.
    seconds = {
        name: [statistics.median(course.seconds[1:]) for course in rounds]
        for name, rounds in courses.items()
    }
    pairs = zip(seconds["trl"], seconds["flanmoe"], strict=True)
    curves = [np.array(courses[name][0].losses[: arguments.steps]) for name in ("flanmoe", "trl")]
    return {
        "benchmark": "train_step",
        "model": arguments.model + ("+upcycled-8x2-granular" if arguments.upcycle else ""),
        "precision": arguments.precision,
        "trl_experts": arguments.peer_experts if arguments.upcycle else None,
        "real_tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "tokens_per_second_median": {
            name: tokens / statistics.median(values) for name, values in seconds.items()
        },
        "trl_over_flanmoe_median": statistics.median(theirs / ours for theirs, ours in pairs),
        "goal": 1.5,
        "losses": {name: courses[name][0].losses[: arguments.steps] for name in ("flanmoe", "trl")},
        "largest_loss_difference": float(np.abs(curves[0] - curves[1]).max()),
    }


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--upcycle", action="store_true", help="measure the 8-expert top-2 twin")
    parser.add_argument("--peer-experts", default="grouped_mm", help="experts of TRL's model")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    rows = real_rows(arguments)
    trainers = {"flanmoe": flanmoe_course, "trl": trl_course}
    courses: dict[str, list[Course]] = {name: [] for name in trainers}
    for _ in range(arguments.rounds):
        for name, train in trainers.items():
            courses[name].append(train(build(arguments), rows, arguments))
    text = json.dumps(summary(arguments, rows, courses), indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
