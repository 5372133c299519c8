"""How many parameters a model has, or a configuration stands for."""

from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.models.expert_visits import routed_experts
from flanmoe.models.meta import as_model


class ParameterCount(Config):
    """Parameters of a model, tied ones once.

    Attributes:
        total: all of them.
        active: those that one token meets: all but the experts that it does not visit. Shared
            experts, routers and embeddings are active. Where experts choose their tokens, a token
            visits as many as they take it on average. In an encoder-decoder it is what a token of
            the input and one of the target meet together.
        trainable: those that training would change.
    """

    total: int
    active: int
    trainable: int


def count_parameters(model_or_config: PreTrainedModel | PreTrainedConfig) -> ParameterCount:
    """Count parameters from the module tree; a configuration is counted on the meta device.

    Raises:
        ModelError: if a sparse block cannot be read.
    """
    model = as_model(model_or_config)
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    inactive = sum(
        (1 - routed.share) * sum(parameter.numel() for parameter in routed.parameters())
        for routed in routed_experts(model)
    )
    return ParameterCount(
        total=total,
        active=round(total - inactive),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )
