"""The two sides of an encoder-decoder and their attention, as far as counting needs them."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError

# Names that T5 and BART, and what is built after them, give to projections (query, key, value, output) and to
# attention to the encoder.
_PROJECTIONS = (("q", "k", "v", "o"), ("q_proj", "k_proj", "v_proj", "out_proj"))
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn")


class Sides(NamedTuple):
    """The encoder and the decoder of a model."""

    encoder: nn.Module
    decoder: nn.Module


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer of attention.

    Attributes:
        query, key, value, output: its projections.
        crosses: whether keys and values are made of the encoder's tokens, in the decoder.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    crosses: bool

    @property
    def widths(self) -> tuple[int, int]:
        """Heads times head size, of queries (and keys) and of values."""
        return self.query.out_features, self.output.in_features


def sides(model: PreTrainedModel) -> Sides:
    """Return the encoder and the decoder.

    Raises:
        ModelError: if the model is not an encoder-decoder.
    """
    if not model.config.is_encoder_decoder:
        raise ModelError(
            "Inputs and targets are counted apart in an encoder-decoder, but "
            f"{type(model).__name__} is none. Count it as a decoder."
        )
    return Sides(model.get_encoder(), model.get_decoder())


def attention_layers(side: nn.Module) -> list[Attention]:
    """Return the attention layers of one side, in order.

    All are taken to see every token that they may: no windows.

    Raises:
        ModelError: if there are none with names of T5 or BART.
    """
    found: list[Attention] = []
    for name, module in side.named_modules():
        children = dict(module.named_children())
        for names in _PROJECTIONS:
            linear = [children.get(projection) for projection in names]
            query, key, value, output = linear
            if (
                isinstance(query, nn.Linear)
                and isinstance(key, nn.Linear)
                and isinstance(value, nn.Linear)
                and isinstance(output, nn.Linear)
            ):
                crosses = name.rpartition(".")[2] in _CROSS_ATTENTION
                found.append(Attention(query, key, value, output, crosses))
    if not found:
        raise ModelError(
            f"Attention is read by its projections ({' or '.join('/'.join(n) for n in _PROJECTIONS)}), but "
            f"{type(side).__name__} has none of these names. flanmoe cannot count this architecture yet."
        )
    return found


def cross_attention(decoder: nn.Module) -> list[Attention]:
    """Return the layers of a decoder that attend to the encoder.

    Raises:
        ModelError: if there are none.
    """
    found = [layer for layer in attention_layers(decoder) if layer.crosses]
    if not found:
        raise ModelError(
            f"A decoder's attention to its encoder is called {' or '.join(_CROSS_ATTENTION)}, but "
            f"{type(decoder).__name__} has nothing of that name. flanmoe cannot count this architecture yet."
        )
    return found
