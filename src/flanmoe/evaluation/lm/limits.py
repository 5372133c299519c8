"""How many positions a model has."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
_UNKNOWN = 2048
# Tokenizers that know of no limit state an absurd one.
_ABSURD = 10**7


def longest_text(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the positions that a configuration states, else those of its tokenizer, else 2,048."""
    text_config = config.get_text_config()
    for name in _NAMES:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    stated = tokenizer.model_max_length
    return int(stated) if 0 < stated < _ABSURD else _UNKNOWN
