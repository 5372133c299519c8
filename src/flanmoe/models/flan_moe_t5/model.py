"""`FlanMoeT5ForConditionalGeneration`: the encoder-decoder with a head over its vocabulary."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import ModelOutput, can_return_tuple

from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config
from flanmoe.models.flan_moe_t5.segments import IGNORED_LABEL, require_both, shifted_right
from flanmoe.models.flan_moe_t5.stack import FlanMoeT5PreTrainedModel, FlanMoeT5Stack


class FlanMoeT5ForConditionalGeneration(FlanMoeT5PreTrainedModel, GenerationMixin):
    """A T5 whose FFNs may be routers and experts; `generate`, caches and beams as in transformers' T5.

    Router losses are the trainer's: `loss` is the cross-entropy alone. Routing is read by a `RoutingRecorder`.

    Args:
        config: shape, routers, experts.
    """

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: FlanMoeT5Config) -> None:
        super().__init__(config)
        if config.tied_head:
            self._tied_weights_keys = {**self._tied_weights_keys, "lm_head.weight": "shared.weight"}
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = FlanMoeT5Stack(config.of_side("encoder"))
        self.decoder = FlanMoeT5Stack(config.of_side("decoder"))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            factor = self.config.initializer_factor
            init.normal_(self.shared.get_parameter("weight"), std=factor)
            if not self.config.tied_head:
                # The logits of T5.1.1 are not scaled down, so its head starts small.
                init.normal_(self.lm_head.weight, std=factor * self.config.d_model**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings, which both sides share."""
        return self.shared

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the table of token embeddings."""
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)
        self.decoder.set_input_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B M"] | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Int[Tensor, "B L"] | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "B M H"] | None = None,
        decoder_inputs_embeds: Float[Tensor, "B L H"] | None = None,
        labels: Int[Tensor, "B L"] | None = None,
        use_cache: bool | None = None,
        segment_ids: Int[Tensor, "B M"] | None = None,
        decoder_segment_ids: Int[Tensor, "B L"] | None = None,
        logits_to_keep: Int[Tensor, " K"] | int = 0,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        """Return logits, and the mean cross-entropy of the labels where there are some.

        Arguments that T5 has mean what they mean there. `decoder_input_ids` are made from the labels where they
        are not given.

        Args:
            segment_ids, decoder_segment_ids: of a packed batch, the number of each token's example in its row,
                0 for padding; in place of the masks, and both or neither. Not with a cache.
            logits_to_keep: positions of the decoder to compute logits for, or how many of the last; 0 for
                all.

        Raises:
            ModelError: if segments are given for one side alone.
        """
        if encoder_outputs is None:
            require_both(segment_ids, decoder_segment_ids)
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                segment_ids=segment_ids,
                **options,
            )
        encoded = _named(encoder_outputs)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels, decoder_segment_ids)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            segment_ids=decoder_segment_ids,
            encoder_segment_ids=segment_ids,
            **options,
        )
        logits = self._logits(decoded.last_hidden_state, logits_to_keep)
        loss = None if labels is None else _cross_entropy(logits, labels)
        return _output(loss, logits, encoded, decoded)

    def _logits(
        self, hidden: Float[Tensor, "B L H"], keep: Int[Tensor, " K"] | int
    ) -> Float[Tensor, "... V"]:
        kept = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
        if self.config.scale_decoder_outputs:
            kept = kept * self.config.d_model**-0.5
        return self.lm_head(kept)

    def prepare_decoder_input_ids_from_labels(
        self, labels: Int[Tensor, "B L"]
    ) -> Int[Tensor, "B L"]:
        """Return what the decoder is given to learn these labels."""
        return self._shift_right(labels)

    def _shift_right(
        self, input_ids: Int[Tensor, "B L"], segments: Int[Tensor, "B L"] | None = None
    ) -> Int[Tensor, "B L"]:
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or padding is None:
            raise ValueError("Shifting needs `decoder_start_token_id` and `pad_token_id`.")
        return shifted_right(input_ids, segments, start_token_id=start, pad_token_id=padding)


def _named(encoder_outputs: Any) -> Any:
    """Return what the encoder gave under its names; it may come as a plain tuple."""
    if isinstance(encoder_outputs, ModelOutput):
        return encoder_outputs
    return BaseModelOutput(*encoder_outputs)


def _output(loss: Tensor | None, logits: Tensor, encoded: Any, decoded: Any) -> Seq2SeqLMOutput:
    return Seq2SeqLMOutput(
        loss=loss,  # pyright: ignore[reportArgumentType]
        logits=logits,  # pyright: ignore[reportArgumentType]
        past_key_values=decoded.past_key_values,
        decoder_hidden_states=decoded.hidden_states,
        decoder_attentions=decoded.attentions,
        cross_attentions=decoded.cross_attentions,
        encoder_last_hidden_state=encoded.last_hidden_state,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )


def _cross_entropy(logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B L"]) -> Float[Tensor, ""]:
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL
    )
