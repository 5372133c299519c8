"""What a model's own generation settings ask for, and which of that greedy writing does."""

from typing import Any

from transformers import PreTrainedModel

from flanmoe.core.console import warn
from flanmoe.core.names import listing

# Settings that change what is written greedily, with the values that stand for nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "repetition_penalty": (None, 1.0),
    "suppress_tokens": (None,),
}


def forced_first_token(model: PreTrainedModel) -> int | None:
    """Return the token that a model's settings begin every answer with, such as a language."""
    settings: Any = model.generation_config
    found = None if settings is None else settings.forced_bos_token_id
    return None if found is None else int(found)


def warn_of_settings_without_effect(model: PreTrainedModel) -> None:
    """Name the settings with which transformers' `generate` would write something else."""
    settings: Any = model.generation_config
    found = [
        f"{name}={value}"
        for name, nothing in _WITHOUT_EFFECT.items()
        if settings is not None and (value := getattr(settings, name, None)) not in nothing
    ]
    if found:
        warn(
            "Answers are the likeliest tokens here, so these generation settings of the model have no effect: "
            f"{listing(found)}."
        )
