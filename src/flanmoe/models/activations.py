"""What the activations of a decoder take while it trains, counted from the module tree.

`memory` adds them to weights, gradients and the rest; `activations_encoder_decoder` has the same of
encoder-decoders.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flops import attention_widths
from flanmoe.models.meta import embedding_weight, head_weight
from flanmoe.models.precision import Precision
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute import keep_activation, rows_at_a_time

FLOAT32_BYTES = 4
COMPUTE_BYTES: Mapping[Precision, int] = {"bfloat16": 2, "float32": 4}


class Activations(NamedTuple):
    """Bytes that the activations of one micro-batch take.

    Attributes:
        saved: what autograd saves in all layers.
        inputs: the inputs of all layers, which stay in place of that under gradient checkpointing.
        layer: what autograd saves in the layer that saves most.
        layer_copies: copies of the matrices of the layer that has most, in the precision of
            products.
        flowing: gradients that are alive while a layer goes backward, beside what is kept of those of
            weights, as far as they come on top of all that is saved.
        layer_flowing: the most of such gradients in any layer, on top of what that layer saves.
    """

    saved: int
    inputs: int
    layer: int
    layer_copies: int
    flowing: int
    layer_flowing: int


@dataclass(frozen=True, slots=True)
class SideBatch:
    """A micro-batch as one side of an encoder-decoder sees it, and the sizes that all layers share.

    Attributes:
        precision: of matrix products.
        rows: number of rows.
        own, other: tokens in a row of this side and, in a decoder, of the encoder.
        hidden_size, num_heads: of the model.
        dropping: whether the model's dropout is above 0.
        eager: whether attention is written out, as in Switch, and no kernel of torch's.
    """

    precision: Precision
    rows: int
    own: int
    other: int
    hidden_size: int
    num_heads: int
    dropping: bool
    eager: bool

    @property
    def width(self) -> int:
        """Bytes of a number in matrix products."""
        return COMPUTE_BYTES[self.precision]

    @property
    def num_tokens(self) -> int:
        """Tokens of this side."""
        return self.rows * self.own

    def inputs(self, linear_layers: int) -> int:
        """Return what linear layers that read the same vector of the residual stream keep of it."""
        kept = linear_layers if self.precision == "bfloat16" else 1
        return kept * self.width * self.hidden_size


def decoder_activations(
    model: PreTrainedModel, precision: Precision, *, rows: int, length: int
) -> Activations:
    """Count a decoder's for `rows` packed rows of `length` tokens; its layers are taken to be alike."""
    layers, num_tokens = model.config.num_hidden_layers, rows * length
    saved = num_tokens * saved_bytes_per_token(model, precision, length=length)
    copies = copied_bytes(model, precision)
    head = 2 * head_weight(model).numel() if copies else 0
    flowing = _flowing_bytes(model, num_tokens, COMPUTE_BYTES[precision])
    return Activations(
        saved=saved,
        inputs=layers * num_tokens * FLOAT32_BYTES * model.config.hidden_size,
        layer=saved // layers,
        layer_copies=(copies - head) // layers,
        flowing=flowing,
        layer_flowing=flowing,
    )


def copied_bytes(module: nn.Module, precision: Precision) -> int:
    """Return what autocast's copies of all matrices take."""
    if precision == "float32":
        return 0
    return 2 * sum(p.numel() for p in module.parameters() if p.ndim >= 2)


def waiting_bytes(model: PreTrainedModel) -> int:
    """Return the gradient of a tied head, which waits for that of the embedding; 0 without a tie."""
    table = head_weight(model)
    return FLOAT32_BYTES * table.numel() if table is embedding_weight(model) else 0


def _flowing_bytes(model: PreTrainedModel, num_tokens: int, width: int) -> int:
    """Return the gradients that are alive while a layer goes backward, on top of what is kept of weights'.

    Four float32 vectors a token: of the residual stream, and of what a norm reads, makes and
    scales; beside them what a sparse block works with. A head that is tied to the embedding keeps
    its gradient, which waits for the embedding's.
    """
    flowing = 4 * num_tokens * FLOAT32_BYTES * model.config.hidden_size
    working = [
        working_bytes(
            block.top_k * num_tokens,
            block.num_experts,
            block.experts.parameters(),
            hidden_size=block.hidden_size,
            product_width=2 * block.expert_width,
            expert_width=block.expert_width,
            width=width,
        )
        for block in moe_blocks(model)
    ]
    return flowing + max(working, default=0) + waiting_bytes(model)


def working_bytes(
    visits: int,
    num_experts: int,
    parameters: Iterable[nn.Parameter],
    *,
    hidden_size: int,
    product_width: int,
    expert_width: int,
    width: int,
) -> int:
    """Return what experts take while they go backward, beside what is saved.

    The gradients of their parameters, whole, before they are added to those of earlier
    micro-batches; and for each row that they work on at a time one place for its input and the gradient
    of its output, the gradient of its first product, and twice what the second product takes. Below
    float32 there is beside that, in float32, twice what the second product takes, or the gradient of
    the input.

    Args:
        visits: rows of all experts.
        num_experts: how many there are.
        parameters: of all of them.
        hidden_size, product_width, expert_width: numbers in a row, in its first product, and in what
            the second one takes.
        width: bytes of a number in products.
    """
    rows = rows_at_a_time(visits, num_experts, product_width * width)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    at_work = width * (hidden_size + product_width + 2 * expert_width)
    if width < FLOAT32_BYTES:
        at_work += FLOAT32_BYTES * max(2 * expert_width, hidden_size)
    return rows * at_work + FLOAT32_BYTES * trained


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
    - a sparse block keeps the fused product of each of the k visits, c * 2 * I, and c * I more where
      it keeps the activation; its router and its experts keep their input, c * H each where autocast
      casts it, together one otherwise.
    """
    width = COMPUTE_BYTES[precision]
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
    inputs = 1 if width == FLOAT32_BYTES else 2
    units = (2 + int(keep_activation(block.experts))) * block.expert_width
    return width * (block.top_k * units + inputs * block.hidden_size)


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
