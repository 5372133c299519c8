"""A dense FlanMoeT5 from and to transformers' T5 (T5, T5.1.1, FLAN-T5): same tensors, same logits."""

import copy

import torch
from transformers import T5Config, T5ForConditionalGeneration

from flanmoe.core.errors import ModelError
from flanmoe.models.flan_moe_t5.configuration import SIDES, FlanMoeT5Config
from flanmoe.models.flan_moe_t5.model import FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.native import (
    HEAD,
    SHARED_TABLE,
    built_from,
    empty_model,
    load_native,
    named_tensors,
    require_tensors,
    shared_settings,
    with_one_table,
)


def load_t5(
    reference: str, *, dtype: torch.dtype = torch.float32
) -> FlanMoeT5ForConditionalGeneration:
    """Load a checkpoint of model type `t5` as a dense FlanMoeT5 on the CPU, in evaluation mode.

    A head of its own, as T5.1.1 and FLAN-T5 have, stays one. The relative attention bias that old checkpoints
    hold for the decoder's cross-attention is left out, as transformers does: nothing reads it.

    Args:
        reference: a folder or a hub id.
        dtype: of the weights.

    Raises:
        ModelError: if it cannot be read, is no T5, or lacks tensors or holds foreign ones, by name.
    """
    model, _ = load_native(reference, T5ForConditionalGeneration, dtype=dtype)
    return from_t5(model)


def from_t5(model: T5ForConditionalGeneration) -> FlanMoeT5ForConditionalGeneration:
    """Return a dense FlanMoeT5 with copies of a T5's weights, in their dtype, in evaluation mode.

    Raises:
        ModelError: if its sides do not share their embeddings, or a tensor is missing or foreign, by name.
        ConfigError: if its activation is not one of FlanMoeT5's.
    """
    tensors = named_tensors(model)
    require_tensors(
        tensors, empty_model(T5ForConditionalGeneration, model.config), of="The T5 given"
    )
    # One object under several names stays one in the copy.
    own = copy.deepcopy(with_one_table(tensors))
    config = FlanMoeT5Config(
        **shared_settings(model.config),
        feed_forward_proj=model.config.feed_forward_proj,
        tied_head=own[HEAD] is own[SHARED_TABLE],
        scale_decoder_outputs=model.config.scale_decoder_outputs,
    )
    dense = built_from(FlanMoeT5ForConditionalGeneration, config, own)
    dense.generation_config = copy.deepcopy(model.generation_config)
    return dense


def reasons_against_t5(config: FlanMoeT5Config) -> tuple[str, ...]:
    """Return every reason why a FlanMoeT5 is no T5; none if `to_t5` can write it."""
    return tuple(
        f"{len(sparse)} of the {config.layers(side)} layers of the {side} are sparse, and T5 has no experts"
        for side in SIDES
        if (sparse := config.sparse_layers(side))
    )


def to_t5(model: FlanMoeT5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """Return a T5 with copies of a dense FlanMoeT5's weights, in their dtype, in evaluation mode.

    With a head of its own the configuration says `tie_word_embeddings: false`, as published T5.1.1 and FLAN-T5
    checkpoints do; `from_pretrained` then keeps the two apart because they differ.

    Raises:
        ModelError: if layers are sparse, or a tensor is missing or foreign, by name.
    """
    config = model.config
    if reasons := reasons_against_t5(config):
        raise ModelError(f"A T5 must be dense, but {'; '.join(reasons)}. Use `to_switch`.")
    settings = {
        **shared_settings(config),
        "feed_forward_proj": config.feed_forward_proj,
        "scale_decoder_outputs": config.scale_decoder_outputs,
    }
    native = built_from(
        T5ForConditionalGeneration, T5Config(**settings), copy.deepcopy(named_tensors(model))
    )
    native.generation_config = copy.deepcopy(model.generation_config)
    if not config.tied_head:
        # transformers sets both to say "tied" whatever a T5 is told.
        native.all_tied_weights_keys.pop(HEAD)
        native.config.tie_word_embeddings = False
    return native
