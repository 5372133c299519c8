"""`tune`: train a model in place on a stream of packed rows. The one entry that stages call."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.core.console import show_table
from flanmoe.core.errors import Interrupted, RunError
from flanmoe.core.ledger import Ledger
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.dropout import dropout
from flanmoe.models.expert_dropout import expert_dropout
from flanmoe.models.freezing import WhatTrains, frozen, trains_table, what_trains
from flanmoe.moe.block import MoEBlock
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
from flanmoe.training.callbacks.routing_log import RoutingLog
from flanmoe.training.checkpoints import (
    CHECKPOINTS_FOLDER,
    checkpoint_step,
    latest_checkpoint,
)
from flanmoe.training.interruption import StopRequest, stop_on_interrupt
from flanmoe.training.rows import RowStream
from flanmoe.training.trainer import SparseTrainer


class LossPoint(Config):
    """Training loss of one step.

    Attributes:
        tokens: real tokens (padding left out) trained on so far, this step included.
        loss: cross-entropy of the step in nats per loss token, router losses left out.
    """

    tokens: int
    loss: float


class TrainedLoad(Config):
    """How often each expert was chosen over the whole run.

    Attributes:
        layers: number of each sparse layer in its model, or on its side of an encoder-decoder.
        counts: for each of them the assignments of each expert.
        shares: the same as shares, which sum to 1.
        entropy_nats: for each of them the entropy of the shares; ln(experts) means even use.
        unused_share: for each of them the share of experts that no token was sent to.
        max_over_mean: for each of them the busiest expert as a multiple of the even share.
        names: for each of them the path of the block in the model.
    """

    layers: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    entropy_nats: tuple[float, ...]
    unused_share: tuple[float, ...]
    max_over_mean: tuple[float, ...]
    names: tuple[str, ...] = ()


class TrainedDrops(Config):
    """What found no expert over the whole run, for each sparse layer in the order of `TrainedLoad`.

    Attributes:
        dropped_share: choices that were asked for and did not fit, over all that were asked for; 0 where
            experts choose.
        unserved_share: tokens that no expert took, over all real tokens.
    """

    dropped_share: tuple[float, ...]
    unserved_share: tuple[float, ...]


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
    drops: TrainedDrops | None = None


@dataclass(frozen=True, slots=True)
class _Records:
    """The callbacks whose records make up the result."""

    ledger: LedgerKeeper
    metrics: MetricsLog
    routing: RoutingLog

    @property
    def all(self) -> tuple[StepCallback, ...]:
        return (self.ledger, self.metrics, self.routing)


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
        run: the folder that metrics, routing and checkpoints are written to.
        seeds: the branch of the seed tree that belongs to this run.
        flops_per_token: of training, forward and backward; a mean over the tokens of both sides.
        resume: go on from the newest complete checkpoint in `run`.

    Raises:
        ConfigError: if `target_length` or `sharding` does not suit the kind of model.
        RunError: if `resume` is set and there is no complete checkpoint.
        ModelError: if weights are in less than float32, examples that share a row see each other,
            or `freeze` or `expert_dropout` does not suit the model.
        Interrupted: after Ctrl-C; a checkpoint has been written.
        DiskError: if a checkpoint or a log cannot be written.
        DataError: if the stream ends or a step has no token that enters the loss.
        FlanmoeError: if the loss or the gradient is not finite.
    """
    require_target_length(config, is_encoder_decoder=model.config.is_encoder_decoder)
    arguments = training_arguments(config, run.file(CHECKPOINTS_FOLDER), seeds)
    checkpoint = _checkpoint_to_resume(run) if resume else None
    blocks = moe_blocks(model)
    own = _own_records(run, arguments.process_index)
    ledger = LedgerKeeper(flops_per_token=flops_per_token, device=arguments.device)
    records = _Records(ledger, MetricsLog(own), RoutingLog(own, blocks))

    def trainer_of(stop: StopRequest, display: StepCallback) -> SparseTrainer:
        return SparseTrainer(
            model,
            arguments,
            stream=stream,
            router=config.router,
            optimizer=chosen_optimizer(config),
            callbacks=(*records.all, display),
            keep_checkpoints=config.keep_checkpoints,
            stop=stop,
            sharding=config.sharding,
        )

    is_shown = arguments.process_index == 0
    with _as_configured(model, config, is_shown=is_shown) as trains:
        _train(trainer_of, steps=config.steps, checkpoint=checkpoint, is_shown=is_shown)
    return _result(config, own, blocks, records, trains)


@contextmanager
def _as_configured(
    model: PreTrainedModel, config: TuneConfig, *, is_shown: bool
) -> Generator[WhatTrains]:
    """Freeze and drop as configured; a later stage must not inherit it by accident."""
    with (
        frozen(model, config.freeze),
        dropout(model, config.dropout),
        expert_dropout(model, config.expert_dropout),
    ):
        trains = what_trains(model)
        if is_shown and trains.trained < trains.parameters:
            show_table(trains_table(trains))
        yield trains


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
    *,
    steps: int,
    checkpoint: Path | None,
    is_shown: bool,
) -> None:
    done = checkpoint_step(checkpoint) if checkpoint else 0
    title = f"Tuning from step {done}" if checkpoint else "Tuning"
    with (
        stop_on_interrupt() as stop,
        shown_progress(title, steps=steps - done, is_shown=is_shown) as display,
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


def _result(
    config: TuneConfig,
    run: RunDir,
    blocks: Sequence[MoEBlock],
    records: _Records,
    trains: WhatTrains,
) -> TuneResult:
    rows = run.rows(METRICS_FILE)
    return TuneResult(
        ledger=records.ledger.ledger,
        counting_pass_seconds=records.ledger.counting.seconds,
        counting_pass_flops=records.ledger.counting.flops,
        final_loss=rows[-1]["loss/cross_entropy"],
        loss_history=tuple(
            LossPoint(tokens=row["tokens"], loss=row["loss/cross_entropy"]) for row in rows
        ),
        expert_load=_trained_load(blocks, records.routing) if blocks else None,
        router_losses=bool(blocks) and config.router.is_on,
        router_settings=dict(config.router.to_mapping()) if blocks else {},
        router_last={name: rows[-1][name] for name in rows[-1] if name.startswith("router/")},
        trains=trains,
        drops=_trained_drops(records.routing) if blocks else None,
    )


def _trained_load(blocks: Sequence[MoEBlock], routing: RoutingLog) -> TrainedLoad:
    layers = routing.load.to_mapping()
    return TrainedLoad(
        layers=tuple(block.layer for block in blocks),
        counts=tuple(tuple(layer["counts"]) for layer in layers),
        shares=tuple(tuple(layer["fractions"]) for layer in layers),
        entropy_nats=tuple(layer["entropy_nats"] for layer in layers),
        unused_share=tuple(layer["unused_share"] for layer in layers),
        max_over_mean=tuple(layer["max_over_mean"] for layer in layers),
        names=tuple(block.name for block in blocks),
    )


def _trained_drops(routing: RoutingLog) -> TrainedDrops:
    return TrainedDrops(
        dropped_share=tuple(layer.dropped_share for layer in routing.drops),
        unserved_share=tuple(layer.unserved_share for layer in routing.drops),
    )
