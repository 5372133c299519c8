"""Memory of a training run, estimated from the module tree before anything is allocated.

The estimate is for one process on the CPU that trains as `flanmoe` does: float32 weights, gradients
and AdamW moments, matrix products in bfloat16 under autocast (or float32), packed rows, gradients
that stay over several micro-batches. It adds up what is alive at the fullest moment of a
micro-batch, which is near the beginning of its backward pass:

- weights 4, gradients 4 and moments 8 bytes a parameter;
- autocast's bfloat16 copies of all matrices, which the backward pass needs: 2 bytes each;
- activations: what autograd saves for each token (`activations`, and for encoder-decoders
  `activations_encoder_decoder`), and the most that comes beside it: what the loss makes of the
  logits, the gradient of the head, or the gradients that flow through a layer;
- the runtime: Python, torch, transformers and what they import, and what kernels keep;
- the allocator: holes in the heap.

With gradient checkpointing only the input of each layer is saved, and the activations and copies of
one layer at a time are there again during the backward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.models.activations import (
    COMPUTE_BYTES,
    FLOAT32_BYTES,
    Activations,
    copied_bytes,
    decoder_activations,
)
from flanmoe.models.activations_encoder_decoder import encoder_decoder_activations
from flanmoe.models.meta import as_model, head_weight
from flanmoe.models.optimizer_state import Optimizer, optimizer_bytes
from flanmoe.models.precision import Precision

# Resident memory of the process of a run before it holds a model (0.6 GiB: libraries, tokenizer,
# tasks) and the kernels that oneDNN compiles and keeps; measured with torch 2.13 and
# transformers 5.23.
RUNTIME_BYTES = 700 * 2**20
# Gradients, copies and activations are freed and made anew in every step. glibc keeps freed blocks
# below 32 MiB in its heap, where the next ones do not fill the holes. After 5 steps of SmolLM2-135M
# on 1024 tokens, holes took up 0.27 of what is made anew in the dense model and 0.20 in its sparse
# twin, beyond what the runtime above has to spare; after 2 steps there are hardly any. With each
# block mapped by itself (MALLOC_MMAP_THRESHOLD_=262144) there were none, and a step took a fifth
# longer.
_HEAP_HOLES = 0.25


class MemoryEstimate(Config):
    """Bytes of a training run at its peak, by what holds them.

    Attributes:
        weights: the parameters.
        gradients: one for each trainable parameter.
        optimizer: the optimizer's state.
        weight_copies: matrices in the precision that products are computed in.
        activations: what the forward pass saves for the backward pass, and what is beside it.
        runtime: the process before it holds a model.
        allocator: holes that freed blocks leave in the heap.
    """

    weights: int
    gradients: int
    optimizer: int
    weight_copies: int
    activations: int
    runtime: int
    allocator: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def estimate_memory(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    *,
    rows: int,
    length: int,
    target_length: int | None = None,
    loss_positions: int | None = None,
    precision: Precision = "bfloat16",
    optimizer: Optimizer = "adamw",
    gradient_checkpointing: bool = False,
    beside: Sequence[nn.Parameter] = (),
) -> MemoryEstimate:
    """Estimate the peak memory of training on micro-batches of `rows` rows of `length` tokens.

    Args:
        model_or_config: a model, or a configuration (nothing is built but shapes).
        rows: rows of one micro-batch.
        length: tokens in a row; of an encoder-decoder, those of its inputs.
        target_length: tokens in a row of targets; of an encoder-decoder alone.
        loss_positions: positions of the micro-batch at which logits are computed, which the data
            decides; None for all, the most there can be.
        precision: what matrix products are computed in.
        optimizer: whose state is kept.
        gradient_checkpointing: whether each layer keeps its input alone and runs twice.
        beside: what trains beside the model's own weights, such as adapters; they may be on the meta device.

    Raises:
        ModelError: if an encoder-decoder has no `target_length` or a decoder has one, or the
            activations of the model cannot be counted.
    """
    model = as_model(model_or_config)
    activations, targets = _activations(model, precision, rows, length, target_length)
    work = _Work(
        precision=precision,
        num_logits=rows * targets if loss_positions is None else loss_positions,
        copies=copied_bytes(model, precision),
        activations=activations,
    )
    moments = _recomputing(model, work) if gradient_checkpointing else _keeping(model, work)
    fullest = max(moments, key=sum)
    weights = [*model.parameters(), *beside]
    trainable = sum(weight.numel() for weight in weights if weight.requires_grad)
    made_anew = FLOAT32_BYTES * trainable + fullest.copies + fullest.saved
    return MemoryEstimate(
        weights=FLOAT32_BYTES * sum(weight.numel() for weight in weights),
        gradients=FLOAT32_BYTES * trainable,
        optimizer=optimizer_bytes(weights, optimizer),
        weight_copies=fullest.copies,
        activations=fullest.saved + fullest.beside,
        runtime=RUNTIME_BYTES,
        allocator=int(_HEAP_HOLES * made_anew),
    )


def _activations(
    model: PreTrainedModel, precision: Precision, rows: int, length: int, target_length: int | None
) -> tuple[Activations, int]:
    """Return what a micro-batch keeps, and the number of tokens in a row that can have logits."""
    name = type(model).__name__
    if not model.config.is_encoder_decoder:
        if target_length is not None:
            raise ModelError(
                f"A decoder's rows have one length, but `target_length` is {target_length} for {name}. "
                "Leave it out."
            )
        return decoder_activations(model, precision, rows=rows, length=length), length
    if target_length is None:
        raise ModelError(
            f"The memory of {name} depends on the lengths of inputs and of targets, but only "
            f"`length: {length}` is given. Give `target_length` too."
        )
    activations = encoder_decoder_activations(
        model, precision, rows=rows, input_length=length, target_length=target_length
    )
    return activations, target_length


class _Work(NamedTuple):
    """A micro-batch: precision, positions with logits, copies of all matrices, and activations."""

    precision: Precision
    num_logits: int
    copies: int
    activations: Activations


class _Moment(NamedTuple):
    """Bytes alive at one moment: copies of weights, saved activations, and what is beside them."""

    copies: int
    saved: int
    beside: int


def _keeping(model: PreTrainedModel, work: _Work) -> list[_Moment]:
    """Return the moments that can be the fullest when every layer keeps its activations."""
    saved = work.activations.saved
    return [
        _Moment(work.copies, saved, _loss_bytes(model, work)),
        _Moment(work.copies, saved, work.activations.flowing),
    ]


def _recomputing(model: PreTrainedModel, work: _Work) -> list[_Moment]:
    """Return the moments that can be the fullest under gradient checkpointing."""
    kept = work.activations
    head = 2 * head_weight(model).numel() if work.copies else 0
    logits = work.num_logits * COMPUTE_BYTES[work.precision] * model.config.vocab_size
    return [
        # The forward pass ends: autocast still holds all copies.
        _Moment(work.copies, kept.inputs, logits),
        _Moment(head, kept.inputs, _loss_bytes(model, work)),
        # A layer has run again, and goes backward.
        _Moment(kept.layer_copies, kept.inputs + kept.layer, kept.layer_flowing),
    ]


def _loss_bytes(model: PreTrainedModel, work: _Work) -> int:
    """Return what the loss makes of the logits, or the gradient of the head if that is more.

    Logits: as computed, a float32 copy, log-probabilities, and the gradient of the float32 ones.
    The gradient of the head is computed in the precision of its product and then cast.
    """
    width = COMPUTE_BYTES[work.precision]
    logits = work.num_logits * (width + 3 * FLOAT32_BYTES) * model.config.vocab_size
    cast = width if work.precision == "bfloat16" else 0
    return max(logits, (cast + FLOAT32_BYTES) * head_weight(model).numel())
