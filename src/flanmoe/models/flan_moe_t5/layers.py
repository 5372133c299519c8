"""The layers of FlanMoeT5: an FFN that is dense or sparse, and the block around it."""

import copy
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.t5.modeling_t5 import (
    T5LayerCrossAttention,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
)

from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config, Side
from flanmoe.moe.layer import Experts, SparseFFN
from flanmoe.moe.replay import RoutingReplay


class SparseLayerFF(nn.Module):
    """Norm, router with experts, dropout and residual connection, in place of T5's FFN layer.

    Args:
        config: of the whole model.
        side: whose routers and experts these are.
    """

    def __init__(self, config: FlanMoeT5Config, side: Side) -> None:
        super().__init__()
        router, experts = config.router(side), config.experts(side)
        if router is None or experts is None:
            raise ValueError(f"The {side} has no router.")
        self.mlp = SparseFFN(
            router.build(hidden_size=config.d_model, causal=side == "decoder"),
            Experts(experts, config.d_model),
        )
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        *,
        valid: Bool[Tensor, "B L"] | None,
        segments: Int[Tensor, "B L"] | None,
        replay: RoutingReplay,
    ) -> Float[Tensor, "B L H"]:
        """Return the hidden states after the layer; see `SparseFFN`."""
        outputs = self.mlp(self.layer_norm(hidden), valid=valid, segments=segments, replay=replay)
        return hidden + self.dropout(outputs)


def _extra_ffn(config: FlanMoeT5Config) -> T5LayerFF:
    own: Any = copy.copy(config)
    own.d_ff = config.extra_ffn_width or config.d_ff
    return T5LayerFF(own)


class FlanMoeT5Block(GradientCheckpointingLayer):
    """Self-attention, in the decoder cross-attention, and an FFN. Names of weights are those of T5.

    Args:
        config: of the side (`FlanMoeT5Config.of_side`).
        layer: number of the block on its side.
    """

    def __init__(self, config: FlanMoeT5Config, layer: int) -> None:
        super().__init__()
        side: Side = "decoder" if config.is_decoder else "encoder"
        # transformers' modules take any configuration with T5's fields.
        native: Any = config
        self.is_sparse = layer in config.sparse_layers(side)
        self.layer = nn.ModuleList(
            [T5LayerSelfAttention(config, has_relative_attention_bias=layer == 0, layer_idx=layer)]
        )
        if config.is_decoder:
            self.layer.append(T5LayerCrossAttention(config, layer_idx=layer))
        self.layer.append(SparseLayerFF(config, side) if self.is_sparse else T5LayerFF(native))
        if self.is_sparse and config.extra_dense_ffn:
            self.layer.append(_extra_ffn(config))

    def forward(
        self,
        hidden: Float[Tensor, "B L H"],
        attention_mask: Tensor | None,
        position_bias: Tensor | None,
        encoder_hidden: Float[Tensor, "B M H"] | None,
        encoder_mask: Tensor | None,
        cross_bias: Tensor | None,
        *,
        valid: Bool[Tensor, "B L"] | None = None,
        segments: Int[Tensor, "B L"] | None = None,
        replay: RoutingReplay,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return hidden states and the position biases, which later blocks take over.

        Args:
            hidden: hidden states.
            attention_mask, encoder_mask: what attention adds to its scores, or which keys it sees.
            position_bias, cross_bias: those of the first block; None in it.
            encoder_hidden: what the encoder made, in the decoder.
            valid, segments: see `SparseFFN`.
            replay: remembers where tokens went, for a block that is computed again.
            past_key_values: cache of the decoder.
            options: handed on to attention.
        """
        hidden, position_bias, _ = self.layer[0](
            hidden,
            attention_mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **options,
        )
        feed_forward = 1
        if encoder_hidden is not None:
            hidden, cross_bias, _ = self.layer[1](
                hidden,
                key_value_states=encoder_hidden,
                attention_mask=encoder_mask,
                position_bias=cross_bias,
                past_key_values=past_key_values,
                **options,
            )
            feed_forward = 2
        first, *extra = self.layer[feed_forward:]
        if self.is_sparse:
            hidden = first(hidden, valid=valid, segments=segments, replay=replay)
        else:
            hidden = first(hidden)
        for layer in extra:
            hidden = layer(hidden)
        return hidden, position_bias, cross_bias
