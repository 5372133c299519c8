"""What a language model has computed so far, in tokens."""

from dataclasses import dataclass


@dataclass(slots=True)
class Work:
    """Tokens that went through a model, and those that did not have to.

    Attributes:
        real_tokens: tokens read, each counted once however many requests it serves.
        padding_tokens: padding that went through with them.
        shared_tokens: tokens of requests that were not computed again, because another request begins
            with them too.
        generated_tokens: tokens written.
    """

    real_tokens: int = 0
    padding_tokens: int = 0
    shared_tokens: int = 0
    generated_tokens: int = 0
