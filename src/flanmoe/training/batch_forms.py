"""What a batch is to the trainer: rows of a decoder, or pairs of rows of an encoder and a decoder.

An encoder's routers see its tokens and a decoder's see others, so real tokens and examples of a step differ
from side to side, and router losses are divided by those of their own side. Everything that knows the
columns of a batch is here and in `rows`; the trainer knows forms alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from flanmoe.core.errors import DataError
from flanmoe.data.collate import collate, collate_pairs
from flanmoe.data.example import IGNORED_LABEL, Packed, PackedPair
from flanmoe.models.flan_moe_t5.configuration import Side
from flanmoe.models.packing import takes_segments
from flanmoe.moe.block import MoEBlock
from flanmoe.training.rows import (
    Batch,
    StepTotals,
    example_numbers,
    target_positions,
    valid_tokens,
)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a batch is to predict. B rows, K positions.

    Attributes:
        positions: where any row predicts a token that enters the loss.
        labels: the tokens predicted there, -100 where a row predicts none.
    """

    positions: Int[Tensor, " K"]
    labels: Int[Tensor, "B K"]


class BatchForm(ABC):
    """How rows become a batch, and a batch a forward pass."""

    @abstractmethod
    def collated(
        self, rows: Sequence[Any], *, task_numbers: Mapping[str, int] | None = None
    ) -> Batch:
        """Stack rows into a batch.

        Args:
            rows: the rows.
            task_numbers: number of each task by its name, where the batch is to carry them.

        Raises:
            DataError: if they are rows for another kind of model, or of a task without a number.
        """

    @abstractmethod
    def totals(self, batches: Sequence[Batch]) -> dict[Side, StepTotals]:
        """Count what the micro-batches of one process hold, side by side."""

    @abstractmethod
    def side_of(self, block: MoEBlock) -> Side:
        """Return the side whose tokens a sparse block sees."""

    @abstractmethod
    def task_ids(self, batch: Batch) -> dict[Side, Int[Tensor, " _"]]:
        """Return for each token the number of its task, side by side; the batch must carry them."""

    @abstractmethod
    def targets(self, batch: Batch) -> Targets:
        """Return what a batch is to predict, and where."""

    @abstractmethod
    def told_to_recorder(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return what `RoutingRecorder.recording` must be told; nothing where routers know it."""

    @abstractmethod
    def run(self, model: nn.Module, batch: Batch, *, positions: Int[Tensor, " K"]) -> Any:
        """Run a forward pass and return the model's output, its logits those of `positions` alone."""


@final
class DecoderForm(BatchForm):
    """`Packed` rows for a causal decoder, whose labels are unshifted.

    The model is given `position_ids` that restart with every example, no attention mask and no cache,
    which keeps the examples of a row apart in most native transformers decoders.
    """

    def collated(
        self, rows: Sequence[Any], *, task_numbers: Mapping[str, int] | None = None
    ) -> Batch:
        """Stack rows into a batch."""
        _require_rows(rows, Packed, model="A decoder")
        return collate(rows, task_numbers=task_numbers)

    def totals(self, batches: Sequence[Batch]) -> dict[Side, StepTotals]:
        """Count what the micro-batches of one process hold."""
        return {"decoder": StepTotals.of(batches)}

    def side_of(self, block: MoEBlock) -> Side:
        """Return the one side there is."""
        return "decoder"

    def task_ids(self, batch: Batch) -> dict[Side, Int[Tensor, " _"]]:
        """Return the number of each token's task, row after row."""
        return {"decoder": batch["task_ids"].reshape(-1)}

    def targets(self, batch: Batch) -> Targets:
        """Return the positions before the tokens that enter the loss, and these tokens."""
        positions = target_positions(batch)
        return Targets(positions, batch["labels"][:, positions + 1])

    def told_to_recorder(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return which tokens are real and to which example each belongs: native routers do not know."""
        return {"valid": valid_tokens(batch), "segments": example_numbers(batch)}

    def run(self, model: nn.Module, batch: Batch, *, positions: Int[Tensor, " K"]) -> Any:
        """Run a forward pass."""
        return model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            logits_to_keep=positions,
        )


class PairForm(BatchForm):
    """`PackedPair` rows for an encoder-decoder, whose labels stand where they are predicted.

    Its routers must be ours: the model tells them which tokens are padding.
    """

    def collated(
        self, rows: Sequence[Any], *, task_numbers: Mapping[str, int] | None = None
    ) -> Batch:
        """Stack rows into a batch."""
        _require_rows(rows, PackedPair, model="An encoder-decoder")
        return collate_pairs(rows, task_numbers=task_numbers)

    def totals(self, batches: Sequence[Batch]) -> dict[Side, StepTotals]:
        """Count what the micro-batches of one process hold; what enters the loss is the decoder's."""
        loss_tokens = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches)
        encoder = [batch["segment_ids"] for batch in batches]
        decoder = [batch["decoder_segment_ids"] for batch in batches]
        return {
            "encoder": StepTotals.of_segments(encoder, loss_tokens=0),
            "decoder": StepTotals.of_segments(decoder, loss_tokens=loss_tokens),
        }

    def side_of(self, block: MoEBlock) -> Side:
        """Return the side that the block's name begins with."""
        return "encoder" if block.name.startswith("encoder.") else "decoder"

    def task_ids(self, batch: Batch) -> dict[Side, Int[Tensor, " _"]]:
        """Return the number of each token's task, row after row, on both sides."""
        return {
            "encoder": batch["task_ids"].reshape(-1),
            "decoder": batch["decoder_task_ids"].reshape(-1),
        }

    def targets(self, batch: Batch) -> Targets:
        """Return the decoder's positions that enter the loss in any row, and their labels."""
        positions = (batch["labels"] != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
        return Targets(positions, batch["labels"][:, positions])

    def told_to_recorder(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return nothing."""
        return {}


@final
class SegmentedPairForm(PairForm):
    """Pairs for a model that is told the examples of a row by their segments, as FlanMoeT5 is."""

    def run(self, model: nn.Module, batch: Batch, *, positions: Int[Tensor, " K"]) -> Any:
        """Run a forward pass."""
        return model(
            input_ids=batch["input_ids"],
            segment_ids=batch["segment_ids"],
            decoder_input_ids=batch["decoder_input_ids"],
            decoder_segment_ids=batch["decoder_segment_ids"],
            use_cache=False,
            logits_to_keep=positions,
        )


@final
class MaskedPairForm(PairForm):
    """Pairs for a model that knows attention masks alone, as transformers' T5: one example in a row."""

    def run(self, model: nn.Module, batch: Batch, *, positions: Int[Tensor, " K"]) -> Any:
        """Run a forward pass; such models compute all logits."""
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=(batch["segment_ids"] != 0).long(),
            decoder_input_ids=batch["decoder_input_ids"],
            decoder_attention_mask=(batch["decoder_segment_ids"] != 0).long(),
            use_cache=False,
        )
        output.logits = output.logits[:, positions]
        return output


def form_of(model: PreTrainedModel) -> BatchForm:
    """Return the form of the batches that a model is trained on."""
    if not model.config.is_encoder_decoder:
        return DecoderForm()
    return SegmentedPairForm() if takes_segments(model) else MaskedPairForm()


def _require_rows(rows: Sequence[Any], kind: type[Packed | PackedPair], *, model: str) -> None:
    wrong = sorted({type(row).__name__ for row in rows if not isinstance(row, kind)})
    if wrong:
        raise DataError(
            f"{model} is trained on rows of the kind {kind.__name__}, but the stream gives "
            f"{wrong[0]}. Pack the data for this kind of model."
        )
