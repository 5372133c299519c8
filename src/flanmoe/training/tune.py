"""`tune`: train a model in place on a stream of packed rows. The one entry that stages call."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from flanmoe.core.config import Config
from flanmoe.core.console import say, show_table
from flanmoe.core.errors import Interrupted, RunError
from flanmoe.core.ledger import Ledger
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.dropout import dropout
from flanmoe.models.expert_dropout import expert_dropout
from flanmoe.models.expert_path import expert_path
from flanmoe.models.freezing import WhatTrains, frozen, trains_table, what_trains
from flanmoe.models.kept_activation import kept_activation
from flanmoe.moe.alerts import Alert
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing_measures import measures_of_layers
from flanmoe.training.arguments import (
    TuneConfig,
    chosen_optimizer,
    require_target_length,
    training_arguments,
)
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.callbacks.ledger import LedgerKeeper
from flanmoe.training.callbacks.metrics_log import METRICS_FILE, MetricsLog
from flanmoe.training.callbacks.progress import shown_progress
from flanmoe.training.callbacks.routing_alerts import RoutingAlerts
from flanmoe.training.callbacks.routing_log import RoutingLog
from flanmoe.training.checkpoints import (
    CHECKPOINTS_FOLDER,
    checkpoint_step,
    latest_checkpoint,
)
from flanmoe.training.interruption import StopRequest, stop_on_interrupt
from flanmoe.training.routing_monitor import RoutingMonitorConfig
from flanmoe.training.rows import RowStream
from flanmoe.training.trained_routing import (
    TrainedDrops,
    TrainedLoad,
    TrainedTask,
    trained_drops,
    trained_load,
    trained_tasks,
)
from flanmoe.training.trainer import SparseTrainer
from flanmoe.tuners.attached import AttachedTuner
from flanmoe.tuners.merging import MergeReport, merge_sentence
from flanmoe.tuners.tuning import attached

# Where in the folder of a run a tuner keeps what it has trained.
ADAPTER_FOLDER = "adapter"


class LossPoint(Config):
    """Training loss of one step.

    Attributes:
        tokens: real tokens (padding left out) trained on so far, this step included.
        loss: cross-entropy of the step in nats per loss token, router losses left out.
    """

    tokens: int
    loss: float


class RoutingPoint(Config):
    """How even the load of one step was, over the sparse layers.

    Attributes:
        tokens: real tokens trained on so far, this step included.
        worst, mean: entropy of the load as a share of the largest there is, of the most uneven layer and
            as a mean over layers.
    """

    tokens: int
    worst: float
    mean: float


class TuneResult(Config):
    """What tuning did and cost.

    Attributes:
        ledger: costs, those of counting passes included.
        counting_pass_seconds, counting_pass_flops: the part of the ledger that router losses of
            scope `global` spent on counting experts beforehand.
        final_loss: cross-entropy of the last step, in nats per loss token.
        loss_history: cross-entropy of each step.
        expert_load: use of experts over the run, None for a dense model.
        drops: what found no expert over the run, None for a dense model.
        router_losses: whether router losses entered the loss.
        router_settings: their coefficients and scope; empty for a dense model.
        router_last: their raw and weighted values in the last step; empty for a dense model.
        trains: how much of each part of the model trained.
        merged: what merging a tuner changed; None where there was none to merge.
        tasks: where the tokens of each task went, by its name; empty for a dense model.
        alerts: what was wrong with the routing, those that were cleared included.
        routing_history: how even each step was; empty for a dense model.
    """

    ledger: Ledger
    counting_pass_seconds: float
    counting_pass_flops: float
    final_loss: float
    loss_history: tuple[LossPoint, ...]
    expert_load: TrainedLoad | None
    router_losses: bool
    router_settings: dict[str, float | str]
    router_last: dict[str, float]
    trains: WhatTrains
    merged: MergeReport | None = None
    drops: TrainedDrops | None = None
    tasks: dict[str, TrainedTask] = {}
    alerts: tuple[Alert, ...] = ()
    routing_history: tuple[RoutingPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class _Records:
    """The callbacks whose records make up the result."""

    ledger: LedgerKeeper
    metrics: MetricsLog
    alerts: RoutingAlerts
    routing: RoutingLog

    @property
    def all(self) -> tuple[StepCallback, ...]:
        # The log shows the alerts of its own step.
        return (self.ledger, self.metrics, self.alerts, self.routing)


def tune(
    model: PreTrainedModel,
    stream: RowStream,
    config: TuneConfig,
    *,
    run: RunDir,
    seeds: SeedTree,
    flops_per_token: float,
    resume: bool,
) -> TuneResult:
    """Train a model in place; sparse models get router losses.

    What is frozen or dropped for the time of training is as before afterwards. In a run of several
    processes each of them calls this with its own slice of the stream and the same folder, which
    all must see; the records in `run` itself are those of the first.

    Args:
        model: a causal language model, FlanMoeT5 or a dense T5, with float32 weights.
        stream: source of packed rows of its kind; its position is part of every checkpoint.
        config: steps, rates, router losses, freezing, expert dropout, checkpoints.
        run: the folder that metrics, routing and checkpoints are written to, and what a tuner has trained.
        seeds: the branch of the seed tree that belongs to this run.
        flops_per_token: of training, forward and backward; a mean over the tokens of both sides.
        resume: go on from the newest complete checkpoint in `run`.

    Raises:
        ConfigError: if `target_length` or `sharding` does not suit the kind of model.
        RunError: if `resume` is set and there is no complete checkpoint.
        ModelError: if weights are below float32, a setting does not suit the model, or rows leak.
        Interrupted: after Ctrl-C; a checkpoint has been written.
        DiskError: if a checkpoint or a log cannot be written.
        DataError: if the stream ends or a step has no token that enters the loss.
        FlanmoeError: if the loss or the gradient is not finite.
    """
    require_target_length(config, is_encoder_decoder=model.config.is_encoder_decoder)
    arguments = training_arguments(config, run.file(CHECKPOINTS_FOLDER), seeds)
    checkpoint = _checkpoint_to_resume(run) if resume else None
    blocks = moe_blocks(model)
    is_shown = arguments.process_index == 0
    _say_how_experts_compute(blocks, arguments)
    ledger = LedgerKeeper(flops_per_token=flops_per_token, device=arguments.device)
    own = _own_records(run, arguments.process_index)
    records = _records(ledger, own, blocks, stream, config.routing, is_shown=is_shown)
    shown = _display(blocks, records.alerts, is_shown=is_shown)

    def trainer_of(stop: StopRequest, display: StepCallback) -> SparseTrainer:
        return SparseTrainer(
            model,
            arguments,
            stream=stream,
            callbacks=(*records.all, display),
            stop=stop,
            **_trainer_settings(config),
        )

    with _as_configured(model, config, seeds, is_shown=is_shown) as (trains, tuner):
        _train(trainer_of, shown, steps=config.steps, checkpoint=checkpoint)
        merged = None if tuner is None else _finished(tuner, config, run, is_shown=is_shown)
    result = _result(own, records, trains).model_copy(update={"merged": merged})
    return _with_routing(result, config, own, blocks, records) if blocks else result


def _say_how_experts_compute(blocks: Sequence[MoEBlock], arguments: TrainingArguments) -> None:
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    path = expert_path(blocks, dtype=dtype, device=arguments.device)
    if path is not None and arguments.process_index == 0:
        say(f"    experts: {path}")


@contextmanager
def _as_configured(
    model: PreTrainedModel, config: TuneConfig, seeds: SeedTree, *, is_shown: bool
) -> Generator[tuple[WhatTrains, AttachedTuner | None]]:
    """Freeze, drop, keep and put in as configured; a later stage must not inherit it by accident."""
    with (
        frozen(model, config.freeze),
        dropout(model, config.dropout),
        expert_dropout(model, config.expert_dropout),
        kept_activation(model, config.keep_expert_activation),
        attached(model, config.tuner, seeds.child("tuner")) as tuner,
    ):
        trains = what_trains(model)
        if is_shown and trains.trained < trains.parameters:
            show_table(trains_table(trains))
        yield trains, tuner


def _finished(
    tuner: AttachedTuner, config: TuneConfig, run: RunDir, *, is_shown: bool
) -> MergeReport | None:
    """Save what a tuner has trained, in the first process, and merge it where that is asked for."""
    if is_shown:
        tuner.save(run.file(ADAPTER_FOLDER))
    if config.tuner is None or not config.tuner.merge:
        return None
    merged = tuner.merge()
    if is_shown:
        say(merge_sentence(merged))
    return merged


def _records(
    ledger: LedgerKeeper,
    own: RunDir,
    blocks: Sequence[MoEBlock],
    stream: RowStream,
    config: RoutingMonitorConfig,
    *,
    is_shown: bool,
) -> _Records:
    alerts = RoutingAlerts(config.alerts, blocks, is_shown=is_shown)
    routing = RoutingLog(own, blocks, task_names=stream.task_names, alerts=alerts, config=config)
    return _Records(ledger, MetricsLog(own), alerts, routing)


def _trainer_settings(config: TuneConfig) -> dict[str, Any]:
    return {
        "router": config.router,
        "routing": config.routing,
        "optimizer": chosen_optimizer(config),
        "keep_checkpoints": config.keep_checkpoints,
        "sharding": config.sharding,
    }


def _display(
    blocks: Sequence[MoEBlock], alerts: RoutingAlerts, *, is_shown: bool
) -> Callable[..., AbstractContextManager[StepCallback]]:
    """Return what shows the progress of steps, given a title and their number."""
    names = _short_names(blocks)
    return partial(shown_progress, is_shown=is_shown, layers=names, alerts=alerts)


def _own_records(run: RunDir, process: int) -> RunDir:
    """Return where a process keeps its records; the first one's are those of the run."""
    return run.child(f"process-{process}") if process else run


def _checkpoint_to_resume(run: RunDir) -> Path:
    checkpoint = latest_checkpoint(run.path)
    if checkpoint is None:
        raise RunError(
            f"`--resume` needs a complete checkpoint, but {run.file(CHECKPOINTS_FOLDER)} holds "
            "none. Start the run without `--resume`."
        )
    return checkpoint


def _train(
    trainer_of: Callable[[StopRequest, StepCallback], SparseTrainer],
    shown: Callable[..., AbstractContextManager[StepCallback]],
    *,
    steps: int,
    checkpoint: Path | None,
) -> None:
    done = checkpoint_step(checkpoint) if checkpoint else 0
    title = f"Tuning from step {done}" if checkpoint else "Tuning"
    with (
        stop_on_interrupt() as stop,
        shown(title, steps=steps - done) as display,
        closing(trainer_of(stop, display)) as trainer,
    ):
        if done < steps:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        elif checkpoint:
            trainer.restore(checkpoint)
        reached = trainer.state.global_step
    if stop.is_set:
        raise Interrupted(
            f"Tuning was interrupted after step {reached} of {steps}. A checkpoint has been saved; "
            "`--resume` goes on from it."
        )


def _short_names(blocks: Sequence[MoEBlock]) -> list[str]:
    """What layers are called in one line: their numbers, with their sides where there are two."""
    sides = [block.name.partition(".")[0] for block in blocks]
    return [
        f"{side} {block.layer}" if {"encoder", "decoder"} & set(sides) else str(block.layer)
        for side, block in zip(sides, blocks, strict=True)
    ]


def _result(run: RunDir, records: _Records, trains: WhatTrains) -> TuneResult:
    """Return the result, as it is for a dense model."""
    rows = run.rows(METRICS_FILE)
    return TuneResult(
        ledger=records.ledger.ledger,
        counting_pass_seconds=records.ledger.counting.seconds,
        counting_pass_flops=records.ledger.counting.flops,
        final_loss=rows[-1]["loss/cross_entropy"],
        loss_history=tuple(
            LossPoint(tokens=row["tokens"], loss=row["loss/cross_entropy"]) for row in rows
        ),
        expert_load=None,
        router_losses=False,
        router_settings={},
        router_last={},
        trains=trains,
    )


def _with_routing(
    result: TuneResult,
    config: TuneConfig,
    run: RunDir,
    blocks: Sequence[MoEBlock],
    records: _Records,
) -> TuneResult:
    """Return the result with what there is to say of a sparse model."""
    rows = run.rows(METRICS_FILE)
    sums = records.routing.sums
    layers = [layer for (layer,) in measures_of_layers([layer.together() for layer in sums])]
    return result.model_copy(
        update={
            "expert_load": trained_load(blocks, layers),
            "drops": trained_drops(layers),
            "tasks": trained_tasks(records.routing.task_names, sums),
            "alerts": records.alerts.alerts,
            "router_losses": config.router.is_on,
            "router_settings": dict(config.router.to_mapping()),
            "router_last": {
                name: rows[-1][name] for name in rows[-1] if name.startswith("router/")
            },
            "routing_history": tuple(
                RoutingPoint(
                    tokens=row["tokens"],
                    worst=row["routing/worst/entropy_share"],
                    mean=row["routing/mean/entropy_share"],
                )
                for row in rows
            ),
        }
    )
