"""What the data package needs from a tokenizer.

Any fast tokenizer of transformers fits. Data code never imports transformers itself: the tokenizer
comes in as an argument.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from flanmoe.core.errors import DataError


@runtime_checkable
class Tokenizer(Protocol):
    """A fast tokenizer: encodes with character offsets and knows how chats are written."""

    is_fast: bool
    chat_template: Any
    bos_token: Any
    bos_token_id: Any
    eos_token: Any
    eos_token_id: Any
    pad_token_id: Any

    def __call__(self, text: str | list[str], **options: Any) -> Mapping[str, Any]:
        """Encode one text, or several at once: then each value is a list with one entry a text."""
        ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """Write a conversation the way the model was trained on."""
        ...


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the id that fills up rows; any would do, since padding enters no loss."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a text.

    Raises:
        DataError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "A tokenizer needs an end-of-text token (`eos_token`), but this one has none, so a "
            "model could not learn to stop. Set it in the tokenizer's configuration."
        )
    return int(tokenizer.eos_token_id)


def num_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Return the tokens of a text, special ones left out."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
