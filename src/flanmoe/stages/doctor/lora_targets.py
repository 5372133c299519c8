"""What PEFT's LoRA adapts in a sparse model: experts, routers, or attention alone."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from flanmoe.models.blocks import moe_blocks
from flanmoe.stages.doctor.check import Check, Measured
from flanmoe.stages.doctor.installed import library
from flanmoe.stages.doctor.tiny import tiny_decoder

_ATTENTION = ("q_proj", "v_proj")
# What Mixtral's checkpoints call the three matrices of an expert, and what most other families do.
_OWN_NAMES = ("w1", "w2", "w3")
_OTHER_NAMES = ("gate_proj", "up_proj", "down_proj")
WAY_OUT_NAMES = (
    "Name what is to be tuned: attention with `target_modules` of `LoraConfig`, the experts' fused tensors "
    "with `target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']`."
)
_WAY_OUT_TARGETS = (
    f"{WAY_OUT_NAMES} Before a run, count the trainable parameters whose names hold `experts`."
)


@dataclass(frozen=True, slots=True)
class Adapted:
    """What LoRA adapted, and what PEFT said about it.

    Attributes:
        expert_tensors, of_expert_tensors: fused matrices of experts that got an adapter, and all of them.
        routers, of_routers: the same of routers.
        parameters: trainable parameters.
        said: warnings, and the message of a refusal.
        refused: PEFT raised, and nothing was adapted.
    """

    expert_tensors: int
    of_expert_tensors: int
    routers: int
    of_routers: int
    parameters: int
    said: str
    refused: bool


def adapt(
    model: PreTrainedModel, targets: Sequence[str] | str | None, *, exclude: Sequence[str] = ()
) -> Adapted:
    """Put LoRA into a model, in place, and look at what it reached; works on the meta device too.

    Args:
        model: a model that is not needed afterwards.
        targets: `target_modules` of PEFT's `LoraConfig`; None takes PEFT's default for the model.
        exclude: its `exclude_modules`.
    """
    peft = library("peft")
    blocks = moe_blocks(model)
    paths = {id(module): f".{name}." for name, module in model.named_modules()}
    experts = [paths[id(block.experts)] for block in blocks]
    routers = [paths[id(block.router)] for block in blocks]
    fused = sum(_num_matrices(block.experts) for block in blocks)
    chosen = list(targets) if isinstance(targets, list | tuple) else targets
    refused = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = peft.LoraConfig(
                r=2, target_modules=chosen, exclude_modules=list(exclude) or None
            )
            model = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
            message = ""
        except ValueError as refusal:
            message, refused = str(refusal), True
    trained = {} if refused else {n: p for n, p in model.named_parameters() if p.requires_grad}
    said = " ".join([message, *(str(warning.message) for warning in caught)]).strip()
    return Adapted(
        expert_tensors=sum("lora_A" in n and any(p in n for p in experts) for n in trained),
        of_expert_tensors=fused,
        routers=sum(any(path in name for name in trained) for path in routers),
        of_routers=len(routers),
        parameters=sum(parameter.numel() for parameter in trained.values()),
        said=said,
        refused=refused,
    )


def _num_matrices(experts: nn.Module) -> int:
    return sum(parameter.ndim == 3 for parameter in experts.parameters(recurse=False))


def _own_names() -> Measured:
    found = adapt(tiny_decoder(), _OWN_NAMES)
    return Measured(found.expert_tensors, expected=found.of_expert_tensors)


def _silent_names() -> Measured:
    found = adapt(tiny_decoder(), [*_ATTENTION, *_OTHER_NAMES])
    if found.expert_tensors:
        return Measured(0, f"They reach {found.expert_tensors} expert tensors.")
    if found.refused:
        return Measured(0, f"PEFT refuses them: {found.said}")
    silent = [name for name in _OTHER_NAMES if name not in found.said]
    return Measured(
        len(silent),
        f"Expert tensors adapted: {found.expert_tensors} of {found.of_expert_tensors}; trainable parameters: "
        f"{found.parameters}, all in attention.",
    )


def _routers_of_all_linear() -> Measured:
    found = adapt(tiny_decoder(), "all-linear")
    excluded = adapt(tiny_decoder(), "all-linear", exclude=["gate"])
    return Measured(
        found.routers,
        f"Of {found.of_routers} routers; with `exclude_modules=['gate']`: {excluded.routers}. Expert tensors "
        f"adapted: {found.expert_tensors} of {found.of_expert_tensors}.",
    )


CHECKS = (
    Check(
        name="lora_own_names",
        library="peft",
        measures="LoRA on Mixtral's own names (w1, w2, w3): expert tensors adapted",
        expected=4.0,
        meaning="LoRA is asked to adapt the experts and leaves some as they are.",
        way_out=_WAY_OUT_TARGETS,
        probe=_own_names,
    ),
    Check(
        name="lora_foreign_names",
        library="peft",
        measures=(
            "LoRA on Mixtral with q_proj, v_proj and gate_proj, up_proj, down_proj: names that match nothing, "
            "without a word"
        ),
        expected=0.0,
        meaning=(
            "With target names of another family only attention is tuned: the experts, most of the "
            "parameters, stay as they were, and the run looks well."
        ),
        way_out=_WAY_OUT_TARGETS,
        probe=_silent_names,
    ),
    Check(
        name="lora_all_linear_router",
        library="peft",
        measures="LoRA with `all-linear` on Mixtral: routers adapted",
        expected=0.0,
        meaning=(
            "`all-linear` tunes the routers along with everything else: tokens move to other experts during "
            "tuning, with no balance loss unless one is asked for."
        ),
        way_out=WAY_OUT_NAMES,
        probe=_routers_of_all_linear,
    ),
)
