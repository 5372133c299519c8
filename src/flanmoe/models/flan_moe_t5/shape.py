"""The shape of a FlanMoeT5 that starts from nothing: a published name, or settings of one's own."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config
from flanmoe.models.flan_moe_t5.named import named_config

# What follows from the tokenizer or belongs to transformers.
_NOT_A_SHAPE = frozenset(
    {
        "vocab_size",
        "pad_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "is_encoder_decoder",
        "is_decoder",
        "tie_word_embeddings",
        "use_cache",
    }
)
_SHAPE = tuple(name for name in FlanMoeT5Config.__annotations__ if name not in _NOT_A_SHAPE)


def shape_config(shape: str | Mapping[str, Any], *, vocabulary_size: int) -> FlanMoeT5Config:
    """Return the configuration of a shape with so many tokens.

    Args:
        shape: a name of `flanmoe.models.flan_moe_t5.named`, or fields of `FlanMoeT5Config`; the others keep
            their defaults.
        vocabulary_size: tokens of the tokenizer.

    Raises:
        ConfigError: if the name or a field is not known, or a value does not fit.
    """
    if isinstance(shape, str):
        config = named_config(shape)
        config.vocab_size = vocabulary_size
        return config
    for name in shape:
        if name not in _SHAPE:
            raise ConfigError(
                f"A shape has no field `{name}`.{nearest_name_hint(name, _SHAPE)} Known: "
                f"{listing(_SHAPE, limit=len(_SHAPE))}."
            )
    try:
        return FlanMoeT5Config(vocab_size=vocabulary_size, **shape)
    except (TypeError, ValueError, StrictDataclassError) as error:
        # What transformers raises for a value of the wrong type.
        reason = " ".join(str(error).split())
        raise ConfigError(f"A shape must hold values of a FlanMoeT5, but: {reason}") from error
