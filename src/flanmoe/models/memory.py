"""Memory of a training run, estimated from the module tree before anything is allocated.

The estimate is for one process on the CPU that trains as `flanmoe` does: float32 weights, gradients
and AdamW moments, matrix products in bfloat16 under autocast (or float32), packed rows, no gradient
checkpointing, gradients that stay over several micro-batches. It adds up what is alive when a
backward pass begins:

- weights 4, gradients 4 and moments 8 bytes a parameter;
- autocast's bfloat16 copies of all matrices, which the backward pass needs: 2 bytes each;
- activations: what autograd saves for each token (`saved_bytes_per_token`), what the loss makes
  of the logits, and the gradients of the embedding and of a head tied to it, which wait for
  each other;
- the runtime: Python, torch, transformers and what they import, and what kernels keep.
"""

from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flops import attention_widths
from flanmoe.models.meta import as_model, embedding_weight, head_weight
from flanmoe.moe.block import MoEBlock

Precision = Literal["bfloat16", "float32"]
Optimizer = Literal["adamw", "sgd"]

# Resident memory of a process that has imported what a training run imports (0.5 GiB) and what
# allocator and kernels keep after a few steps; measured with torch 2.13 and transformers 5.23.
RUNTIME_BYTES = 700 * 2**20

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
        activations: what the forward pass saves for the backward pass, logits and their gradient.
        runtime: the process before it holds a model.
    """

    weights: int
    gradients: int
    optimizer: int
    weight_copies: int
    activations: int
    runtime: int

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
) -> MemoryEstimate:
    """Estimate the peak memory of training on micro-batches of `rows` rows of `length` tokens.

    Args:
        model_or_config: a model, or a configuration (nothing is built but shapes).
        rows: rows of one micro-batch.
        length: tokens in a row.
        loss_positions: positions of the micro-batch at which logits are computed; None for all.
        precision: what matrix products are computed in.
        optimizer: whose state is kept.
    """
    model = as_model(model_or_config)
    num_logits = rows * length if loss_positions is None else loss_positions
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    saved = rows * length * saved_bytes_per_token(model, precision, length=length)
    loss = num_logits * _bytes_per_logit(precision) * model.config.vocab_size
    return MemoryEstimate(
        weights=_FLOAT32 * sum(p.numel() for p in model.parameters()),
        gradients=_FLOAT32 * trainable,
        optimizer=_OPTIMIZER_BYTES[optimizer] * trainable,
        weight_copies=2 * matrices if precision == "bfloat16" else 0,
        activations=saved + loss + _waiting_gradients(model),
        runtime=RUNTIME_BYTES,
    )


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
    visit = width * (block.hidden_size + 4 * block.expert_width) + _FLOAT32 * block.hidden_size
    return block.top_k * visit + width * block.hidden_size


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


def _bytes_per_logit(precision: Precision) -> int:
    # The logits as computed, a float32 copy, log-probabilities, and the gradient of the
    # float32 ones.
    return _COMPUTE_BYTES[precision] + 3 * _FLOAT32


def _waiting_gradients(model: PreTrainedModel) -> int:
    """Return the bytes of embedding gradients that exist beside the accumulated one.

    An embedding's gradient is as large as its table. With a tied head there are two of them, and
    the head's waits through the whole backward pass for the embedding's.
    """
    table = embedding_weight(model)
    tied = head_weight(model) is table
    return _FLOAT32 * table.numel() * (2 if tied else 1)
