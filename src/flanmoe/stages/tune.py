"""The stage `tune`: the model in hand is trained on a mixture, and what it has seen is kept with it."""

from flanmoe.core.config import Config
from flanmoe.core.console import say
from flanmoe.core.files import disk_errors
from flanmoe.data.mixture import Mixture
from flanmoe.data.packing import PackingReport
from flanmoe.data.stream import PackedStream
from flanmoe.evaluation.results import write_training_hashes
from flanmoe.models.flops import FlopCount, count_flops
from flanmoe.models.loading import save_model
from flanmoe.models.memory import MemoryEstimate, estimate_memory
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import TuneStage
from flanmoe.training.checkpoints import latest_checkpoint, remove_checkpoints
from flanmoe.training.tune import TuneResult, tune


class TuneStageResult(Config):
    """What tuning did and cost.

    Attributes:
        training: ledger, losses, expert load.
        packing: what was packed, dropped, truncated; examples and tokens of each task.
        parameters: counts of the tuned model.
        flops: forward FLOPs of one token at the row length.
        memory: the estimate made before the first step, to stand beside the measurement.
        examples_seen: number of different examples that entered a batch.
    """

    training: TuneResult
    packing: PackingReport
    parameters: ParameterCount
    flops: FlopCount
    memory: MemoryEstimate
    examples_seen: int


def run_tune(
    stage: TuneStage, held: HeldModel, context: StageContext
) -> tuple[HeldModel, TuneStageResult]:
    """Train the model in hand; goes on from the stage's last complete checkpoint if there is one."""
    stream = training_stream(stage, held, context)
    model = held.model()
    flops = count_flops(model, context_length=stage.train.length)
    memory = estimate_memory(
        model,
        rows=stage.train.micro_batch_rows,
        length=stage.train.length,
        precision=stage.train.precision,
    )
    checkpoint = latest_checkpoint(context.run.path)
    if checkpoint is not None:
        say(f"    going on from {checkpoint.name}")
    training = tune(
        model,
        stream,
        stage.train,
        run=context.run,
        seeds=context.seeds.child(stage.label),
        flops_per_token=flops.training,
        resume=checkpoint is not None,
    )
    hashes = held.training_hashes() | stream.seen_hashes
    with disk_errors(context.model_folder):
        save_model(model, held.tokenizer(), context.model_folder)
        write_training_hashes(context.model_folder, hashes)
    remove_checkpoints(context.run.path)
    result = TuneStageResult(
        training=training,
        packing=stream.report,
        parameters=count_parameters(model),
        flops=flops,
        memory=memory,
        examples_seen=len(stream.seen_hashes),
    )
    return held.saved(model, context.model_folder), result


def training_stream(stage: TuneStage, held: HeldModel, context: StageContext) -> PackedStream:
    """Return the stage's stream of packed rows, the same for every arm of a study and seed."""
    seeds = context.seeds.child(stage.label).child("data")
    mixture = Mixture.load(stage.data, data_dir=context.data_dir, seeds=seeds)
    return PackedStream(mixture, held.text_tokenizer(), stage.packing, seeds)
