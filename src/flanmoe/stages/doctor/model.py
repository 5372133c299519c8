"""What one named model brings to a run: its blocks, its weights, and what libraries would do with it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_config, load_model
from flanmoe.models.meta import meta_model
from flanmoe.models.packing import require_packing_without_leak
from flanmoe.moe.block import MoEBlock
from flanmoe.stages.doctor import model_losses, model_targets, model_weights
from flanmoe.stages.doctor.check import Check, CheckSkipped, Measured
from flanmoe.stages.doctor.packing import TOLERANCE, moved

_FLOAT32_BYTES = 4
# Weights in float32, and room for a forward pass over a few tokens.
_ROOM = 1.2


@dataclass(frozen=True, slots=True)
class ModelInQuestion:
    """A model as the checks see it.

    Attributes:
        config: its configuration.
        shapes: the model without weights, on the meta device.
        blocks: the sparse blocks of `shapes`; none where it is dense or cannot be read.
        unreadable: why its blocks cannot be read; empty if they can.
        model: with weights; None where there is no room for them, or it cannot be read.
        without_weights: why there are none; empty if there are.
    """

    config: PreTrainedConfig
    shapes: PreTrainedModel
    blocks: list[MoEBlock]
    unreadable: str
    model: PreTrainedModel | None
    without_weights: str

    @classmethod
    def load(cls, reference: str) -> "ModelInQuestion":
        """Read a folder or a hub id; weights too, if there is room for them in float32.

        Raises:
            ModelError: if the configuration or the weights cannot be read.
        """
        config = load_config(reference)
        shapes = meta_model(config)
        try:
            blocks, unreadable = moe_blocks(shapes), ""
        except ModelError as error:
            blocks, unreadable = [], str(error)
        reason = unreadable or _no_room(shapes)
        return cls(
            config=config,
            shapes=shapes,
            blocks=blocks,
            unreadable=unreadable,
            model=None if reason else load_model(reference),
            without_weights=reason,
        )

    def with_weights(self) -> PreTrainedModel:
        """Return the model with its weights.

        Raises:
            CheckSkipped: if there are none.
        """
        if self.model is None:
            raise CheckSkipped(self.without_weights)
        return self.model


def _no_room(shapes: PreTrainedModel) -> str:
    needed = sum(parameter.numel() for parameter in shapes.parameters()) * _FLOAT32_BYTES * _ROOM
    free = psutil.virtual_memory().available
    if needed <= free:
        return ""
    return (
        f"The weights need {needed / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB are free: only shapes "
        "were looked at."
    )


def model_checks(asked: ModelInQuestion) -> tuple[Check, ...]:
    """Return the checks of a model."""
    return (
        _blocks_check(asked),
        _counts_check(asked),
        _packing_check(asked),
        *model_targets.checks(asked.config, asked.blocks),
        *model_losses.checks(asked.with_weights, asked.config),
        *model_weights.checks(asked.with_weights, asked.config),
    )


def _blocks_check(asked: ModelInQuestion) -> Check:
    return Check(
        name="model_blocks",
        library="model",
        measures="sparse blocks that flanmoe reads (a router and fused experts)",
        expected=1.0,
        meaning=(
            "Without blocks there are no router losses, no record of routing and no work on experts: a dense "
            "model is tuned as it is, a sparse one that cannot be read is tuned as if it were dense."
        ),
        way_out=(
            "Make a dense model sparse with `flanmoe upcycle`. A native Switch becomes readable with "
            "`flanmoe.models.flan_moe_t5.switch.load_switch`."
        ),
        probe=partial(_blocks, asked),
    )


def _blocks(asked: ModelInQuestion) -> Measured:
    if asked.unreadable:
        return Measured(0, asked.unreadable)
    if asked.blocks:
        layers = ", ".join(block.name for block in asked.blocks[:3])
        more = f" and {len(asked.blocks) - 3} more" if len(asked.blocks) > 3 else ""
        return Measured(len(asked.blocks), f"{layers}{more}.", expected=len(asked.blocks))
    separate = _separate_experts(asked.shapes)
    if separate:
        return Measured(
            0,
            f"{type(asked.shapes).__name__} keeps experts as {separate} separate groups of modules.",
            expected=separate,
        )
    return Measured(0, f"{type(asked.shapes).__name__} is dense.", is_note=True)


def _separate_experts(model: PreTrainedModel) -> int:
    """Count the groups of two or more modules of one class beside a router, as in Switch and NLLB-MoE."""
    found = 0
    for module in model.modules():
        parts: dict[str, Any] = dict(module.named_children())
        experts = list(parts["experts"].children()) if "experts" in parts else []
        found += "router" in parts and len(experts) > 1
    return found


def _counts_check(asked: ModelInQuestion) -> Check:
    return Check(
        name="model_expert_counts",
        library="model",
        measures="different numbers of experts among its layers",
        expected=1.0,
        meaning="transformers' classes hold one number of experts for all layers: none loads this model.",
        way_out="Keep it with flanmoe, or bring every layer to the same number before exporting.",
        probe=partial(_counts, asked),
    )


def _counts(asked: ModelInQuestion) -> Measured:
    if not asked.blocks:
        raise CheckSkipped("There are no sparse blocks.")
    counts = [block.num_experts for block in asked.blocks]
    chosen = sorted({block.top_k for block in asked.blocks})
    return Measured(
        len(set(counts)),
        f"Experts by sparse layer: {counts}; experts a token: {', '.join(map(str, chosen))}.",
        is_note=True,
    )


def _packing_check(asked: ModelInQuestion) -> Check:
    return Check(
        name="model_packing",
        library="model",
        measures=(
            "examples that share a row: standard deviations that one moves the logits of the next; of an "
            "encoder-decoder 1 if they are not told apart"
        ),
        expected=0.0,
        tolerance=TOLERANCE,
        meaning="Packed examples see each other: they are trained on a context that they do not have in use.",
        way_out="Put one example into each row with `packing: {examples_per_row: 1}`.",
        probe=partial(_packing, asked),
    )


def _packing(asked: ModelInQuestion) -> Measured:
    model = asked.with_weights()
    if not model.config.is_encoder_decoder:
        return Measured(moved(model, use_cache=False))
    try:
        require_packing_without_leak(model)
    except ModelError as error:
        return Measured(1, str(error))
    return Measured(0, "Told apart by the numbers of the examples.")
