"""`Experts` and `SparseFFN`: our own sparse block, in place of an FFN.

Native transformers blocks keep their own modules; this one is for models without a native home
(DESIGN 5.2) and for routers that no native class has.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.moe.compute import (
    FusedExperts,
    Gated,
    Plain,
    expert_ffn,
    expert_observer,
    hidden_dropout,
    keep_activation,
    set_hidden_dropout,
)
from flanmoe.moe.compute.chosen import chosen_experts
from flanmoe.moe.compute.low_rank import low_rank_experts
from flanmoe.moe.replay import RoutingReplay
from flanmoe.moe.routers.base import Router


class ExpertsConfig(Config):
    """The experts of one block.

    Attributes:
        num_experts: how many.
        expert_width: intermediate units of each.
        activation: `gelu_tanh` is what T5.1.1 calls gelu_new.
        gated: whether a second matrix multiplies the activation (GLU), or the activation stands
            alone as in T5 and the first Switch models.
        dropout: share of an expert's intermediate units set to 0 in training mode, apart from any
            other dropout of the model.
    """

    num_experts: int = Field(ge=1)
    expert_width: int = Field(ge=1)
    activation: Literal["relu", "silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Experts(nn.Module):
    """Bias-free expert FFNs, their matrices fused along a first axis.

    They say how their matrices lie in the words of transformers' experts interface.

    Args:
        config: counts, sizes, activation.
        hidden_size: width of what goes in and comes out.
    """

    is_transposed = False
    is_concatenated = True
    has_bias = False

    def __init__(self, config: ExpertsConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.expert_width = config.expert_width
        self.has_gate = config.gated
        self.activation = config.activation
        set_hidden_dropout(self, config.dropout)
        first = (2 if config.gated else 1) * config.expert_width
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, first, hidden_size))
        self.down_proj = nn.Parameter(
            torch.empty(config.num_experts, hidden_size, config.expert_width)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix anew with variance 1 / (its number of inputs)."""
        for matrices in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(matrices, std=matrices.shape[-1] ** -0.5)

    def fused(self) -> FusedExperts:
        """View the experts as what `expert_ffn` takes, with what a tuner put beside them; nothing is copied."""
        experts = self._view(self.gate_up_proj, self.down_proj)
        chosen = chosen_experts(self)
        if chosen is None:
            return experts
        copies = self._view(chosen.weights["gate_up_proj"], chosen.weights["down_proj"])
        return replace(experts, split=chosen.split(experts, copies))

    def _view(self, gate_up: Tensor, down: Tensor) -> FusedExperts:
        return FusedExperts(
            gate_up=gate_up,
            down=down,
            combine=Gated(self.activation) if self.has_gate else Plain(self.activation),
            hidden_dropout=hidden_dropout(self) if self.training else 0.0,
            keep_activation=keep_activation(self),
            observer=expert_observer(self),
            low_rank=low_rank_experts(self),
        )

    def forward(
        self,
        hidden: Float[Tensor, "T H"],
        expert_ids: Int[Tensor, "T S"],
        gates: Float[Tensor, "T S"],
    ) -> Float[Tensor, "T H"]:
        """Return for each token the gate-weighted sum of its experts' outputs."""
        return expert_ffn(hidden, expert_ids, gates, self.fused())


class SparseFFN(nn.Module):
    """A router and experts in place of an FFN.

    A token that no expert serves gets zeros, so that only the residual connection around the block
    carries it on.

    Args:
        router: scores tokens and assigns them.
        experts: computes them.

    Raises:
        ModelError: if the two do not have the same number of experts.
    """

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ModelError(
                "A sparse block needs a router and experts of one number, but the router chooses "
                f"from {router.num_experts} and there are {experts.num_experts}."
            )
        self.router = router
        self.experts = experts

    def forward(
        self,
        hidden: Float[Tensor, "*B H"],
        *,
        valid: Bool[Tensor, "*B"] | None = None,
        segments: Int[Tensor, "*B"] | None = None,
        replay: RoutingReplay | None = None,
    ) -> Float[Tensor, "*B H"]:
        """Return what the chosen experts make of each token.

        Args:
            hidden: hidden states, any number of leading axes; tokens are taken row after row.
            valid: False where a token is padding; it takes no place and gets zeros.
            segments: the number of each token's example, different for different rows; without it
                every row, along the last axis but one, is an example.
            replay: what remembers the decision, where this pass may be computed again.
        """
        tokens = hidden.reshape(-1, hidden.shape[-1])
        routing = (replay or RoutingReplay()).route(
            self.router,
            tokens,
            valid=None if valid is None else valid.flatten(),
            segments=_rows(hidden) if segments is None else segments.flatten(),
        )
        return self.experts(tokens, *routing.slots()).view_as(hidden)


def _rows(hidden: Float[Tensor, "*B H"]) -> Int[Tensor, " T"]:
    """Return the number of each token's row."""
    length = hidden.shape[-2] if hidden.ndim > 1 else 1
    num_tokens = hidden.shape[:-1].numel()
    return torch.arange(num_tokens, device=hidden.device) // max(length, 1)
