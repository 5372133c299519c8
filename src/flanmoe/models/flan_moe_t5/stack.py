"""The encoder and the decoder of FlanMoeT5."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.t5.modeling_t5 import (
    T5LayerCrossAttention,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5PreTrainedModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config
from flanmoe.models.flan_moe_t5.layers import FlanMoeT5Block
from flanmoe.models.flan_moe_t5.segments import additive, own_segment
from flanmoe.moe.layer import Experts
from flanmoe.moe.replay import RoutingReplay
from flanmoe.moe.routers.base import Router


class FlanMoeT5PreTrainedModel(T5PreTrainedModel):
    """What the stacks and the whole model share: first weights and how transformers handles them."""

    config_class = FlanMoeT5Config
    config: FlanMoeT5Config
    base_model_prefix = "flan_moe_t5"
    _no_split_modules = ["FlanMoeT5Block"]
    # transformers would load them in bfloat16 with the rest; ties between experts come of that.
    _keep_in_fp32_modules_strict = ["router"]
    _can_compile_fullgraph = False
    _supports_flex_attn = False
    _can_record_outputs = {
        "hidden_states": OutputRecorder(FlanMoeT5Block, index=0),
        "attentions": OutputRecorder(T5LayerSelfAttention, index=-1),
        "cross_attentions": OutputRecorder(T5LayerCrossAttention, index=-1),
    }

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers it takes modules without weights of their own, such as an attention
        # layer, for initialised, and would leave the layers inside them with a standard deviation of 1.
        # `_init_weights` keeps loaded weights as they are, which is what that is for.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, Router):
            init.normal_(module.weight, std=module.init_std)
        elif isinstance(module, Experts):
            # T5's: variance 1 / (number of inputs).
            for matrices in (module.gate_up_proj, module.down_proj):
                init.normal_(matrices, std=factor * matrices.shape[-1] ** -0.5)


class FlanMoeT5Stack(FlanMoeT5PreTrainedModel):
    """One side: embeddings, blocks and a last norm.

    Args:
        config: of the side (`FlanMoeT5Config.of_side`).
    """

    def __init__(self, config: FlanMoeT5Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.is_decoder = config.is_decoder
        self.block = nn.ModuleList(
            FlanMoeT5Block(config, layer) for layer in range(config.num_layers)
        )
        self.final_layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.post_init()

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the table of token embeddings."""
        self.embed_tokens = new_embeddings

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Float[Tensor, "B M H"] | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B L H"] | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        segment_ids: Int[Tensor, "B L"] | None = None,
        encoder_segment_ids: Int[Tensor, "B M"] | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the last hidden states. Arguments that T5's stack has mean what they mean there.

        Args:
            attention_mask: 0 where a token is padding, which takes no expert's place; keys of a cache included.
            segment_ids, encoder_segment_ids: numbers of the examples of a packed batch, 0 for padding, in place
                of the masks.
            options: handed on to attention.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = self._cache(past_key_values, use_cache=bool(use_cache))
        if segment_ids is None:
            encoder = (encoder_hidden_states, encoder_attention_mask)
            masks = self._masks(hidden, attention_mask, past_key_values, *encoder)
            valid, segments = _valid(hidden, attention_mask), None
        else:
            masks = self._segment_masks(hidden, segment_ids, encoder_segment_ids)
            valid, segments = segment_ids != 0, _numbered_apart(segment_ids)
        hidden = self.dropout(hidden)
        biases: list[Tensor | None] = [None, None]
        for block in self.block:
            hidden, *biases = block(
                hidden,
                masks[0],
                biases[0],
                encoder_hidden_states,
                masks[1],
                biases[1],
                valid=valid,
                segments=segments,
                replay=RoutingReplay(),
                past_key_values=past_key_values,
                **options,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.dropout(self.final_layer_norm(hidden)),
            past_key_values=past_key_values,
        )

    def _cache(self, past_key_values: Any, *, use_cache: bool) -> Any:
        if not self.is_decoder:
            return None
        if use_cache and past_key_values is None:
            caches = (DynamicCache(config=self.config) for _ in range(2))
            return EncoderDecoderCache(*caches)
        return past_key_values

    def _masks(
        self,
        hidden: Float[Tensor, "B L H"],
        attention_mask: Tensor | None,
        past_key_values: Any,
        encoder_hidden: Float[Tensor, "B M H"] | None,
        encoder_mask: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.is_decoder:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=attention_mask
            )
            return mask, None
        cache = past_key_values
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=cache.self_attention_cache
            if isinstance(cache, EncoderDecoderCache)
            else cache,
        )
        if encoder_hidden is None:
            return mask, None
        cross = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=encoder_mask,
            encoder_hidden_states=encoder_hidden,
        )
        return mask, cross

    def _segment_masks(
        self,
        hidden: Float[Tensor, "B L H"],
        segments: Int[Tensor, "B L"],
        encoder_segments: Int[Tensor, "B M"] | None,
    ) -> tuple[Tensor, Tensor | None]:
        own = own_segment(segments, segments, causal=self.is_decoder)
        if encoder_segments is None:
            return additive(own, hidden.dtype), None
        across = own_segment(segments, encoder_segments, causal=False)
        return additive(own, hidden.dtype), additive(across, hidden.dtype)


def _valid(
    hidden: Float[Tensor, "B L H"], attention_mask: Tensor | None
) -> Bool[Tensor, "B L"] | None:
    """Return which of the tokens given are real: the mask's last columns, behind those of a cache."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -hidden.shape[1] :] != 0


def _numbered_apart(segments: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return numbers that examples of different rows do not share."""
    rows = torch.arange(len(segments), device=segments.device).unsqueeze(1)
    return rows * (segments.max() + 1) + segments
