"""How many parameters a model has, or a configuration stands for."""

from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.meta import as_model


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
