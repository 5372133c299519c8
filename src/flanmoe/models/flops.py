"""Floating-point operations of one token, counted from the module tree.

Convention: a multiplication with its addition is 2 operations. Only matrix products count; norms,
activations, softmax and embedding look-ups do not. Experts count as often as a token visits one.
"""

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.meta import as_model, head_weight
from flanmoe.moe.block import MoEBlock

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


def count_flops(
    model_or_config: PreTrainedModel | PreTrainedConfig, *, context_length: int
) -> FlopCount:
    """Count the forward operations of one token, averaged over a sequence of `context_length`.

    Every weight matrix is used once for each token, an expert's by the share `top_k / num_experts`
    of them. Scores are what a causal kernel has to compute; a kernel that fills the whole square
    does about twice that.
    """
    model = as_model(model_or_config)
    blocks = moe_blocks(model)
    head = head_weight(model)
    not_in_body = {id(head)} | {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)
    }
    experts = {id(p): b for b in blocks for p in b.experts.parameters(recurse=False)}
    body = sum(
        _matrix_flops(parameter, experts.get(id(parameter)))
        for parameter in model.parameters()
        if id(parameter) not in not_in_body
    )
    router = sum(_matrix_flops(p, None) for b in blocks for p in b.router.parameters())
    return FlopCount(
        context_length=context_length,
        body=body,
        router=router,
        head=2 * head.numel(),
        attention_scores=_attention_scores(model, context_length),
    )


def _matrix_flops(parameter: Float[Tensor, "..."], block: MoEBlock | None) -> int:
    if block is None:
        return 2 * parameter.numel() if parameter.ndim >= 2 else 0
    # Fused experts: one more axis than a matrix or a bias.
    return 2 * parameter.numel() // block.num_experts * block.top_k if parameter.ndim == 3 else 0


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
