"""Memory of a training run, estimated from the module tree before anything is allocated.

The estimate is for one process on the CPU that trains as `flanmoe` does: float32 weights, gradients
and AdamW moments, matrix products in bfloat16 under autocast (or float32), packed rows, gradients
that stay over several micro-batches. It adds up what is alive at the fullest moment of a
micro-batch, which is near the beginning of its backward pass:

- weights 4, gradients 4 and moments 8 bytes a parameter;
- autocast's bfloat16 copies of all matrices, which the backward pass needs: 2 bytes each;
- activations: what autograd saves for each token (`saved_bytes_per_token`), and the most that comes
  beside it: what the loss makes of the logits, the gradient of the head, or the gradients that flow
  through the last layer;
- the runtime: Python, torch, transformers and what they import, and what kernels keep;
- the allocator: holes in the heap.

With gradient checkpointing only the input of each layer is saved, and the activations and copies of
one layer at a time are there again during the backward pass.
"""

from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flops import attention_widths
from flanmoe.models.meta import as_model, embedding_weight, head_weight
from flanmoe.models.precision import Precision
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.experts import ROW_MULTIPLE

Optimizer = Literal["adamw", "sgd"]

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

_OPTIMIZER_BYTES: dict[Optimizer, int] = {"adamw": 8, "sgd": 0}
_FLOAT32 = 4
_COMPUTE_BYTES: dict[Precision, int] = {"bfloat16": 2, "float32": 4}


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
    loss_positions: int | None = None,
    precision: Precision = "bfloat16",
    optimizer: Optimizer = "adamw",
    gradient_checkpointing: bool = False,
) -> MemoryEstimate:
    """Estimate the peak memory of training on micro-batches of `rows` rows of `length` tokens.

    Args:
        model_or_config: a model, or a configuration (nothing is built but shapes).
        rows: rows of one micro-batch.
        length: tokens in a row.
        loss_positions: positions of the micro-batch at which logits are computed, which the data
            decides; None for all, the most there can be.
        precision: what matrix products are computed in.
        optimizer: whose state is kept.
        gradient_checkpointing: whether each layer keeps its input alone and runs twice.
    """
    model = as_model(model_or_config)
    num_logits = rows * length if loss_positions is None else loss_positions
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = rows * length * saved_bytes_per_token(model, precision, length=length)
    saved += _rounding_bytes(model, precision)
    work = _Work(
        precision=precision,
        num_tokens=rows * length,
        num_logits=num_logits,
        saved=saved,
    )
    moments = _recomputing(model, work) if gradient_checkpointing else _keeping(model, work)
    fullest = max(moments, key=sum)
    made_anew = _FLOAT32 * trainable + fullest.copies + fullest.saved
    return MemoryEstimate(
        weights=_FLOAT32 * sum(p.numel() for p in model.parameters()),
        gradients=_FLOAT32 * trainable,
        optimizer=_OPTIMIZER_BYTES[optimizer] * trainable,
        weight_copies=fullest.copies,
        activations=fullest.saved + fullest.beside,
        runtime=RUNTIME_BYTES,
        allocator=int(_HEAP_HOLES * made_anew),
    )


class _Work(NamedTuple):
    """A micro-batch: precision, tokens, positions with logits, and bytes saved in all layers."""

    precision: Precision
    num_tokens: int
    num_logits: int
    saved: int


class _Moment(NamedTuple):
    """Bytes alive at one moment: copies of weights, saved activations, and what is beside them."""

    copies: int
    saved: int
    beside: int


def _keeping(model: PreTrainedModel, work: _Work) -> list[_Moment]:
    """Return the moments that can be the fullest when every layer keeps its activations."""
    copies = _copied_bytes(model, work.precision)
    return [
        _Moment(copies, work.saved, _loss_bytes(model, work)),
        _Moment(copies, work.saved, _flowing_bytes(model, work)),
    ]


def _recomputing(model: PreTrainedModel, work: _Work) -> list[_Moment]:
    """Return the moments that can be the fullest under gradient checkpointing."""
    layers = model.config.num_hidden_layers
    inputs = layers * work.num_tokens * _FLOAT32 * model.config.hidden_size
    width = _COMPUTE_BYTES[work.precision]
    copies = _copied_bytes(model, work.precision)
    head = 2 * head_weight(model).numel() if copies else 0
    logits = work.num_logits * width * model.config.vocab_size
    return [
        # The forward pass ends: autocast still holds all copies.
        _Moment(copies, inputs, logits),
        _Moment(head, inputs, _loss_bytes(model, work)),
        # The last layer has run again, and goes backward.
        _Moment(
            (copies - head) // layers,
            inputs + work.saved // layers,
            _flowing_bytes(model, work),
        ),
    ]


def _copied_bytes(model: PreTrainedModel, precision: Precision) -> int:
    if precision == "float32":
        return 0
    return 2 * sum(p.numel() for p in model.parameters() if p.ndim >= 2)


def _loss_bytes(model: PreTrainedModel, work: _Work) -> int:
    """Return what the loss makes of the logits, or the gradient of the head if that is more.

    Logits: as computed, a float32 copy, log-probabilities, and the gradient of the float32 ones.
    The gradient of the head is computed in the precision of its product and then cast.
    """
    width = _COMPUTE_BYTES[work.precision]
    logits = work.num_logits * (width + 3 * _FLOAT32) * model.config.vocab_size
    cast = width if work.precision == "bfloat16" else 0
    return max(logits, (cast + _FLOAT32) * head_weight(model).numel())


def _flowing_bytes(model: PreTrainedModel, work: _Work) -> int:
    """Return the gradients that are alive while a layer goes backward, beside those of weights.

    Four float32 vectors a token: of the residual stream, and of what a norm reads, makes and
    scales. A sparse block has two for each visit in place of the last: of the expert's output
    before and after it is put back into the order of the tokens. A head that is tied to the
    embedding keeps its gradient, which waits for the embedding's.
    """
    visits = max((block.top_k for block in moe_blocks(model)), default=0)
    vectors = 3 + 2 * visits if visits else 4
    table = head_weight(model)
    waiting = _FLOAT32 * table.numel() if table is embedding_weight(model) else 0
    return work.num_tokens * vectors * _FLOAT32 * model.config.hidden_size + waiting


def saved_bytes_per_token(model: PreTrainedModel, precision: Precision, *, length: int) -> int:
    """Return the bytes that autograd keeps for one token of a packed row, over all layers.

    With c bytes a number in matrix products (tests compare with what autograd really saves):

    - a linear layer keeps its input, c * in. Autocast casts anew for each layer, so that queries,
      keys and values hold three copies; in float32 they share one.
    - a norm of width D keeps its input and the normalised input, both float32: 8 * D.
    - attention keeps queries, keys and values in all heads (its output is the output projection's
      input), and each token's row of the mask: c * (2 * query width + value width + length).
    - a gated FFN of width I keeps the gate, its activation and the up product: c * 3 * I (their
      product is the down projection's input).
    - a sparse block keeps for each of the k visits the expert's input, the fused product, the
      activation and the input of the down matrix, c * (H + 4 * I), and the output in float32,
      4 * H; its router keeps its input, c * H.
    """
    width = _COMPUTE_BYTES[precision]
    total = sum(_block_bytes(block, width) for block in moe_blocks(model))
    total += sum(width * (2 * keys + values + length) for keys, values in attention_widths(model))
    for module in model.modules():
        children = dict(module.named_children())
        total += width * _linear_inputs(children, precision, model.get_output_embeddings())
        total += 8 * sum(_norm_width(name, child, children) for name, child in children.items())
        down = children.get("down_proj")
        if isinstance(down, nn.Linear):
            total += width * 3 * down.in_features
    return total


def _block_bytes(block: MoEBlock, width: int) -> int:
    return block.top_k * _visit_bytes(block, width) + width * block.hidden_size


def _visit_bytes(block: MoEBlock, width: int) -> int:
    return width * (block.hidden_size + 4 * block.expert_width) + _FLOAT32 * block.hidden_size


def _rounding_bytes(model: PreTrainedModel, precision: Precision) -> int:
    """Return what the rows saved that experts are given beyond their visits."""
    if precision != "bfloat16":
        return 0
    return sum(
        block.num_experts * (ROW_MULTIPLE // 2) * _visit_bytes(block, _COMPUTE_BYTES[precision])
        for block in moe_blocks(model)
    )


def _linear_inputs(
    children: dict[str, nn.Module], precision: Precision, head: nn.Module | None
) -> int:
    """Return how many numbers the linear layers of one module keep for a token."""
    linear = {
        name: child.in_features
        for name, child in children.items()
        if isinstance(child, nn.Linear) and child is not head
    }
    if precision == "bfloat16":
        return sum(linear.values())
    # Without casts, layers that read the same tensor keep it once. Output projections read
    # their own.
    own = [linear.pop(name) for name in ("o_proj", "down_proj") if name in linear]
    return sum(own) + sum(set(linear.values()))


def _norm_width(name: str, child: nn.Module, siblings: dict[str, nn.Module]) -> int:
    """Return the numbers a norm works on for one token, 0 for anything else.

    A norm's only parameter is one row. Norms of queries and keys may run over each head by itself.
    """
    shapes = [parameter.shape for parameter in child.parameters()]
    if "norm" not in name or len(shapes) != 1 or len(shapes[0]) != 1:
        return 0
    projection = siblings.get(name.replace("norm", "proj"))
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return shapes[0][0]
