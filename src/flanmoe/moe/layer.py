"""`Experts` and `SparseFFN`: our own sparse block, in place of an FFN.

Native transformers blocks keep their own modules; this one is for models without a native home
(DESIGN 5.2) and for routers that no native class has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.moe.block import ExpertWeights
from flanmoe.moe.experts import FusedExperts, expert_ffn, gated
from flanmoe.moe.routers.base import Router
from flanmoe.moe.routers.token_choice import TokenChoiceRouter
from flanmoe.moe.routing import ForcedRouting, Routing

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


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

    Args:
        config: counts, sizes, activation.
        hidden_size: width of what goes in and comes out.
    """

    def __init__(self, config: ExpertsConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.expert_width = config.expert_width
        self.gated = config.gated
        self.activation = config.activation
        self.dropout = config.dropout
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
        """View the experts as what `expert_ffn` takes; nothing is copied."""
        activation = _ACTIVATIONS[self.activation]
        return FusedExperts(
            gate_up=self.gate_up_proj,
            down=self.down_proj,
            combine=gated(activation) if self.gated else activation,
            hidden_dropout=self.dropout if self.training else 0.0,
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
        forced: ForcedRouting | None = None,
    ) -> Float[Tensor, "*B H"]:
        """Return what the chosen experts make of each token.

        Args:
            hidden: hidden states, any number of leading axes; tokens are taken row after row.
            valid: False where a token is padding; it takes no place and gets zeros.
            segments: the number of each token's example, different for different rows; without it
                every row, along the last axis but one, is an example.
            forced: experts to use whatever the scores say.
        """
        tokens = hidden.reshape(-1, hidden.shape[-1])
        routing = self.router(
            tokens,
            valid=None if valid is None else valid.flatten(),
            segments=_rows(hidden) if segments is None else segments.flatten(),
            forced=forced,
        )
        return self.experts(tokens, *routing.slots()).view_as(hidden)


def _rows(hidden: Float[Tensor, "*B H"]) -> Int[Tensor, " T"]:
    """Return the number of each token's row."""
    length = hidden.shape[-2] if hidden.ndim > 1 else 1
    num_tokens = hidden.shape[:-1].numel()
    return torch.arange(num_tokens, device=hidden.device) // max(length, 1)


@dataclass(slots=True)
class SparseFFNBlock:
    """A `MoEBlock` over a `SparseFFN` with gated experts."""

    name: str
    layer: int
    module: SparseFFN
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    norm_top_k: bool

    @classmethod
    def of(cls, module: SparseFFN, *, name: str, layer: int) -> "SparseFFNBlock":
        """View a block of a model.

        Args:
            module: the block.
            name: its dotted path.
            layer: number of the transformer layer that holds it.
        """
        return cls(
            name=name,
            layer=layer,
            module=module,
            router=module.router,
            experts=module.experts,
            num_experts=module.experts.num_experts,
            top_k=module.router.top_k,
            hidden_size=module.experts.down_proj.shape[1],
            expert_width=module.experts.expert_width,
            norm_top_k=_gates_sum_to_one(module.router),
        )

    def read_expert(self, index: int) -> ExpertWeights:
        """Return copies of one expert's matrices."""
        gate, up, down = (matrix.clone() for matrix in self._views(index))
        return ExpertWeights(gate, up, down)

    def write_expert(self, index: int, weights: ExpertWeights) -> None:
        """Overwrite one expert's matrices in place."""
        if any(
            bias is not None for bias in (weights.gate_bias, weights.up_bias, weights.down_bias)
        ):
            raise ModelError(
                f"Experts of {self.name} have no biases, but biases were given. Write an expert "
                "that was read from a block without them."
            )
        pairs = list(zip(self._views(index), (weights.gate, weights.up, weights.down), strict=True))
        for target, source in pairs:
            if target.shape != source.shape:
                raise ModelError(
                    f"A matrix of an expert of {self.name} has shape {tuple(target.shape)}, but "
                    f"{tuple(source.shape)} was given."
                )
        for target, source in pairs:
            target.copy_(source)

    def routing(
        self,
        returned: Any,
        *,
        valid: Bool[Tensor, " T"] | None = None,
        segments: Int[Tensor, " T"] | None = None,
    ) -> Routing:
        """Return what the router returned: it knows padding and examples itself.

        Gates are detached, as those of native blocks are.

        Raises:
            ModelError: if it was told of other padding than the recording was.
        """
        if valid is not None and not torch.equal(valid, returned.valid):
            raise ModelError(
                f"The router of {self.name} must know which tokens are padding, but counted "
                f"{int(returned.valid.sum())} real tokens where there are {int(valid.sum())}. Pass "
                "`valid` to the block in the model's forward."
            )
        return replace(returned, gates=returned.gates.detach())

    def _views(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= index < self.num_experts:
            raise ModelError(
                f"{self.name} has experts 0 to {self.num_experts - 1}, but expert {index} was "
                "asked for."
            )
        if not self.module.experts.gated:
            raise ModelError(
                f"Experts are read as a gate, an up and a down matrix, but those of {self.name} "
                "have no gate matrix."
            )
        fused = self.module.experts.gate_up_proj.detach()[index]
        gate, up = fused[: self.expert_width], fused[self.expert_width :]
        return gate, up, self.module.experts.down_proj.detach()[index]


def _gates_sum_to_one(router: Router) -> bool:
    """Say whether the gates of a token's choices sum to 1 when none is dropped."""
    if not isinstance(router, TokenChoiceRouter):
        return False
    probabilities = torch.tensor([[0.5**choice for choice in range(1, router.top_k + 1)]])
    return bool((router.gates(probabilities).sum() - 1).abs() < 1e-6)
