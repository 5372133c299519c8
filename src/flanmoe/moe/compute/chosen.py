"""Experts of a block that train while the others stay frozen, each with weights of its own beside them.

A gradient of a fused parameter has the size of all experts, and an optimizer moves all of it: weight decay
and the moments of former steps change experts whose gradient is 0. Copies of the chosen experts, as
parameters of their own, have gradients and optimizer state of their size alone, and the fused parameter is
never written.
A block then computes in two parts: the frozen experts on their assignments, and the chosen ones on theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from flanmoe.moe.compute.fused import (
    ExpertObserver,
    ExpertOutputs,
    FusedExperts,
    Part,
    Split,
)

# Attribute of an experts module that holds the experts that are trained.
_CHOSEN = "flanmoe_chosen"
# What is behind the name of a parameter in the name of its copies.
_COPIES = "_copies"


class ChosenExperts(nn.Module):
    """Copies of some experts of one block.

    Args:
        numbers: of the chosen experts, ascending.
        num_experts: of the block.
        weights: by name, the parameters of the experts module that belong to its experts, experts along the
            first axis. They are copied, in at least 32 bits.
    """

    def __init__(
        self, numbers: Sequence[int], num_experts: int, weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.numbers = tuple(numbers)
        self.num_experts = num_experts
        # Under names of their own: a module with a `down_proj` would be taken for experts of a model.
        self.copies = nn.ParameterDict(
            {
                f"{name}{_COPIES}": nn.Parameter(
                    weight.detach()[list(self.numbers)].to(
                        torch.promote_types(weight.dtype, torch.float32)
                    )
                )
                for name, weight in weights.items()
            }
        )

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The copies by the names of the parameters that they are of."""
        return {name.removesuffix(_COPIES): copied for name, copied in self.copies.items()}

    def split(self, experts: FusedExperts, chosen: FusedExperts) -> Split:
        """Return what divides assignments between the frozen experts of a block and its chosen ones.

        Args:
            experts: all experts as they are stored.
            chosen: the copies.
        """
        own = replace(chosen, observer=_renumbered(chosen.observer, self.numbers))

        def divided(expert_ids: Int[Tensor, "T k"]) -> tuple[Part, Part]:
            few = len(self.numbers)
            places = expert_ids.new_full((self.num_experts + 1,), few)
            places[list(self.numbers)] = torch.arange(few).to(places)
            own_ids = places[expert_ids]
            frozen_ids = expert_ids.masked_fill(own_ids < few, self.num_experts)
            return Part(experts, frozen_ids), Part(own, own_ids)

        return divided


def _renumbered(observer: ExpertObserver | None, numbers: Sequence[int]) -> ExpertObserver | None:
    """Return an observer that is shown the numbers of experts in their block."""
    if observer is None:
        return None

    def shown(outputs: ExpertOutputs) -> None:
        of_block = torch.tensor(numbers).to(outputs.expert_ids)
        observer(outputs._replace(expert_ids=of_block[outputs.expert_ids]))

    return shown


def chosen_experts(experts: nn.Module) -> ChosenExperts | None:
    """Return the experts of a module, ours or not, that are trained, None where none were chosen."""
    return getattr(experts, _CHOSEN, None)


def set_chosen_experts(experts: nn.Module, chosen: ChosenExperts | None) -> None:
    """Put copies of chosen experts beside those of an experts module, as its child; None takes them off."""
    if chosen is not None:
        setattr(experts, _CHOSEN, chosen)
    elif chosen_experts(experts) is not None:
        delattr(experts, _CHOSEN)
