"""What a model is and costs before it exists: parameters, FLOPs, memory of training."""

from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flops import FlopCount, count_flops
from flanmoe.models.memory import MemoryEstimate as MemoryEstimate
from flanmoe.models.memory import estimate_memory as estimate_memory
from flanmoe.models.meta import as_model
from flanmoe.models.meta import meta_model as meta_model
from flanmoe.models.upcycle import sparse_config as sparse_config


class ParameterCount(Config):
    """Parameters of a model, tied ones once.

    Attributes:
        total: all of them.
        active: those that one token meets: all but the experts that it does not visit. Shared
            experts, routers and embeddings are active.
        trainable: those that training would change.
    """

    total: int
    active: int
    trainable: int


class ModelPlan(Config):
    """What a model is and what one token costs in it.

    Attributes:
        model_type: transformers' name of the architecture.
        parameters: counts.
        flops: forward operations of one token.
        num_sparse_layers: sparse blocks, 0 for a dense model.
        num_experts, top_k: of the first sparse block; 0 for a dense model.
    """

    model_type: str
    parameters: ParameterCount
    flops: FlopCount
    num_sparse_layers: int
    num_experts: int
    top_k: int


def count_parameters(model_or_config: PreTrainedModel | PreTrainedConfig) -> ParameterCount:
    """Count parameters from the module tree; a configuration is counted on the meta device."""
    model = as_model(model_or_config)
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    inactive = sum(
        sum(p.numel() for p in block.experts.parameters(recurse=False))
        // block.num_experts
        * (block.num_experts - block.top_k)
        for block in moe_blocks(model)
    )
    return ParameterCount(
        total=total,
        active=total - inactive,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )


def plan_model(model_or_config: PreTrainedModel | PreTrainedConfig, *, length: int) -> ModelPlan:
    """Count parameters and FLOPs of a model or a configuration at rows of `length` tokens."""
    model = as_model(model_or_config)
    blocks = moe_blocks(model)
    return ModelPlan(
        model_type=model.config.model_type,
        parameters=count_parameters(model),
        flops=count_flops(model, context_length=length),
        num_sparse_layers=len(blocks),
        num_experts=blocks[0].num_experts if blocks else 0,
        top_k=blocks[0].top_k if blocks else 0,
    )
