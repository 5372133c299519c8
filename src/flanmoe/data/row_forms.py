"""What kind of rows a stream gives: those of a decoder, or the pairs of an encoder-decoder.

A form knows the way from an example to a row. The stream knows draws, windows and positions, and asks its form
for the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from flanmoe.core.errors import ConfigError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Example, Packed, PackedPair, Rendered
from flanmoe.data.packing import (
    Change,
    PackingConfig,
    TokenizedExample,
    fitted,
    grouped,
    packed_row,
    tokenize_all,
)
from flanmoe.data.pairs import (
    TokenizedPair,
    fitted_pair,
    grouped_pairs,
    packed_pair_row,
    row_lengths,
    tokenize_pairs,
)
from flanmoe.data.renderers.base import Renderer
from flanmoe.data.text_to_text import render_text_to_text
from flanmoe.data.token_cache import TokenCache
from flanmoe.data.tokenizer import Tokenizer, num_tokens

TokensT = TypeVar("TokensT", TokenizedExample, TokenizedPair)
RowT_co = TypeVar("RowT_co", bound=Packed | PackedPair, covariant=True)


@runtime_checkable
class RowForm(Protocol[TokensT, RowT_co]):
    """The way from an example to a row."""

    def settings(self, config: PackingConfig) -> dict[str, Any]:
        """Return what the rows depend on beside draws and tokens, as JSON types.

        Raises:
            ConfigError: if the config lacks what the form needs, or sets what has no effect on it.
        """
        ...

    def render(
        self,
        example: Example,
        renderer: Renderer,
        task: str,
        *,
        tokenizer: Tokenizer,
        seeds: SeedTree,
    ) -> Rendered:
        """Return an example as texts.

        Raises:
            NoExemplarError: if exemplars are to be shown, and not one fits.
        """
        ...

    def tokenizing(
        self, tokenizer: Tokenizer, config: PackingConfig, *, writes: bool
    ) -> Callable[[Sequence[Rendered]], list[TokensT]]:
        """Return what tokenises texts, several in one call.

        Args:
            tokenizer: the model's.
            config: says whether tokens are kept.
            writes: whether this process is the one that keeps them.
        """
        ...

    def fitted(
        self, tokens: TokensT, config: PackingConfig
    ) -> tuple[TokensT | None, Change | None]:
        """Return what of an example goes into a row, and what was done to it.

        Raises:
            DataError: if it is too long, when the config asks for an error.
        """
        ...

    def grouped(self, tokens: Sequence[TokensT], config: PackingConfig) -> list[list[TokensT]]:
        """Return the examples that share each row."""
        ...

    def row(self, tokens: Sequence[TokensT], config: PackingConfig, *, padding: int) -> RowT_co:
        """Write one row of examples in order, filled up with a token id."""
        ...

    def room(self, config: PackingConfig) -> str:
        """Say how much a row holds, and which setting would make it hold more."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderForm:
    """Rows for a decoder: prompt and response as one text, written as the chat that it answers."""

    def settings(self, config: PackingConfig) -> dict[str, Any]:
        """Return the packing's settings that change rows; see `RowForm`."""
        if config.target_length is not None:
            raise ConfigError(
                "`packing.target_length` has no effect on a decoder, whose rows have one side, but is set to "
                f"{config.target_length}. Take it out."
            )
        # Where tokens come from changes no row.
        return config.model_dump(mode="json", exclude={"token_cache", "target_length"})

    def render(
        self,
        example: Example,
        renderer: Renderer,
        task: str,
        *,
        tokenizer: Tokenizer,
        seeds: SeedTree,
    ) -> Rendered:
        """Return the example as turns of a chat."""
        return render_chat(example, renderer, tokenizer, task, seeds=seeds)

    def tokenizing(
        self, tokenizer: Tokenizer, config: PackingConfig, *, writes: bool
    ) -> Callable[[Sequence[Rendered]], list[TokenizedExample]]:
        """Return what tokenises texts, from the token cache where the config says so."""
        if config.token_cache:
            return TokenCache(tokenizer, writes=writes).tokenize_all
        return lambda rendered: tokenize_all(rendered, tokenizer)

    def fitted(
        self, tokens: TokenizedExample, config: PackingConfig
    ) -> tuple[TokenizedExample | None, Change | None]:
        """Return what of an example goes into a row, and what was done to it."""
        return fitted(tokens, config)

    def grouped(
        self, tokens: Sequence[TokenizedExample], config: PackingConfig
    ) -> list[list[TokenizedExample]]:
        """Return the examples that share each row."""
        return grouped(tokens, length=config.length, most_in_a_row=config.examples_per_row)

    def row(
        self, tokens: Sequence[TokenizedExample], config: PackingConfig, *, padding: int
    ) -> Packed:
        """Write one row of examples in order."""
        return packed_row(tokens, length=config.length, padding=padding)

    def room(self, config: PackingConfig) -> str:
        """Say how much a row holds, and which setting would make it hold more."""
        return f"{config.length} tokens. Raise `packing.length`"


@dataclass(frozen=True, slots=True)
class PairForm:
    """Rows for an encoder-decoder: the prompt is read by the encoder, the response is decoded.

    Attributes:
        decoder_start_token_id: what the decoder is given first; the model's configuration says it.
    """

    decoder_start_token_id: int

    def settings(self, config: PackingConfig) -> dict[str, Any]:
        """Return the packing's settings that change rows, with the start token; see `RowForm`."""
        row_lengths(config)
        packing = config.model_dump(mode="json", exclude={"token_cache"})
        return {**packing, "decoder_start_token_id": self.decoder_start_token_id}

    def render(
        self,
        example: Example,
        renderer: Renderer,
        task: str,
        *,
        tokenizer: Tokenizer,
        seeds: SeedTree,
    ) -> Rendered:
        """Return the example as a text in and a text out."""
        return render_text_to_text(
            example, renderer, task, count_tokens=partial(num_tokens, tokenizer), seeds=seeds
        )

    def tokenizing(
        self, tokenizer: Tokenizer, config: PackingConfig, *, writes: bool
    ) -> Callable[[Sequence[Rendered]], list[TokenizedPair]]:
        """Return what tokenises pairs of texts; the token cache holds none."""
        return lambda rendered: tokenize_pairs(rendered, tokenizer)

    def fitted(
        self, tokens: TokenizedPair, config: PackingConfig
    ) -> tuple[TokenizedPair | None, Change | None]:
        """Return what of a pair goes into a row, and what was done to it."""
        return fitted_pair(tokens, config)

    def grouped(
        self, tokens: Sequence[TokenizedPair], config: PackingConfig
    ) -> list[list[TokenizedPair]]:
        """Return the pairs that share each row."""
        length, target_length = row_lengths(config)
        most = config.examples_per_row
        return grouped_pairs(tokens, length=length, target_length=target_length, most_in_a_row=most)

    def row(
        self, tokens: Sequence[TokenizedPair], config: PackingConfig, *, padding: int
    ) -> PackedPair:
        """Write one row of pairs in order."""
        length, target_length = row_lengths(config)
        return packed_pair_row(
            tokens,
            length=length,
            target_length=target_length,
            decoder_start_token_id=self.decoder_start_token_id,
            padding=padding,
        )

    def room(self, config: PackingConfig) -> str:
        """Say how much a row holds, and which settings would make it hold more."""
        length, target_length = row_lengths(config)
        return (
            f"{length} input and {target_length} target tokens. Raise `packing.length` or "
            "`packing.target_length`"
        )
