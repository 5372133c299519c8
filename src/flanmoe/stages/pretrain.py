"""The stage `pretrain`: an encoder-decoder learns language from texts, from nothing or from where it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.config import Config
from flanmoe.core.console import say
from flanmoe.core.errors import ModelError
from flanmoe.core.files import whole_folder
from flanmoe.core.seeds import SeedTree
from flanmoe.data.collate import collate_pairs
from flanmoe.data.denoised_stream import DenoisedStream
from flanmoe.data.denoisers import sentinel_ids
from flanmoe.data.documents import Document, Part, load_documents
from flanmoe.data.packing import PackingReport
from flanmoe.data.tokenizer_training import train_tokenizer
from flanmoe.evaluation.results import write_training_hashes
from flanmoe.models.flan_moe_t5 import FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.shape import shape_config
from flanmoe.models.flops import FlopCount
from flanmoe.models.loading import MODEL_MARKER, save_model
from flanmoe.models.memory import MemoryEstimate
from flanmoe.models.modes import evaluating
from flanmoe.models.plan import ParameterCount
from flanmoe.models.row_flops import count_row_flops
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import PretrainStage
from flanmoe.stages.tuning_size import tuning_size
from flanmoe.training.checkpoints import latest_checkpoint
from flanmoe.training.tune import TuneResult, tune

_TOKENIZER_FOLDER = "tokenizer"
# Rows of held-out text that the loss is measured on at the end; all of them where there are fewer.
_HELD_OUT_ROWS = 64
_HELD_OUT_BATCH = 8


class PretrainStageResult(Config):
    """What pre-training did and cost.

    Attributes:
        training: ledger, losses, expert load, drops.
        packing: the rows trained on.
        parameters: counts of the model.
        flops: forward FLOPs of one token, averaged over a row.
        memory: the estimate made before the first step.
        documents: documents trained on.
        rows_per_epoch: rows in which they are given once.
        epochs: how often they were gone through.
        vocabulary_size: tokens of the tokenizer.
        held_out_loss: mean cross-entropy on denoising rows of held-out documents, nats a target token; None
            where none are held out.
    """

    training: TuneResult
    packing: PackingReport
    parameters: ParameterCount
    flops: FlopCount
    memory: MemoryEstimate
    documents: int
    rows_per_epoch: int
    epochs: float
    vocabulary_size: int
    held_out_loss: float | None


def run_pretrain(
    stage: PretrainStage, held: HeldModel, context: StageContext
) -> tuple[HeldModel, PretrainStageResult]:
    """Train the model in hand, or a new one, on denoising rows; goes on from a checkpoint if there is one.

    Raises:
        ModelError: if there is neither a model nor a shape, or the model is no encoder-decoder.
        DataError: if the documents cannot be read or are too few.
    """
    source = _Source(stage, context)
    documents = source.documents("train")
    tokenizer = _tokenizer(stage, held, documents, context)
    model = _model(stage, held, tokenizer, context.seeds.child(stage.label))
    stream = source.stream(documents, tokenizer, model)
    train = stage.train
    flops = count_row_flops(model, length=train.length, target_length=train.target_length)
    size = tuning_size(model, train)
    rows = train.steps * train.rows_per_step
    say(f"    goes through the texts {rows / stream.rows_per_epoch:.2f} times ({rows:,} rows)")
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
    with whole_folder(context.model_folder, marker=MODEL_MARKER) as partial:
        save_model(model, tokenizer, partial)
        write_training_hashes(partial, held.training_hashes() | stream.seen_hashes)
    # The loader has read ahead; back to the rows that were trained on, to count those.
    stream.load_state_dict(stream.state_after(training.ledger.sequences))
    result = PretrainStageResult(
        training=training,
        packing=stream.report,
        parameters=size.parameters,
        flops=flops,
        memory=size.memory,
        documents=len(documents),
        rows_per_epoch=stream.rows_per_epoch,
        epochs=stream.epochs,
        vocabulary_size=len(tokenizer),
        held_out_loss=source.held_out_loss(tokenizer, model),
    )
    if result.held_out_loss is not None:
        say(f"    loss on held-out text: {result.held_out_loss:.3f} nats a target token")
    return held.saved(model, context.model_folder, tokenizer=tokenizer), result


@dataclass(frozen=True, slots=True)
class _Source:
    """The texts of a stage, and rows made of them."""

    stage: PretrainStage
    context: StageContext

    def documents(self, part: Part) -> list[Document]:
        return load_documents(self.stage.documents, part=part, data_dir=self.context.data_dir)

    def stream(
        self,
        documents: list[Document],
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        branch: str = "data",
    ) -> DenoisedStream:
        start = getattr(model.config, "decoder_start_token_id", None)
        if not model.config.is_encoder_decoder or start is None:
            raise ModelError(
                "Denoising trains encoder-decoders with a `decoder_start_token_id`, but the model in hand is a "
                f"{type(model).__name__}. Give the stage a `shape`, or start from a T5."
            )
        return DenoisedStream(
            documents,
            tokenizer,  # pyright: ignore[reportArgumentType]
            self.stage.denoising,
            self.context.seeds.child(self.stage.label).child(branch),
            sentinels=sentinel_ids(tokenizer),
            decoder_start_token_id=start,
        )

    def held_out_loss(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> float | None:
        if self.stage.documents.held_out_share == 0:
            return None
        stream = self.stream(self.documents("held_out"), tokenizer, model, branch="held_out")
        rows = [next(stream) for _ in range(min(_HELD_OUT_ROWS, stream.rows_per_epoch))]
        losses: list[torch.Tensor] = []
        with evaluating(model), torch.no_grad():
            for start in range(0, len(rows), _HELD_OUT_BATCH):
                batch = collate_pairs(rows[start : start + _HELD_OUT_BATCH])
                found = model(
                    input_ids=batch["input_ids"],
                    decoder_input_ids=batch["decoder_input_ids"],
                    labels=batch["labels"],
                    use_cache=False,
                )
                # All rows have as many targets, so that a mean of means is the mean.
                losses += [found.loss] * len(batch["labels"])
        return float(torch.stack(losses).mean())


def _tokenizer(
    stage: PretrainStage, held: HeldModel, documents: list[Document], context: StageContext
) -> PreTrainedTokenizerBase:
    if stage.tokenizer is None:
        return held.tokenizer()
    folder = context.run.path / _TOKENIZER_FOLDER
    if not folder.exists():
        train_tokenizer(documents, stage.tokenizer).save(folder)
        say(f"    tokenizer of {stage.tokenizer.vocabulary_size} tokens trained")
    return AutoTokenizer.from_pretrained(folder)


def _model(
    stage: PretrainStage, held: HeldModel, tokenizer: PreTrainedTokenizerBase, seeds: SeedTree
) -> PreTrainedModel:
    if stage.shape is None:
        return held.model()
    with _drawing_from(seeds.child("weights")):
        config = shape_config(stage.shape, vocabulary_size=len(tokenizer))
        return FlanMoeT5ForConditionalGeneration(config).eval()


@contextmanager
def _drawing_from(seeds: SeedTree) -> Iterator[None]:
    """Let torch's global generator draw from a branch of the seed tree inside the `with` block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.integer())
        yield
