"""flanmoe's expert compute inside native transformers models (DESIGN 5.4).

transformers lets every experts module look up its forward by name. This module adds the name
`flanmoe`; a model switches over with `model.set_experts_implementation("flanmoe")`, which
`load_model` does. `flanmoe_triton` is the same with products made by our Triton kernels (CUDA; not measured).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from flanmoe.moe.compute import (
    FusedExperts,
    Gated,
    Plain,
    expert_ffn,
    expert_observer,
    hidden_dropout,
    keep_activation,
)
from flanmoe.moe.compute.chosen import chosen_experts
from flanmoe.moe.compute.low_rank import low_rank_experts

EXPERTS_IMPLEMENTATION = "flanmoe"
# By the names of flanmoe's implementations, what their products are made with.
KERNELS: Mapping[str, Literal["torch", "triton"]] = {
    EXPERTS_IMPLEMENTATION: "torch",
    "flanmoe_triton": "triton",
}

_ACTIVATION_NAMES: Mapping[type[nn.Module], str] = {
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    nn.ReLU: "relu",
}


def fused_experts(module: Any) -> FusedExperts:
    """View a transformers experts module as `FusedExperts`; nothing is copied.

    Reads the flags that transformers sets on every such module: transposed storage becomes a view,
    and an interleaved layout is the business of the module's own gate function. What a tuner has put beside
    the experts is part of the view.
    """
    experts = _view(module, partial(getattr, module))
    chosen = chosen_experts(module)
    if chosen is None:
        return experts
    return replace(experts, split=chosen.split(experts, _view(module, chosen.weights.__getitem__)))


def _view(module: Any, stored: Callable[[str], Any]) -> FusedExperts:
    """View what is stored by name as experts of a module."""
    first_name = "gate_up_proj" if module.has_gate else "up_proj"
    first, down = stored(first_name), stored("down_proj")
    return FusedExperts(
        gate_up=first.transpose(1, 2) if module.is_transposed else first,
        down=down.transpose(1, 2) if module.is_transposed else down,
        combine=_combine(module),
        gate_up_bias=stored(f"{first_name}_bias") if module.has_bias else None,
        down_bias=stored("down_proj_bias") if module.has_bias else None,
        output_norm=module.post_expert_norm if module.has_post_expert_norm else None,
        hidden_dropout=hidden_dropout(module) if module.training else 0.0,
        keep_activation=keep_activation(module),
        kernels=KERNELS.get(experts_implementation(module), "torch"),
        observer=expert_observer(module),
        low_rank=low_rank_experts(module),
    )


def _combine(module: Any) -> Callable[[Tensor], Tensor]:
    """Return what a module does between its products, by name where its derivative is written out."""
    name = None if _has_own_gate(module) else _activation_name(module.act_fn)
    if name is not None:
        return Gated(name) if module.has_gate else Plain(name)
    return module._apply_gate if module.has_gate else module.act_fn


def _has_own_gate(module: Any) -> bool:
    return module.has_gate and type(module)._apply_gate is not _default_apply_gate


def named_activation(module: Any) -> str:
    """Return what transformers calls that which a module does between its products, for messages."""
    if _has_own_gate(module):
        return type(module)._apply_gate.__qualname__
    return type(module.act_fn).__name__


def _activation_name(activation: Any) -> str | None:
    """Return the name that `POINTWISE` has for an activation of transformers', None if it has none."""
    # Activations that transformers can also write out in Python hold what they really call.
    function = getattr(activation, "act", None)
    if isinstance(activation, GELUActivation):
        return "gelu" if function is functional.gelu else None
    if isinstance(activation, GELUTanh):
        return "gelu_tanh" if isinstance(function, partial) else None
    return _ACTIVATION_NAMES.get(type(activation))


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
    """Make flanmoe's implementations known to transformers; doing it twice changes nothing."""
    for name in KERNELS:
        ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
