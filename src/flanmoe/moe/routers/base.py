"""What all routers share: scores in float32, input jitter, refusal of NaN, and their registry.

A router is a bias-free linear map from hidden states to one logit an expert, and a rule that turns
logits into a `Routing`. The rule is what the files beside this one differ in.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.core.names import listing
from flanmoe.core.registry import Registry
from flanmoe.moe.losses import router_probabilities
from flanmoe.moe.routing import ForcedRouting, Routing, places, require_finite_logits


class RouterConfig(Config):
    """What every router is told.

    Attributes:
        num_experts: experts to choose from.
        jitter: in training mode the router's input is multiplied elementwise by values drawn
            uniformly from 1 - jitter to 1 + jitter. The experts see the input as it was.
        init_std: standard deviation of the initial weights (T5X: 0.02).
    """

    num_experts: int = Field(ge=1)
    jitter: float = Field(default=0.0, ge=0, lt=1)
    init_std: float = Field(default=0.02, gt=0)

    @property
    def looks_ahead(self) -> str | None:
        """Why a token's routing depends on later tokens of its sequence; None if it does not.

        Tight capacity makes second choices depend on later tokens too; that is said in the docs
        and not here, because a limit can be lifted where it matters.
        """
        return None

    def build(self, *, hidden_size: int, causal: bool = False) -> "Router":
        """Return a router for hidden states of a width.

        Args:
            hidden_size: width of the hidden states.
            causal: whether it will sit in a causal decoder.

        Raises:
            ModelError: if it looks ahead although the decoder is causal.
        """
        if causal and self.looks_ahead:
            raise ModelError(
                "A router in a causal decoder must not look at later tokens, but "
                f"{self.looks_ahead}. Use token choice in natural order there (`top_k`, `switch`, "
                "`gshard` or `st_moe`), and this router in an encoder."
            )
        return self._build(hidden_size)

    @abstractmethod
    def _build(self, hidden_size: int) -> "Router":
        """Return the router."""


routers: Registry[type[RouterConfig]] = Registry("router")


def parse_router(values: Mapping[str, Any], *, origin: str = "router") -> RouterConfig:
    """Return the configuration that `kind` names, with or without its version.

    Raises:
        ConfigError: if `kind` is missing or not known, or a value is wrong.
    """
    if "kind" not in values:
        known = listing(sorted(name.rpartition(".v")[0] for name in routers))
        raise ConfigError(f"{origin} must name its `kind` ({known}), but has none.")
    kind = routers.resolve(str(values["kind"]))
    return routers.get(kind).parse({**values, "kind": kind}, origin=origin)


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens with their scores. T tokens, E experts.

    Attributes:
        logits: raw scores.
        probabilities: their softmax over experts.
        valid: False where a token is padding.
        segments: the number of each token's example.
    """

    logits: Float[Tensor, "T E"]
    probabilities: Float[Tensor, "T E"]
    valid: Bool[Tensor, " T"]
    segments: Int[Tensor, " T"]


class Router(nn.Module, ABC):
    """Scores tokens and decides which experts compute them.

    The weight is computed with in float32 (float64 for float64 input) whatever the input's
    precision and whether autocast is on: rounded logits tie experts that are not equal.

    Args:
        config: number of experts, jitter, initial weights.
        hidden_size: width of the hidden states.
    """

    def __init__(self, config: RouterConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.jitter = config.jitter
        self.init_std = config.init_std
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=self.init_std)

    @property
    @abstractmethod
    def top_k(self) -> int:
        """Experts that a token asks for; 0 where experts choose."""

    def forward(
        self,
        hidden: Float[Tensor, "T H"],
        *,
        valid: Bool[Tensor, " T"] | None = None,
        segments: Int[Tensor, " T"] | None = None,
        forced: ForcedRouting | None = None,
    ) -> Routing:
        """Route tokens.

        Args:
            hidden: one row a token.
            valid: False where a token is padding, which takes no place; without it all count.
            segments: the number of each token's example; without it the batch is one.
            forced: experts to use whatever the scores say.

        Raises:
            ModelError: if a logit of a real token is NaN or infinite, or `forced` does not fit.
        """
        if valid is None:
            valid = hidden.new_ones(len(hidden), dtype=torch.bool)
        else:
            # Padding may hold NaN, and 0 times that would be in the gradient of the weight.
            hidden = hidden.masked_fill(~valid.unsqueeze(1), 0)
        if segments is None:
            segments = hidden.new_zeros(len(hidden), dtype=torch.long)
        logits = self._logits(hidden)
        require_finite_logits(logits, valid, router=f"a router ({type(self).__name__})")
        scored = Scored(logits, router_probabilities(logits), valid, segments)
        if forced is None:
            return self.route(scored)
        self._check_forced(forced, num_tokens=len(hidden))
        return self.replay(scored, forced)

    @abstractmethod
    def route(self, scored: Scored) -> Routing:
        """Decide from the scores."""

    @abstractmethod
    def replay(self, scored: Scored, forced: ForcedRouting) -> Routing:
        """Make the given assignments, with gates from the scores."""

    def _logits(self, hidden: Float[Tensor, "T H"]) -> Float[Tensor, "T E"]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden.to(dtype)
            if self.training and self.jitter > 0:
                # Out of place: the experts must get the input without the noise.
                inputs = inputs * torch.empty_like(inputs).uniform_(
                    1 - self.jitter, 1 + self.jitter
                )
            return F.linear(inputs, self.weight.to(dtype))

    def _check_forced(self, forced: ForcedRouting, *, num_tokens: int) -> None:
        found, width = forced.choices.expert_ids.shape
        if found != num_tokens or width != self.top_k:
            raise ModelError(
                f"Forced experts must be given for {num_tokens} tokens with {self.top_k} choices "
                f"each, but are given for {found} tokens with {width}. Record them with this "
                "router on these tokens."
            )
        named = torch.cat([forced.choices.expert_ids.reshape(-1), forced.expert_ids])
        _require_below(self.num_experts, named, what="experts")
        _require_below(num_tokens, forced.token_ids, what="tokens")
        pairs = forced.token_ids * self.num_experts + forced.expert_ids
        repeated = int((places(pairs) > 0).sum())
        if repeated:
            raise ModelError(
                f"A token can be forced to an expert once, but {repeated} of {len(pairs)} forced "
                "assignments are repeated. Record them with this router on these tokens."
            )


def _require_below(limit: int, ids: Int[Tensor, " N"], *, what: str) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
        raise ModelError(
            f"Forced {what} must be 0 to {limit - 1}, but are {int(ids.min())} to "
            f"{int(ids.max())}. Record them with this router on these tokens."
        )
