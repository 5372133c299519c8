"""Floating-point operations of one token, counted from the module tree.

Convention: a multiplication with its addition is 2 operations. Only matrix products count; norms,
activations, softmax and embedding look-ups do not. Experts count as often as a token visits one
(`expert_visits`).

In an encoder-decoder a token belongs to the input or to the target. What a token of the input costs
is the encoder, and the keys and values that the decoder's attention to the encoder makes of it:
they are made once for each token of the input, however long the target is. What a token of the
target costs is all else in the decoder, and the head.
"""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.models.encoder_decoder import attention_layers, cross_attention, sides
from flanmoe.models.expert_visits import RoutedExperts, routed_experts
from flanmoe.models.meta import as_model, head_weight

# Context that the FLOPs of a model are stated at where no tuning says another.
STATED_CONTEXT_LENGTH = 1024


class FlopCount(Config):
    """Operations of one token, forward.

    Attributes:
        context_length: length L of the sequence that the token stands in.
        body: all weight matrices but the embeddings and the head, experts at active width.
        router: the part of `body` that is spent in routers.
        head: the projection to the vocabulary.
        attention_scores: queries times keys and weights times values, at the causal average of
            (L + 1) / 2 keys a token; layers with a window of w keys see at most w.
    """

    context_length: int
    body: int
    router: int
    head: int
    attention_scores: float

    @property
    def total(self) -> float:
        """Body, head and attention scores."""
        return self.body + self.head + self.attention_scores

    @property
    def training(self) -> float:
        """A training step's operations for one token:
        the backward pass costs two forward passes."""
        return 3 * self.total


class EncoderDecoderFlopCount(Config):
    """Operations of an encoder-decoder, forward.

    Attributes:
        encoder: of one token of the input. Its scores are over all of the input; it has no head.
        decoder: of one token of the target. Its scores are over the target at the causal average,
            and over all of the input.
    """

    encoder: FlopCount
    decoder: FlopCount

    @property
    def mean(self) -> float:
        """Mean of the two bodies: 2 operations for each weight that a token of one side passes, on
        average over the sides; head and scores are left out.

        For ST-MoE-32B it comes to 34.7 billion. FLAN-MoE (arXiv 2305.14705) states 32.1 without
        saying what it counts. On which side keys and values for the decoder are counted makes no
        difference here.
        """
        return (self.encoder.body + self.decoder.body) / 2

    def of_a_token(self, context_length: int) -> FlopCount:
        """Return the operations of one token, averaged over an input with its target.

        Args:
            context_length: what the count is to say of its context.
        """
        lengths = (self.encoder.context_length, self.decoder.context_length)

        def mean(name: str) -> float:
            sides = (getattr(self.encoder, name), getattr(self.decoder, name))
            total = sum(length * side for length, side in zip(lengths, sides, strict=True))
            return total / sum(lengths)

        return FlopCount(
            context_length=context_length,
            body=round(mean("body")),
            router=round(mean("router")),
            head=round(mean("head")),
            attention_scores=mean("attention_scores"),
        )

    @property
    def per_example(self) -> float:
        """Operations of one input with its target."""
        encoder, decoder = self.encoder, self.decoder
        return encoder.context_length * encoder.total + decoder.context_length * decoder.total

    @property
    def training_per_example(self) -> float:
        """A training step's operations for one input with its target."""
        return 3 * self.per_example


def count_flops(
    model_or_config: PreTrainedModel | PreTrainedConfig, *, context_length: int
) -> FlopCount:
    """Count the forward operations of one token, averaged over a sequence of `context_length`.

    Every weight matrix is used once for each token, an expert's by the share of tokens that visit
    it. Scores are what a causal kernel has to compute; a kernel that fills the whole square does
    about twice that.

    In an encoder-decoder the token is half one of an input and half one of a target, each
    `context_length` long; `count_encoder_decoder_flops` counts the two apart.

    Raises:
        ModelError: if the model has no head, or a part of it cannot be read.
    """
    model = as_model(model_or_config)
    if model.config.is_encoder_decoder:
        both = count_encoder_decoder_flops(
            model, input_length=context_length, target_length=context_length
        )
        return both.of_a_token(context_length)
    costs = _Costs(model)
    return FlopCount(
        context_length=context_length,
        body=costs.body(model.parameters()),
        router=costs.router(model.parameters()),
        head=2 * head_weight(model).numel(),
        attention_scores=_attention_scores(model, context_length),
    )


def count_encoder_decoder_flops(
    model_or_config: PreTrainedModel | PreTrainedConfig, *, input_length: int, target_length: int
) -> EncoderDecoderFlopCount:
    """Count the forward operations of one token of the input and of one of the target.

    Both are averaged over an example of `input_length` and `target_length` tokens. T5, Switch,
    BART, models after them, and FlanMoeT5 can be counted.

    Raises:
        ModelError: if the model is not an encoder-decoder, or a part of it cannot be read.
    """
    model = as_model(model_or_config)
    encoder, decoder = sides(model)
    costs = _Costs(model)
    crossing = [
        weight
        for layer in cross_attention(decoder)
        for projection in (layer.key, layer.value)
        for weight in projection.parameters()
    ]
    made_of_inputs = {id(weight) for weight in crossing}
    of_inputs = [*encoder.parameters(), *crossing]
    of_targets = [p for p in decoder.parameters() if id(p) not in made_of_inputs]
    return EncoderDecoderFlopCount(
        encoder=FlopCount(
            context_length=input_length,
            body=costs.body(of_inputs),
            router=costs.router(of_inputs),
            head=0,
            attention_scores=_side_scores(encoder, own=float(input_length), crossed=0),
        ),
        decoder=FlopCount(
            context_length=target_length,
            body=costs.body(of_targets),
            router=costs.router(of_targets),
            head=2 * head_weight(model).numel(),
            attention_scores=_side_scores(
                decoder, own=_average_keys(target_length, None), crossed=input_length
            ),
        ),
    )


class _Costs:
    """What the parameters of a model cost a token that passes them, head and embeddings nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        routed = routed_experts(model)
        self._experts = {id(p): experts for experts in routed for p in experts.parameters()}
        self._routers = {id(p) for experts in routed for p in experts.router.parameters()}
        self._outside = {id(head_weight(model))} | {
            id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)
        }

    def body(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(
            _matrix_flops(p, self._experts.get(id(p)))
            for p in parameters
            if id(p) not in self._outside
        )

    def router(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(_matrix_flops(p, None) for p in parameters if id(p) in self._routers)


def _matrix_flops(parameter: nn.Parameter, experts: RoutedExperts | None) -> int:
    if experts is None:
        return 2 * parameter.numel() if parameter.ndim >= 2 else 0
    # Fused experts: one more axis than a matrix or a bias.
    if parameter.ndim != (3 if experts.fused else 2):
        return 0
    return 2 * round(parameter.numel() * experts.share)


def _side_scores(side: nn.Module, *, own: float, crossed: int) -> float:
    """Return the operations of a token's scores, over `own` keys and `crossed` ones of the encoder."""
    return sum(
        2 * sum(layer.widths) * (crossed if layer.crosses else own)
        for layer in attention_layers(side)
    )


def _attention_scores(model: PreTrainedModel, context_length: int) -> float:
    widths = attention_widths(model)
    windows = _windows(model.config, len(widths))
    return sum(
        2 * (keys + values) * _average_keys(context_length, window)
        for (keys, values), window in zip(widths, windows, strict=True)
    )


def attention_widths(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return for each attention layer heads * head size of queries (and keys), and of values.

    Read from the projections; latent attention (DeepSeek) has different sizes for the two. Where
    projections have names of their own, both widths are the hidden size, as in all such models.
    """
    widths: list[tuple[int, int]] = []
    for module in model.modules():
        children = dict(module.named_children())
        output = children.get("o_proj")
        if isinstance(output, nn.Linear):
            query = children.get("q_proj") or children.get("q_b_proj")
            keys = query.out_features if isinstance(query, nn.Linear) else output.in_features
            widths.append((keys, output.in_features))
    config = model.config
    return widths or [(config.hidden_size, config.hidden_size)] * config.num_hidden_layers


def _windows(config: PreTrainedConfig, num_layers: int) -> list[int | None]:
    values = config.to_dict()
    window = values.get("sliding_window") or None
    kinds = values.get("layer_types")
    if kinds is None:
        return [window] * num_layers
    return [window if kind == "sliding_attention" else None for kind in kinds[:num_layers]]


def _average_keys(length: int, window: int | None) -> float:
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
