"""What share of tokens an expert computes, for every sparse block of any model that can be read."""

from dataclasses import dataclass
from fractions import Fraction

from torch import nn
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routers.expert_choice import ExpertChoiceRouter


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """A router and its experts.

    Attributes:
        router, experts: the modules.
        num_experts: how many experts there are.
        share: mean share of tokens that one expert computes; see `visits_per_token`.
        asked: whether tokens ask for experts; otherwise experts choose tokens.
        fused: the matrices of all experts lie in 3-D parameters; otherwise each expert is a module.
    """

    router: nn.Module
    experts: nn.Module
    num_experts: int
    share: Fraction
    asked: bool
    fused: bool

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the experts."""
        return list(self.experts.parameters(recurse=not self.fused))


def visits_per_token(block: MoEBlock) -> Fraction:
    """Return the mean number of experts that a token visits.

    Where tokens choose, it is the number that each asks for; a capacity that turns some away is not
    looked at. Where experts choose, it is the capacity factor; that their places are whole numbers
    is not looked at.

    Raises:
        ModelError: if tokens do not ask, and the router is not one of expert choice.
    """
    if block.top_k:
        return Fraction(block.top_k)
    if not isinstance(block.router, ExpertChoiceRouter):
        raise ModelError(
            "The number of experts that a token visits must be known to count it, but the router of "
            f"{block.name} ({type(block.router).__name__}) says neither how many tokens ask for nor "
            "how many experts take. flanmoe cannot count this architecture yet."
        )
    # As the decimal number that it is written as; no expert takes a token twice.
    return min(Fraction(str(block.router.capacity_factor)), Fraction(block.num_experts))


def routed_experts(model: nn.Module) -> list[RoutedExperts]:
    """Return the routers of a model with their experts; none for a dense model.

    Experts that are not fused are read in transformers' Switch.

    Raises:
        ModelError: if there are others that are not fused, or a sparse block cannot be read (`moe_blocks`).
    """
    found = [
        RoutedExperts(
            router=block.router,
            experts=block.experts,
            num_experts=block.num_experts,
            share=visits_per_token(block) / block.num_experts,
            asked=block.top_k > 0,
            fused=True,
        )
        for block in moe_blocks(model)
    ]
    for name, module in model.named_modules():
        children = dict(module.named_children())
        router, experts = children.get("router"), children.get("experts")
        if router is not None and isinstance(experts, nn.ModuleDict | nn.ModuleList):
            found.append(_of_modules(name, router, experts))
    return found


def _of_modules(
    name: str, router: nn.Module, experts: nn.ModuleDict | nn.ModuleList
) -> RoutedExperts:
    if not isinstance(router, SwitchTransformersTop1Router):
        raise ModelError(
            "Experts that are modules of their own are counted behind transformers' Switch router, but "
            f"those of {name} are behind {type(router).__name__}. flanmoe cannot count this "
            "architecture yet."
        )
    number = len(experts)
    return RoutedExperts(
        router, experts, number, share=Fraction(1, number), asked=True, fused=False
    )
