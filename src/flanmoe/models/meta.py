"""Models without weights: the module tree of a configuration on the meta device, to be counted."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from flanmoe.core.errors import ModelError


def auto_class(config: PreTrainedConfig) -> Any:
    """Return transformers' Auto class of a language model: of encoder-decoders, or of causal ones."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the language model of a configuration on the meta device: every shape, no memory.

    A causal one, or an encoder-decoder where the configuration is of one. Tied embeddings are one
    parameter there too. The configuration itself is left as it is.
    """
    with torch.device("meta"):
        return auto_class(config).from_config(copy.deepcopy(config)).eval()


def as_model(model_or_config: PreTrainedModel | PreTrainedConfig) -> PreTrainedModel:
    """Return a model to count: the model itself, or its configuration's on the meta device."""
    if isinstance(model_or_config, PreTrainedConfig):
        return meta_model(model_or_config)
    return model_or_config


def head_weight(model: PreTrainedModel) -> Float[Tensor, "V H"]:
    """Return the matrix that projects to the vocabulary.

    Raises:
        ModelError: if the model has no head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"A language model must have a head over its vocabulary, but {type(model).__name__} "
            "has none. Load it with a class that has one."
        )
    return head.get_parameter("weight")


def embedding_weight(model: PreTrainedModel) -> Float[Tensor, "V H"]:
    """Return the table of token embeddings; the head's matrix itself where the two are tied."""
    return model.get_input_embeddings().get_parameter("weight")
