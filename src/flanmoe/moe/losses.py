"""Router losses of one layer, as pure functions of its `Routing`.

Padding enters none of them. The mean over layers is the caller's: a model whose layers collapse
onto different experts must not look balanced because the layers were pooled first.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.moe.routing import Routing


def router_probabilities(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Softmax over experts in float32, or in float64 where the logits are float64."""
    return _at_least_float32(logits).softmax(dim=-1)


def balance_loss(
    routing: Routing,
    *,
    fractions: Float[Tensor, " E"] | None = None,
    num_tokens: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Load-balancing loss of one layer: E times the sum over experts of f_e P_e.

    f_e is the number of assignments of expert e (any of a token's k choices) per valid token, P_e
    its mean router probability over valid tokens. A perfectly balanced layer scores k; one that
    sends everything to the same k experts with certainty scores E. The gradient flows through P_e
    alone (Fedus et al. 2021, equations 4 to 6; counted over all k choices as in Flaxformer, T5X).

    Args:
        routing: what the router decided for some tokens.
        fractions: f_e where it is known for more tokens than these; that of `routing` by default.
        num_tokens: number of tokens that P_e is a mean over where these are a part of them; the
            valid tokens of `routing` by default. With the `fractions` and `num_tokens` of a whole
            step, the losses of its micro-batches add up to that of the step.
    """
    num_valid = _num_valid(routing)
    probabilities = router_probabilities(routing.logits[routing.valid]).sum(dim=0)
    mean = probabilities / (num_valid if num_tokens is None else num_tokens)
    if fractions is None:
        fractions = routing.expert_counts().to(mean.dtype) / num_valid
    return routing.num_experts * (fractions.detach().to(mean.dtype) * mean).sum()


def sequence_balance_loss(
    routing: Routing, *, num_sequences: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Mean over examples of the balance loss of each example's own tokens.

    Args:
        routing: what the router decided; its `segments` say which example a token belongs to.
        num_sequences: number of examples that the mean is over where these are a part of them;
            those of `routing` by default. With the number of a whole step, the losses of its
            micro-batches add up to that of the step.
    """
    segments = _renumbered(routing.segments[routing.valid])
    found = int(segments.max()) + 1 if segments.numel() else 0
    probabilities = router_probabilities(routing.logits[routing.valid])
    sums = probabilities.new_zeros(found, routing.num_experts)
    sums = sums.index_add(0, segments, probabilities)
    lengths = torch.bincount(segments, minlength=found).to(sums.dtype).unsqueeze(1)
    fractions = _counts_by_segment(routing, segments, found) / lengths
    losses = routing.num_experts * (fractions * (sums / lengths)).sum(dim=1)
    return losses.sum() / (max(found, 1) if num_sequences is None else num_sequences)


def z_loss(routing: Routing, *, num_tokens: Tensor | int | None = None) -> Float[Tensor, ""]:
    """Mean over valid tokens of the squared log-partition of the router logits.

    Zoph et al. 2022, equation 5. A perfectly indifferent router with logits 0 scores (ln E)^2.

    Args:
        routing: what the router decided for some tokens.
        num_tokens: number of tokens that the mean is over where these are a part of them; the
            valid tokens of `routing` by default.
    """
    logits = _at_least_float32(routing.logits[routing.valid])
    total = logits.logsumexp(dim=-1).square().sum()
    return total / (_num_valid(routing) if num_tokens is None else num_tokens)


def _renumbered(segments: Int[Tensor, " V"]) -> Int[Tensor, " V"]:
    """Number the values that occur from 0 without gaps."""
    return torch.unique(segments, return_inverse=True)[1]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _counts_by_segment(
    routing: Routing, segments: Int[Tensor, " V"], num_segments: int
) -> Int[Tensor, "S E"]:
    of_token = torch.zeros_like(routing.segments)
    of_token[routing.valid] = segments
    cells = of_token[routing.token_ids] * routing.num_experts + routing.expert_ids
    counts = torch.bincount(cells, minlength=num_segments * routing.num_experts)
    return counts.reshape(num_segments, routing.num_experts)


def _num_valid(routing: Routing) -> Int[Tensor, ""]:
    # A micro-batch of padding alone contributes nothing, not 0 / 0.
    return routing.valid.sum().clamp(min=1)


def _at_least_float32(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
