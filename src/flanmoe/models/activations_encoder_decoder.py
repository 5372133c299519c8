"""What the activations of an encoder-decoder take while it trains, for T5, Switch and FlanMoeT5.

With c bytes a number in matrix products, a token of width H keeps (tests compare with what autograd
really saves):

- for a norm its input and the normalised input, in float32: 8 * H;
- for a linear layer its input, c * in. Autocast casts anew for each layer; in float32 layers that
  read the same tensor keep it once;
- for attention queries, keys and values in all heads, and a row of scores in every head after the
  softmax, all in float32: positions enter as a learned bias, so no fused kernel takes it. Dropout
  keeps two more rows, its draws and what they leave. Attention to the encoder has no such bias; without
  dropout a fused kernel keeps a row of the mask in place of the scores. Where attention is written
  out, as in Switch, values meet scores in the precision of products;
- for dropout one number for each that it may drop;
- for an FFN what `activations_ffn` counts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersPreTrainedModel,
)
from transformers.models.t5.modeling_t5 import T5PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.activations import (
    FLOAT32_BYTES,
    Activations,
    SideBatch,
    copied_bytes,
    waiting_bytes,
    working_bytes,
)
from flanmoe.models.activations_ffn import dense_bytes, slots_of, sparse_bytes
from flanmoe.models.encoder_decoder import Attention, attention_layers, sides
from flanmoe.models.expert_visits import RoutedExperts, routed_experts
from flanmoe.models.precision import Precision
from flanmoe.moe.layer import Experts

_INDEX_BYTES = 8
# Rows of scores that a token's attention works on in every head beside those that are saved: gradients
# before and after the softmax and of the bias; with autocast, when it is computed, the bias with the
# mask, in bfloat16, back in float32, and raw scores.
_SCORES_AT_WORK: Mapping[Precision, float] = {"bfloat16": 3.5, "float32": 3}


class _Layer(NamedTuple):
    """Bytes of one layer.

    Attributes:
        attention, ffn: what autograd saves in the two.
        ffn_flowing, attention_flowing: what is beside that while the FFN goes backward, and while
            attention does, when the FFN is done with.
        copies: copies of its matrices.
    """

    attention: int
    ffn: int
    ffn_flowing: int
    attention_flowing: int
    copies: int

    @property
    def saved(self) -> int:
        """What autograd saves."""
        return self.attention + self.ffn

    @property
    def flowing(self) -> int:
        """The most that comes on top of what is saved."""
        return max(self.ffn_flowing, self.attention_flowing - self.ffn)


class _Side(NamedTuple):
    """Bytes of one side.

    Attributes:
        layers: those of its layers.
        ends: what autograd saves before the first and after the last.
        inputs: the inputs of the layers, the bias of positions and the masks, under checkpointing.
    """

    layers: list[_Layer]
    ends: int
    inputs: int

    @property
    def saved(self) -> int:
        """What autograd saves."""
        return sum(layer.saved for layer in self.layers) + self.ends


def encoder_decoder_activations(
    model: PreTrainedModel,
    precision: Precision,
    *,
    rows: int,
    input_length: int,
    target_length: int,
) -> Activations:
    """Count an encoder-decoder's for `rows` rows of inputs and targets.

    Raises:
        ModelError: if it is neither a T5 nor a Switch nor a FlanMoeT5.
    """
    if not isinstance(model, T5PreTrainedModel | SwitchTransformersPreTrainedModel):
        raise ModelError(
            "Memory is estimated for decoders, T5, Switch and FlanMoeT5, but the model is a "
            f"{type(model).__name__}. Take one of those."
        )
    inputs = SideBatch(
        precision=precision,
        rows=rows,
        own=input_length,
        other=0,
        hidden_size=model.config.hidden_size,
        num_heads=model.config.num_attention_heads,
        # Not the configuration's: a training may set another.
        dropping=any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout)),
        eager=model.config._attn_implementation == "eager",  # pyright: ignore[reportPrivateUsage]
    )
    targets = dataclasses.replace(inputs, own=target_length, other=input_length)
    routed = {id(experts.experts): experts for experts in routed_experts(model)}
    modules = sides(model)
    encoder = _side(modules.encoder, inputs, routed)
    decoder = _side(modules.decoder, targets, routed)
    layers = encoder.layers + decoder.layers
    fullest = max(layers, key=lambda layer: layer.saved + layer.flowing)
    # The decoder goes backward first; when it is the encoder's turn, nothing of it is left.
    flowing = max(decoder.layers[-1].flowing, encoder.layers[-1].flowing - decoder.saved)
    waiting = waiting_bytes(model)
    return Activations(
        saved=encoder.saved + decoder.saved,
        inputs=encoder.inputs + decoder.inputs,
        layer=fullest.saved,
        layer_copies=max(layer.copies for layer in layers),
        flowing=flowing + waiting,
        layer_flowing=fullest.flowing + waiting,
    )


def _side(side: nn.Module, batch: SideBatch, routed: dict[int, RoutedExperts]) -> _Side:
    layers = [_layer(block, batch, routed) for block in side.get_submodule("block").children()]
    vector = FLOAT32_BYTES * batch.hidden_size
    tokens, crossed = batch.num_tokens, batch.rows * batch.other
    # Last norm; dropout of the embeddings and of what the norm makes.
    ends = (4 if batch.dropping else 2) * vector * tokens
    if batch.precision == "float32":
        # What all keys and values for the decoder are made of.
        ends += vector * crossed
    biases = FLOAT32_BYTES * batch.own * (batch.own + batch.other) * (batch.num_heads + batch.rows)
    return _Side(layers, ends, inputs=vector * (tokens * len(layers) + crossed) + biases)


def _layer(block: nn.Module, batch: SideBatch, routed: dict[int, RoutedExperts]) -> _Layer:
    tokens, crossed = batch.num_tokens, batch.rows * batch.other
    attention = ffn = 0
    for part in block.get_submodule("layer").children():
        saved = _part(part, batch, routed)
        if _ffn(part) is None:
            attention += saved
        else:
            ffn += saved
    vector = FLOAT32_BYTES * batch.hidden_size
    scores = FLOAT32_BYTES * batch.num_heads * tokens * max(batch.own, batch.other)
    return _Layer(
        attention=attention,
        ffn=ffn,
        # The gradient of the encoder's output waits for the encoder.
        ffn_flowing=vector * crossed + _ffn_flowing(block, batch, routed),
        attention_flowing=vector * crossed + int(_SCORES_AT_WORK[batch.precision] * scores),
        copies=copied_bytes(block, batch.precision),
    )


def _ffn(part: nn.Module) -> nn.Module | None:
    """Return the FFN of a part of a layer, dense or sparse; None if the part is attention."""
    children = dict(part.named_children())
    return children.get("DenseReluDense", children.get("mlp"))


def _part(part: Any, batch: SideBatch, routed: dict[int, RoutedExperts]) -> int:
    """Return what one part of a layer saves: attention or an FFN, its norm and its dropout."""
    ffn = _ffn(part)
    children = {} if ffn is None else dict(ffn.named_children())
    experts = routed.get(id(children.get("experts")))
    vector = FLOAT32_BYTES * batch.hidden_size
    saved = 2 * vector * batch.num_tokens
    if batch.dropping:
        # Experts give float32.
        saved += (vector if experts else batch.inputs(1)) * batch.num_tokens
    if experts is not None:
        return saved + sparse_bytes(experts, batch)
    if ffn is not None:
        return saved + dense_bytes(ffn, batch) * batch.num_tokens
    (attention,) = attention_layers(part)
    if any(isinstance(module, nn.Embedding) for module in part.modules()):
        saved += _INDEX_BYTES * batch.own * batch.own
    return saved + _attention_bytes(attention, batch)


def _attention_bytes(attention: Attention, batch: SideBatch) -> int:
    tokens = batch.num_tokens
    keys = batch.other if attention.crosses else batch.own
    query_width, value_width = attention.widths
    score, number = _kept_by_scores(batch, crosses=attention.crosses)
    saved = score * tokens * batch.num_heads * keys
    saved += number * (tokens * query_width + batch.rows * keys * (query_width + value_width))
    saved += batch.width * tokens * value_width
    if not attention.crosses:
        return saved + batch.inputs(3) * tokens
    saved += batch.inputs(1) * tokens
    # In float32 all layers read the encoder's output as it is; `_side` counts it.
    return saved + (batch.inputs(2) * batch.rows * keys if batch.precision == "bfloat16" else 0)


def _kept_by_scores(batch: SideBatch, *, crosses: bool) -> tuple[int, int]:
    """Return the bytes kept for a score of one head, and for a number of queries, keys and values."""
    width, dropping = batch.width, int(batch.dropping)
    if batch.eager:
        # The bias of positions, where there is one, makes scores float32; values are multiplied in
        # the precision of products.
        softmax = width if crosses else FLOAT32_BYTES
        again = dropping or softmax != width
        return softmax * (1 + dropping) + (width if again else 0), width
    if crosses and not dropping:
        # Nothing that is learned is added: a fused kernel, which keeps the mask.
        return width, width
    return FLOAT32_BYTES * (1 + 2 * dropping), FLOAT32_BYTES


def _ffn_flowing(block: nn.Module, batch: SideBatch, routed: dict[int, RoutedExperts]) -> int:
    """Return what gradients take while an FFN goes backward.

    Four float32 vectors a token: of the residual stream, and of what a norm reads, makes and
    scales. Our experts work on some rows beside that, as in a decoder (`activations`); Switch has
    two vectors for each visit in place of the last.
    """
    vector = FLOAT32_BYTES * batch.hidden_size * batch.num_tokens
    flowing = 4 * vector
    for module in block.modules():
        experts = routed.get(id(module))
        if experts is None:
            continue
        if isinstance(module, Experts):
            working = working_bytes(
                round(experts.share * experts.num_experts * batch.num_tokens),
                experts.num_experts,
                experts.parameters(),
                hidden_size=batch.hidden_size,
                product_width=module.gate_up_proj.shape[1],
                expert_width=module.expert_width,
                width=batch.width,
            )
            flowing = max(flowing, 4 * vector + working)
        else:
            flowing = max(flowing, (3 + 2 * slots_of(experts, batch.num_tokens)) * vector)
    return flowing
