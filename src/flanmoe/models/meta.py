"""Models without weights: the module tree of a configuration on the meta device, to be counted."""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration on the meta device: every shape, no memory.

    Tied embeddings are one parameter there too. The configuration itself is left as it is.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def as_model(model_or_config: PreTrainedModel | PreTrainedConfig) -> PreTrainedModel:
    """Return a model to count: the model itself, or its configuration's on the meta device."""
    if isinstance(model_or_config, PreTrainedConfig):
        return meta_model(model_or_config)
    return model_or_config
