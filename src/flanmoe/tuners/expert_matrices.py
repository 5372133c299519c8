"""The two fused matrices of an experts module, by one name and in one orientation wherever they lie."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from flanmoe.models.blocks import ExpertLayout

ExpertMatrix = Literal["gate_up", "down"]
MATRICES: tuple[ExpertMatrix, ...] = ("gate_up", "down")


def parameter_name(experts: nn.Module, matrix: ExpertMatrix) -> str:
    """Return the name of the parameter that holds the first or the second matrices of all experts."""
    if matrix == "down":
        return "down_proj"
    # transformers' experts without a gate have another name for their first matrices; ours have one name.
    own = {name for name, _ in experts.named_parameters(recurse=False)}
    return "gate_up_proj" if "gate_up_proj" in own else "up_proj"


def stored_matrices(experts: nn.Module, matrix: ExpertMatrix) -> Float[Tensor, "E m n"]:
    """Return a view of the first or second matrices of all experts, outputs before inputs.

    Writing into it writes into the module, without autograd noticing.
    """
    stored = experts.get_parameter(parameter_name(experts, matrix)).detach()
    return stored.transpose(1, 2) if ExpertLayout.of(experts).transposed else stored
