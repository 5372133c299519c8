"""Memory of a training run, estimated from the module tree before anything is allocated.

The estimate is for one process on the CPU: float32 weights and gradients, AdamW's two moments,
    matrix
products in bfloat16 under autocast (or float32), no gradient checkpointing, gradients kept over
several micro-batches. It adds up what is alive when a backward pass begins:

- weights 4, gradients 4 and moments 8 bytes a parameter;
- autocast's bfloat16 copies of all weight matrices, which the backward pass needs: 2 bytes each;
- activations: what autograd saves for each token (`saved_bytes_per_token`), and the logits;
- the runtime: Python, torch, transformers and what they import.

`benchmarks` of the quickstart print the estimate beside the measured peak.
"""

from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flops import attention_widths
from flanmoe.models.meta import as_model
from flanmoe.moe.block import MoEBlock

Precision = Literal["bfloat16", "float32"]
Optimizer = Literal["adamw", "sgd"]

# Resident memory of a process that has imported what a training run imports, and run one small step
# (measured with torch 2.13, transformers 5.23 on Linux).
RUNTIME_BYTES = 800 * 2**20

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
    num_tokens = rows * length
    num_logits = num_tokens if loss_positions is None else loss_positions
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    saved = num_tokens * saved_bytes_per_token(model, precision)
    return MemoryEstimate(
        weights=_FLOAT32 * sum(p.numel() for p in model.parameters()),
        gradients=_FLOAT32 * trainable,
        optimizer=_OPTIMIZER_BYTES[optimizer] * trainable,
        weight_copies=2 * matrices if precision == "bfloat16" else 0,
        activations=saved + num_logits * _bytes_per_logit(precision) * model.config.vocab_size,
        runtime=RUNTIME_BYTES,
    )


def saved_bytes_per_token(model: PreTrainedModel, precision: Precision) -> int:
    """Return the bytes that autograd keeps for one token, over all layers.

    With c bytes a number in matrix products:

    - every linear layer keeps its input, c * in. Autocast casts anew for each layer, so that
    queries, keys
      and values hold three copies; in float32 they share one.
    - every norm of width D keeps its input and the normalised input, both float32: 8 * D. -
    attention keeps queries, keys and values in all heads, and its output (which the output
    projection
      shares): c * (2 * query width + value width).
    - a gated FFN of width I keeps the gate, its activation and the up product: c * 3 * I (their
    product is
      the down projection's input, counted above).
    - a sparse block keeps for each of the k visits the expert's input, the fused product, the
    activation
      and the input of the down matrix, c * (H + 4 * I), and the output in float32, 4 * H.
    """
    width = _COMPUTE_BYTES[precision]
    blocks = moe_blocks(model)
    total = sum(_block_bytes(block, width) for block in blocks)
    total += sum(width * (2 * keys + values) for keys, values in attention_widths(model))
    for module in model.modules():
        children = dict(module.named_children())
        total += _linear_input_bytes(module, precision, model)
        total += sum(8 * _norm_width(name, child) for name, child in children.items())
        down = children.get("down_proj")
        if isinstance(down, nn.Linear):
            total += width * 3 * down.in_features
    return total


def _block_bytes(block: MoEBlock, width: int) -> int:
    visits = block.top_k * width * (block.hidden_size + 4 * block.expert_width)
    return visits + _FLOAT32 * block.top_k * block.hidden_size


def _linear_input_bytes(module: nn.Module, precision: Precision, model: PreTrainedModel) -> int:
    if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
        return 0
    # In float32 the projections of one input share it; a third stands for queries, keys and values.
    share = 1.0 if precision == "bfloat16" else 1 / 3
    return int(_COMPUTE_BYTES[precision] * module.in_features * share)


def _norm_width(name: str, child: nn.Module) -> int:
    """Return the width of a norm, 0 for anything else: a norm's only parameter is one row."""
    parameters = dict(child.named_parameters(recurse=False))
    weight = parameters.get("weight")
    is_norm = "norm" in name and weight is not None and weight.ndim == 1
    return weight.numel() if is_norm and weight is not None else 0


def _bytes_per_logit(precision: Precision) -> int:
    # The logits as computed, their float32 copy, log-probabilities, and the gradient of the float32
    # ones.
    return _COMPUTE_BYTES[precision] + 3 * _FLOAT32
