"""Floating-point operations of one token of a training row, whatever kind of model reads it."""

from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.models.flops import FlopCount, count_encoder_decoder_flops, count_flops
from flanmoe.models.meta import as_model


def count_row_flops(
    model_or_config: PreTrainedModel | PreTrainedConfig, *, length: int, target_length: int | None
) -> FlopCount:
    """Count the forward operations of one token, averaged over a full row.

    Args:
        model_or_config: a decoder or an encoder-decoder.
        length: tokens in a row; of an encoder-decoder, in a row of the encoder.
        target_length: tokens in a row of the decoder of an encoder-decoder; None for decoders.

    Raises:
        ModelError: if a part of the model cannot be read.
    """
    model = as_model(model_or_config)
    if target_length is None:
        return count_flops(model, context_length=length)
    both = count_encoder_decoder_flops(model, input_length=length, target_length=target_length)
    return both.of_a_token(length + target_length)
