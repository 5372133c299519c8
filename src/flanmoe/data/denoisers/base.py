"""What all denoisers share: what they return, their registry, the sentinels that stand for what is left out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from flanmoe.core.errors import DataError
from flanmoe.core.registry import Registry


class Denoised(NamedTuple):
    """A text taken apart. M and L tokens.

    Attributes:
        input_ids: what the encoder reads; no end-of-text token.
        target_ids: what the decoder is to write; no end-of-text token.
    """

    input_ids: Int[np.ndarray, " M"]
    target_ids: Int[np.ndarray, " L"]


class DenoisedLengths(NamedTuple):
    """How many tokens of a text make a row.

    Attributes:
        text: tokens of the text.
        inputs: tokens of the input that they become, the end-of-text token included.
        targets: tokens of the target, the end-of-text token included.
        sentinels: sentinels that are needed.
    """

    text: int
    inputs: int
    targets: int
    sentinels: int


@runtime_checkable
class Denoiser(Protocol):
    """Takes a text apart, so that every text of one length gives inputs of one length, and targets too."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, origin: str = ...) -> "Denoiser":
        """Read its options.

        Raises:
            ConfigError: if one is not valid.
        """
        ...

    def to_mapping(self) -> dict[str, Any]:
        """Return its options as plain JSON types."""
        ...

    def lengths(self, input_length: int) -> DenoisedLengths:
        """Return how long a text is that becomes an input of `input_length` tokens, its end included.

        Raises:
            ConfigError: if no text becomes just that long.
        """
        ...

    def __call__(
        self,
        tokens: Int[np.ndarray, " N"],
        sentinels: Sequence[int],
        generator: np.random.Generator,
    ) -> Denoised:
        """Take a text apart.

        Args:
            tokens: the text.
            sentinels: ids of the sentinels in the order in which they are used.
            generator: what decides which tokens are left out; nothing else does.
        """
        ...


denoisers: Registry[type[Denoiser]] = Registry("denoiser")


@runtime_checkable
class Vocabulary(Protocol):
    """Knows the id of every token, as tokenizers of transformers do."""

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        ...


def sentinel_token(number: int) -> str:
    """Return the text of a sentinel, counted from 0, as T5 writes it."""
    return f"<extra_id_{number}>"


def sentinel_ids(tokenizer: Vocabulary) -> tuple[int, ...]:
    """Return the ids of a tokenizer's sentinels, that of `<extra_id_0>` first; T5's descend.

    Raises:
        DataError: if it has none.
    """
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (token := sentinel_token(len(found))) in vocabulary:
        found.append(vocabulary[token])
    if not found:
        raise DataError(
            f"Denoising needs a tokenizer with sentinels, but this one has no token `{sentinel_token(0)}`. Use "
            "T5's, or train one (`flanmoe.data.tokenizer_training`)."
        )
    return tuple(found)
