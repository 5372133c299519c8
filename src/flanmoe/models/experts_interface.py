"""flanmoe's expert compute inside native transformers models (DESIGN 5.4).

transformers lets every experts module look up its forward by name. This module adds the name
`flanmoe`; a model switches over with `model.set_experts_implementation("flanmoe")`, which
`load_model` does.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flanmoe.moe.compute import (
    FusedExperts,
    expert_ffn,
    expert_observer,
    hidden_dropout,
)

EXPERTS_IMPLEMENTATION = "flanmoe"


def fused_experts(module: Any) -> FusedExperts:
    """View a transformers experts module as `FusedExperts`; nothing is copied.

    Reads the flags that transformers sets on every such module: transposed storage becomes a view,
    and an interleaved layout is the business of the module's own gate function.
    """
    first = module.gate_up_proj if module.has_gate else module.up_proj
    first_bias = None
    if module.has_bias:
        first_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
    down = module.down_proj
    return FusedExperts(
        gate_up=first.transpose(1, 2) if module.is_transposed else first,
        down=down.transpose(1, 2) if module.is_transposed else down,
        combine=module._apply_gate if module.has_gate else module.act_fn,
        gate_up_bias=first_bias,
        down_bias=module.down_proj_bias if module.has_bias else None,
        output_norm=module.post_expert_norm if module.has_post_expert_norm else None,
        hidden_dropout=hidden_dropout(module) if module.training else 0.0,
        observer=expert_observer(module),
    )


def experts_implementation(module: Any) -> str:
    """Return the name under which a transformers experts module looks up its forward."""
    return module.config._experts_implementation


def experts_forward(
    module: Any,
    hidden: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T k"],
    gates: Float[Tensor, "T k"],
) -> Float[Tensor, "T H"]:
    """Stand in for the forward of any transformers experts module."""
    return expert_ffn(hidden, expert_ids, gates, fused_experts(module))


def register_experts_implementation() -> None:
    """Make `flanmoe` known to transformers; doing it twice changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
