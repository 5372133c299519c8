"""An encoder-decoder in two parts: contexts encoded once, then a decoder that goes on from their cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from flanmoe.core.errors import ModelError
from flanmoe.evaluation.lm.listening import PADDING, Listener
from flanmoe.evaluation.lm.passes import Passes, Places, Precision
from flanmoe.evaluation.lm.requests import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Encodings:
    """What the encoder made of contexts, and what the decoder has made of that. B rows, S tokens.

    Attributes:
        hidden: the encoder's output.
        mask: 1 where a token of the context stands, 0 where the row is filled up.
        cache: keys and values of the decoder: of the contexts, and of the tokens that it has read.
        labels: the task of each row for a listener, None where nobody listens.
    """

    hidden: Float[Tensor, "B S H"]
    mask: Int[Tensor, "B S"]
    cache: EncoderDecoderCache
    labels: Int[Tensor, " B"] | None

    def only(self, rows: Sequence[int]) -> "Encodings":
        """Return copies of some rows, each as often as it is named; these here stay as they are."""
        places = torch.tensor(rows, dtype=torch.long, device=self.hidden.device)
        cache = EncoderDecoderCache(
            _only(self.cache.self_attention_cache, places),
            _only(self.cache.cross_attention_cache, places),
        )
        labels = None if self.labels is None else self.labels[places]
        return Encodings(self.hidden[places], self.mask[places], cache, labels)


class EncoderDecoderPasses(Passes):
    """Runs encoder and decoder of one model, without gradients (see `Passes`).

    Raises:
        ModelError: if the model does not say with which token its decoder starts.
    """

    def __init__(
        self, model: PreTrainedModel, precision: Precision, listener: Listener | None = None
    ) -> None:
        super().__init__(model, precision, listener)
        self._start = start_token(model)
        # Sparse models ask for more fields than dense ones have.
        self._kind_of_output: Any = BaseModelOutput

    def encode(
        self, contexts: Sequence[Tokens], labels: Sequence[int] | None
    ) -> tuple[Float[Tensor, "B S H"], Int[Tensor, "B S"]]:
        """Return the encoder's output for contexts, and its mask.

        Args:
            contexts: tokens of each; rows are filled up on the right.
            labels: the task of each, for a listener.
        """
        tokens, mask = padded(contexts, self.device)
        told = None
        if labels is not None:
            tasks = torch.tensor(labels, device=self.device)[:, None]
            told = torch.where(mask.bool(), tasks, PADDING)
        encoder: Any = self.model.get_encoder()
        with self.computing(told):
            found = encoder(input_ids=tokens, attention_mask=mask)
        self._kind_of_output = type(found)
        return found.last_hidden_state, mask

    def start(
        self,
        hidden: Float[Tensor, "B S H"],
        mask: Int[Tensor, "B S"],
        labels: Sequence[int] | None,
    ) -> tuple[Encodings, Float[Tensor, "B V"]]:
        """Let the decoder read its start token; return its state, and the logits of every first token."""
        tasks = None if labels is None else torch.tensor(labels, device=self.device)
        empty = EncoderDecoderCache(DynamicCache(), DynamicCache())
        state = Encodings(hidden, mask, empty, tasks)
        starts = torch.full((len(hidden), 1), self._start, dtype=torch.long, device=self.device)
        return state, self.go_on(state, starts)[:, 0]

    def go_on(self, state: Encodings, tokens: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q V"]:
        """Let the decoder read on; its cache grows. Return the logits of what follows each token."""
        with self.computing(_of_every_token(state, tokens.shape[1])):
            return self._decode(state, tokens)

    def read_on(
        self, state: Encodings, texts: Sequence[Tokens]
    ) -> tuple[Float[Tensor, "N V"], list[list[int]]]:
        """Let the decoder read texts of any lengths, one a row; its cache is of no use afterwards.

        Returns:
            the logits of what follows each token; and for every text, which of them are its own, in order.
        """
        tokens, mask = padded(texts, self.device)
        labels = _of_every_token(state, tokens.shape[1])
        if labels is not None:
            labels = torch.where(mask.bool(), labels, PADDING)
        rows, columns = torch.nonzero(mask, as_tuple=True)
        places: Places = (rows, columns)
        # What fills rows up stands on the right, where no token of a text looks.
        with self.computing(labels), self.only(places):
            logits = self._decode(state, tokens)[0]
        own: list[list[int]] = []
        first = 0
        for text in texts:
            own.append(list(range(first, first + len(text))))
            first += len(text)
        return logits, own

    def _decode(self, state: Encodings, tokens: Tensor) -> Tensor:
        return self.model(
            encoder_outputs=self._kind_of_output(last_hidden_state=state.hidden),
            attention_mask=state.mask,
            decoder_input_ids=tokens,
            past_key_values=state.cache,
            use_cache=True,
        ).logits


def start_token(model: PreTrainedModel) -> int:
    """Return the token with which a decoder starts.

    Raises:
        ModelError: if the model names none.
    """
    found = getattr(model.config, "decoder_start_token_id", None)
    if found is None and model.generation_config is not None:
        found = model.generation_config.decoder_start_token_id
    if found is None:
        raise ModelError(
            f"A decoder needs a token to start with, but the configuration of {type(model).__name__} names "
            "none. Set `decoder_start_token_id` in its config.json (T5 starts with its padding token)."
        )
    return int(found)


def padded(
    texts: Sequence[Tokens], device: torch.device
) -> tuple[Int[Tensor, "B Q"], Int[Tensor, "B Q"]]:
    """Return texts side by side, filled up with 0 on the right, and a mask that is 1 where a token stands."""
    lengths = torch.tensor([len(text) for text in texts])
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None]).long()
    tokens = torch.zeros_like(mask)
    tokens[mask.bool()] = torch.tensor([token for text in texts for token in text])
    return tokens.to(device), mask.to(device)


def _of_every_token(state: Encodings, num_tokens: int) -> Int[Tensor, "B Q"] | None:
    return None if state.labels is None else state.labels[:, None].expand(-1, num_tokens)


def _only(cache: Any, places: Tensor) -> DynamicCache:
    selected = DynamicCache()
    for number, layer in enumerate(cache.layers):
        selected.update(layer.keys[places], layer.values[places], number)
    return selected
