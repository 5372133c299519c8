"""What PEFT's LoRA would adapt in the model that is asked about; looked at without weights."""

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedConfig

from flanmoe.models.meta import meta_model
from flanmoe.moe.block import MoEBlock
from flanmoe.stages.doctor.check import Check, CheckSkipped, Measured
from flanmoe.stages.doctor.installed import is_installed
from flanmoe.stages.doctor.lora_targets import Adapted, adapt


def checks(config: PreTrainedConfig, blocks: Sequence[MoEBlock]) -> tuple[Check, ...]:
    """Return the checks of LoRA's targets for a configuration with these sparse blocks."""
    adapted = partial(_adapted, config, blocks)
    way_out = (
        "Name what is to be tuned: attention with `target_modules` of `LoraConfig`, the experts' fused tensors "
        f"with `target_parameters={expert_tensors(blocks)}`."
    )
    return (
        Check(
            name="model_lora_default",
            library="model",
            measures="LoRA with PEFT's default targets: share of expert tensors adapted",
            expected=1.0,
            meaning=(
                "Without named targets LoRA leaves experts as they are: PEFT refuses the model, or tunes "
                "attention alone."
            ),
            way_out=way_out,
            probe=lambda: _share_of_experts(adapted(None)),
        ),
        Check(
            name="model_lora_all_linear",
            library="model",
            measures="LoRA with `all-linear`: share of expert tensors adapted",
            expected=1.0,
            meaning="`all-linear` sounds like everything, but leaves experts as they are.",
            way_out=way_out,
            probe=lambda: _share_of_experts(adapted("all-linear")),
        ),
        Check(
            name="model_lora_router",
            library="model",
            measures="LoRA with `all-linear`: routers adapted",
            expected=0.0,
            meaning="Routers are tuned along with everything else: tokens move to other experts.",
            way_out=way_out,
            probe=lambda: _routers(adapted("all-linear")),
        ),
    )


def expert_tensors(blocks: Sequence[MoEBlock]) -> list[str]:
    """Return the names by which `target_parameters` finds the fused matrices of all experts.

    PEFT compares the ends of names: what follows the number of a layer is the same in all of them.
    """
    found: dict[str, None] = {}
    for block in blocks:
        parts = [*block.name.split("."), "experts"]
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        end = ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
        for name, parameter in block.experts.named_parameters(recurse=False):
            if parameter.ndim == 3:
                found[f"{end}.{name}"] = None
    return list(found)


def _adapted(config: PreTrainedConfig, blocks: Sequence[MoEBlock], targets: str | None) -> Adapted:
    if not blocks:
        raise CheckSkipped("There are no sparse blocks.")
    if not is_installed("peft"):
        raise CheckSkipped("peft is not installed.")
    return adapt(meta_model(config), targets)


def _share_of_experts(found: Adapted) -> Measured:
    refusal = f" PEFT refuses: {found.said}" if found.refused else ""
    return Measured(
        found.expert_tensors / found.of_expert_tensors,
        f"{found.expert_tensors} of {found.of_expert_tensors}; {found.parameters} trainable parameters at rank "
        f"2.{refusal}",
        is_note=True,
    )


def _routers(found: Adapted) -> Measured:
    return Measured(found.routers, f"Of {found.of_routers}.")
