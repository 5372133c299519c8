"""Router losses of one layer, as pure functions of its `Routing`, and how layers are put together.

Padding enters none of them. Layers are reduced last: a model whose layers collapse onto different
experts must not look balanced because the layers were pooled first.

Counts are of what tokens asked for, before capacity turned some away: otherwise the loss would call
an expert less busy the more it overflows. Where experts choose, nothing was asked for, and the
balance loss is 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.moe.routing import Routing, numbered

Counting = Literal["any", "first"]
ConventionName = Literal["t5x", "mesh_tf", "huggingface"]


@dataclass(frozen=True, slots=True)
class Convention:
    """What a coefficient of a code base multiplies.

    Attributes:
        counting: choices that the balance loss counts: any of the k (even use scores k), or the
            first alone (even use scores 1).
        layers: whether the losses of sparse layers are averaged or added up.
        z_times_balance: whether the z-loss is multiplied by the balance coefficient as well as by
            its own.
    """

    counting: Counting
    layers: Literal["mean", "sum"]
    z_times_balance: bool

    def over_layers(self, losses: Float[Tensor, " L"]) -> Float[Tensor, ""]:
        """Put the losses of all sparse layers together."""
        return losses.mean() if self.layers == "mean" else losses.sum()

    def z_factor(self, balance_coefficient: float) -> float:
        """Return what the z-loss is multiplied by beside its own coefficient."""
        return balance_coefficient if self.z_times_balance else 1.0


# With the convention of the code base that a coefficient comes from, the coefficient keeps its
# meaning. Hugging Face pools all layers before the product: even use scores k there too, and one layer
# scores the same, but collapse of layers onto different experts cancels. That is not reproduced.
CONVENTIONS: Mapping[ConventionName, Convention] = {
    "t5x": Convention(counting="any", layers="mean", z_times_balance=False),
    "mesh_tf": Convention(counting="first", layers="sum", z_times_balance=True),
    "huggingface": Convention(counting="any", layers="mean", z_times_balance=False),
}


def router_probabilities(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Softmax over experts in float32, or in float64 where the logits are float64."""
    return at_least_float32(logits).softmax(dim=-1)


def asked_counts(routing: Routing, *, counting: Counting = "any") -> Int[Tensor, " E"]:
    """Return how many tokens asked for each expert, dropped or not."""
    width = 1 if counting == "first" else routing.choices.expert_ids.shape[1]
    asked = routing.choices.asked[:, :width]
    expert_ids = routing.choices.expert_ids[:, :width][asked]
    return torch.bincount(expert_ids, minlength=routing.num_experts)


def probability_sums(routing: Routing) -> Float[Tensor, " E"]:
    """Return the sum over valid tokens of each expert's router probability."""
    return router_probabilities(routing.logits[routing.valid]).sum(dim=0)


def balance_loss(
    routing: Routing,
    *,
    counting: Counting = "any",
    fractions: Float[Tensor, " E"] | None = None,
    num_tokens: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Load-balancing loss of one layer: E times the sum over experts of f_e P_e.

    f_e is the number of tokens that asked for expert e, per valid token, and P_e the expert's mean
    router probability over valid tokens. A perfectly balanced layer scores k (1 when first choices
    are counted alone); one that sends everything to the same k experts with certainty scores E. The
    gradient flows through P_e alone (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6; counted
    over all k choices as in Flaxformer and T5X, or over first choices as in GShard and Mesh-TF).

    Args:
        routing: what the router decided for some tokens.
        counting: choices that are counted.
        fractions: f_e where it is known for more tokens than these; that of `routing` by default.
        num_tokens: number of tokens that P_e is a mean over where these are a part of them; the
            valid tokens of `routing` by default. With the `fractions` and `num_tokens` of a whole
            step, the losses of its micro-batches add up to that of the step.
    """
    num_valid = _num_valid(routing)
    mean = probability_sums(routing) / (num_valid if num_tokens is None else num_tokens)
    if fractions is None:
        fractions = asked_counts(routing, counting=counting).to(mean.dtype) / num_valid
    return routing.num_experts * (fractions.detach().to(mean.dtype) * mean).sum()


def sequence_balance_loss(
    routing: Routing,
    *,
    counting: Counting = "any",
    num_sequences: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Mean over examples of the balance loss of each example's own tokens.

    Args:
        routing: what the router decided; its `segments` say which example a token belongs to.
        counting: choices that are counted.
        num_sequences: number of examples that the mean is over where these are a part of them;
            those of `routing` by default. With the number of a whole step, the losses of its
            micro-batches add up to that of the step.
    """
    examples = _Examples.of(routing)
    fractions = _counts_by_example(routing, examples, counting) / examples.lengths
    losses = routing.num_experts * (fractions * examples.mean_probabilities).sum(dim=1)
    return losses.sum() / (max(examples.number, 1) if num_sequences is None else num_sequences)


def importance_loss(
    routing: Routing,
    *,
    means: Float[Tensor, " E"] | None = None,
    num_tokens: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the experts' importance, the sum of their probabilities.

    With P_e the mean router probability it is E * sum of P_e^2, less 1: 0 when all experts are
    equally important, E - 1 when one has all the weight (Shazeer et al. 2017, arXiv 1701.06538,
    section 4; over the softmax of all experts as in V-MoE, arXiv 2106.05974, so that a single
    choice has a gradient too).

    Args:
        routing: what the router decided for some tokens.
        means: P_e of a whole step of which these tokens are a part. The loss is then its tangent
            there: values and gradients of micro-batches add up to those of the step.
        num_tokens: number of valid tokens of the step, where `means` are given.
    """
    num_tokens = _num_valid(routing) if num_tokens is None else num_tokens
    mean = probability_sums(routing) / num_tokens
    share = routing.valid.sum().to(mean.dtype) / num_tokens
    if means is None:
        return routing.num_experts * mean.square().sum() - share
    fixed = means.detach().to(mean.dtype)
    return routing.num_experts * (2 * fixed * mean - fixed.square() * share).sum() - share


def sequence_importance_loss(
    routing: Routing, *, num_sequences: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Mean over examples of the importance loss of each example's own tokens.

    Args:
        routing: what the router decided; its `segments` say which example a token belongs to.
        num_sequences: as in `sequence_balance_loss`.
    """
    examples = _Examples.of(routing)
    losses = routing.num_experts * examples.mean_probabilities.square().sum(dim=1) - 1
    return losses.sum() / (max(examples.number, 1) if num_sequences is None else num_sequences)


def z_loss(routing: Routing, *, num_tokens: Tensor | int | None = None) -> Float[Tensor, ""]:
    """Mean over valid tokens of the squared log-partition of the router logits.

    Zoph et al. 2022, arXiv 2202.08906, equation 5. A perfectly indifferent router with logits 0
    scores (ln E)^2.

    Args:
        routing: what the router decided for some tokens.
        num_tokens: number of tokens that the mean is over where these are a part of them; the
            valid tokens of `routing` by default.
    """
    logits = at_least_float32(routing.logits[routing.valid])
    total = logits.logsumexp(dim=-1).square().sum()
    return total / (_num_valid(routing) if num_tokens is None else num_tokens)


@dataclass(frozen=True, slots=True)
class _Examples:
    """The valid tokens of a routing, example by example. S examples, V valid tokens."""

    number: int
    of_token: Int[Tensor, " V"]
    lengths: Float[Tensor, "S 1"]
    mean_probabilities: Float[Tensor, "S E"]

    @classmethod
    def of(cls, routing: Routing) -> "_Examples":
        of_token = numbered(routing.segments[routing.valid])
        number = int(of_token.max()) + 1 if of_token.numel() else 0
        probabilities = router_probabilities(routing.logits[routing.valid])
        sums = probabilities.new_zeros(number, routing.num_experts)
        sums = sums.index_add(0, of_token, probabilities)
        lengths = torch.bincount(of_token, minlength=number).to(sums.dtype).unsqueeze(1)
        return cls(number, of_token, lengths, sums / lengths)


def _counts_by_example(
    routing: Routing, examples: _Examples, counting: Counting
) -> Int[Tensor, "S E"]:
    of_token = torch.zeros_like(routing.segments)
    of_token[routing.valid] = examples.of_token
    token_ids, expert_ids = routing.asked_pairs(first_only=counting == "first")
    cells = of_token[token_ids] * routing.num_experts + expert_ids
    counts = torch.bincount(cells, minlength=examples.number * routing.num_experts)
    return counts.reshape(examples.number, routing.num_experts)


def _num_valid(routing: Routing) -> Int[Tensor, ""]:
    # A micro-batch of padding alone contributes nothing, not 0 / 0.
    return routing.valid.sum().clamp(min=1)


def at_least_float32(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return the logits in float32, or as they are in float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
