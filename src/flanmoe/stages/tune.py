"""The stage `tune`: the model in hand is trained on a mixture, and what it has seen is kept with it."""

from typing import Any

from transformers import PreTrainedConfig

from flanmoe.core.config import Config
from flanmoe.core.console import say
from flanmoe.core.files import whole_folder
from flanmoe.data.mixture import Mixture
from flanmoe.data.packing import PackingReport
from flanmoe.data.row_forms import DecoderForm, PairForm
from flanmoe.data.stream import PackedStream
from flanmoe.data.tasks import num_rejected
from flanmoe.evaluation.results import write_training_hashes
from flanmoe.models.flops import FlopCount
from flanmoe.models.loading import MODEL_MARKER, save_model
from flanmoe.models.memory import MemoryEstimate
from flanmoe.models.plan import ParameterCount
from flanmoe.models.row_flops import count_row_flops
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import TuneStage, leaves_model
from flanmoe.stages.tuning_size import tuning_size
from flanmoe.training.checkpoints import latest_checkpoint
from flanmoe.training.task_statistics import with_statistics
from flanmoe.training.tune import ADAPTER_FOLDER, TuneResult, tune

# What the model did with the data before it was tuned, for tuners that choose experts by it.
STATISTICS_FILE = "expert_statistics.safetensors"


class MixedTask(Config):
    """A task as it stands in a mixture.

    Attributes:
        size: examples that it holds.
        left_out: examples of it left out because they overlap with evaluated ones.
        rate: share of the draws that it was to have.
        group: tasks that share one rate with it, None for none.
        cluster: kind of task.
    """

    size: int
    left_out: int
    rate: float
    group: str | None
    cluster: str


class TuneStageResult(Config):
    """What tuning did and cost.

    Attributes:
        training: ledger, losses, expert load, what trained.
        packing: the rows trained on; examples and tokens of each task in them, what was dropped or
            truncated on the way.
        parameters: counts of the tuned model; what was frozen is not trainable.
        flops: forward FLOPs of one token at the row length.
        memory: the estimate made before the first step, to stand beside the measurement.
        examples_seen: number of different examples that stand in the rows trained on.
        mixture: the tasks drawn from, by name.
        rejected: records of each task that were left out because they cannot be read.
    """

    training: TuneResult
    packing: PackingReport
    parameters: ParameterCount
    flops: FlopCount
    memory: MemoryEstimate
    examples_seen: int
    mixture: dict[str, MixedTask]
    rejected: dict[str, int]


def run_tune(
    stage: TuneStage, held: HeldModel, context: StageContext
) -> tuple[HeldModel, TuneStageResult]:
    """Train the model in hand; goes on from the stage's last complete checkpoint if there is one.

    The checkpoints stay: until the result is on disk, they are what a resumed run goes on from. A tuner that is
    not merged leaves its adapter beside the records, and the model in hand as it was.
    """
    stream = training_stream(stage, held, context)
    model = held.model()
    train = with_statistics(stage.train, model, stream, context.run.file(STATISTICS_FILE))
    size = tuning_size(model, train)
    flops = count_row_flops(model, length=train.length, target_length=train.target_length)
    checkpoint = latest_checkpoint(context.run.path)
    if checkpoint is not None:
        say(f"    going on from {checkpoint.name}")
    training = tune(
        model,
        stream,
        train,
        run=context.run,
        seeds=context.seeds.child(stage.label),
        flops_per_token=flops.training,
        resume=checkpoint is not None,
    )
    hashes = held.training_hashes() | stream.seen_hashes
    if leaves_model(stage):
        with whole_folder(context.model_folder, marker=MODEL_MARKER) as partial:
            save_model(model, held.tokenizer(), partial)
            write_training_hashes(partial, hashes)
    else:
        write_training_hashes(context.run.file(ADAPTER_FOLDER), hashes)
    # The loader has read ahead; back to the rows that were trained on, to count those.
    stream.load_state_dict(stream.state_after(training.ledger.sequences))
    tasks = stream.mixture.tasks
    result = TuneStageResult(
        training=training,
        packing=stream.report,
        parameters=size.parameters,
        flops=flops,
        memory=size.memory,
        examples_seen=len(stream.row_hashes),
        mixture=_mixed(stream.mixture),
        rejected=num_rejected(tasks),
    )
    return (held.saved(model, context.model_folder) if leaves_model(stage) else held), result


def _mixed(mixture: Mixture) -> dict[str, MixedTask]:
    return {
        task.name: MixedTask(
            size=task.size,
            left_out=task.num_left_out,
            rate=mixture.rates[task.name],
            group=task.config.group,
            cluster=task.cluster,
        )
        for task in mixture.tasks
    }


def training_stream(stage: TuneStage, held: HeldModel, context: StageContext) -> PackedStream[Any]:
    """Return the stage's stream of packed rows, the same for every arm of a study and seed."""
    seeds = context.seeds.child(stage.label).child("data")
    mixture = Mixture.load(stage.data, data_dir=context.data_dir, seeds=seeds)
    form = row_form(held.model().config)
    return PackedStream(mixture, held.text_tokenizer(), stage.packing, seeds, form=form)


def row_form(config: PreTrainedConfig) -> DecoderForm | PairForm:
    """Return what kind of rows a model reads."""
    if not config.is_encoder_decoder:
        return DecoderForm()
    return PairForm(decoder_start_token_id=int(config.decoder_start_token_id))
