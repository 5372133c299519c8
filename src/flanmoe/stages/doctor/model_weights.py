"""Weights of the model that is asked about: what they are kept in, whether they are sound, who computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.models.meta import embedding_weight, meta_model
from flanmoe.models.modes import evaluating
from flanmoe.moe.block import MoEBlock
from flanmoe.stages.doctor.check import Check, CheckSkipped, Measured
from flanmoe.stages.doctor.weight_precision import LEARNING_RATE

# Of the spread of the logits; rounding that tips a router near a tie stays below it.
_AGREEMENT = 0.05
_NUM_TOKENS = 16


def checks(model: Callable[[], PreTrainedModel], config: PreTrainedConfig) -> tuple[Check, ...]:
    """Return the checks of a model's weights; `model` gives them, or skips."""
    return (
        Check(
            name="model_weights_dtype",
            library="model",
            measures=f"share of its weights that an update of {LEARNING_RATE:g} does not change, as stored",
            expected=0.0,
            tolerance=0.05,
            meaning=(
                "transformers loads a checkpoint in the dtype that it was written in. Trained like that, most "
                "updates at fine-tuning rates are rounded away."
            ),
            way_out="flanmoe loads it in float32; in transformers say `dtype=torch.float32` and `bf16=True`.",
            probe=lambda: _unmoved_share(model(), config),
        ),
        Check(
            name="model_finite_weights",
            library="model",
            measures="weights that are NaN or infinite",
            expected=0.0,
            meaning="Every output of the model is NaN, or will be as soon as a token reaches them.",
            way_out="Get the checkpoint again, or go back to one before training broke.",
            probe=lambda: _not_finite(model()),
        ),
        Check(
            name="model_router_rows",
            library="model",
            measures="rows of routers that are zero, or the same as another row",
            expected=0.0,
            meaning=(
                "An expert with a zero row has the same score for every token; two with the same row are "
                "chosen together. Such experts are not told apart by what they are good at."
            ),
            way_out=(
                "Right after upcycling every row may be like that: rows are repeated on purpose, and tuning "
                "tells them apart. Single ones in a tuned model: draw them anew."
            ),
            probe=lambda: _dead_rows(model()),
        ),
        Check(
            name="model_experts",
            library="model",
            measures=(
                "largest difference of logits between transformers' expert compute and flanmoe's, in standard "
                "deviations"
            ),
            expected=0.0,
            tolerance=_AGREEMENT,
            meaning="The model computes something else under flanmoe than under transformers alone.",
            way_out="Please report it, with the configuration of the model.",
            probe=lambda: _disagreement(model()),
        ),
    )


def _unmoved_share(model: PreTrainedModel, config: PreTrainedConfig) -> Measured:
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    unmoved = total = 0
    for weight in model.parameters():
        if weight.ndim > 1:
            kept = weight.detach().to(stored)
            unmoved += int((kept - LEARNING_RATE == kept).sum())
            total += weight.numel()
    return Measured(
        unmoved / total, f"Written in {str(stored).removeprefix('torch.')}.", is_note=True
    )


def _not_finite(model: PreTrainedModel) -> Measured:
    found = {name: _num_not_finite(weight) for name, weight in model.named_parameters()}
    broken = [name for name, number in found.items() if number]
    routers = {id(p) for block in moe_blocks(model) for p in block.router.parameters()}
    in_routers = sum(_num_not_finite(p) for p in model.parameters() if id(p) in routers)
    where = (
        f"In {len(broken)} tensors, the first {broken[0]}; in routers {in_routers}."
        if broken
        else ""
    )
    return Measured(sum(found.values()), where)


def _num_not_finite(weight: Tensor) -> int:
    return int((~torch.isfinite(weight.detach())).sum())


def _dead_rows(model: PreTrainedModel) -> Measured:
    blocks = _sparse(model)
    found = {block.name: _num_dead_rows(block) for block in blocks}
    worst = [f"{name}: {number}" for name, number in found.items() if number]
    more = f" and {len(worst) - 4} more blocks" if len(worst) > 4 else ""
    return Measured(
        sum(found.values()),
        "; ".join(worst[:4]) + more,
        # How a model begins: granular upcycling repeats every row, routers of zeros have no other.
        is_note=all(found[block.name] == block.num_experts for block in blocks),
    )


def _num_dead_rows(block: MoEBlock) -> int:
    dead = torch.zeros(block.num_experts, dtype=torch.bool)
    for weight in block.router.parameters():
        if weight.ndim == 2 and weight.shape[0] == block.num_experts:
            rows = weight.detach().float()
            _, group, sizes = rows.unique(dim=0, return_inverse=True, return_counts=True)
            dead |= (rows == 0).all(dim=1) | (sizes[group] > 1)
    return int(dead.sum())


@torch.no_grad()
def _disagreement(model: PreTrainedModel) -> Measured:
    if model.config.is_encoder_decoder or not type(model).__module__.startswith("transformers."):
        raise CheckSkipped(f"{type(model).__name__} is not one of transformers' decoders.")
    _sparse(model)
    native: Any = meta_model(
        type(model.config).from_dict(_plain(model.config))
    ).config._experts_implementation
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding_weight(model).shape[0], (2, _NUM_TOKENS), generator=generator)
    with evaluating(model):
        ours = model(input_ids=tokens, use_cache=False).logits
        model.set_experts_implementation(native)
        try:
            theirs = model(input_ids=tokens, use_cache=False).logits
        finally:
            model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    difference = float((ours - theirs).abs().max() / ours.std())
    return Measured(difference, f"transformers would take `{native}`.")


def _plain(config: PreTrainedConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if not name.startswith("_")}


def _sparse(model: PreTrainedModel) -> list[MoEBlock]:
    blocks = moe_blocks(model)
    if not blocks:
        raise CheckSkipped("There are no sparse blocks.")
    return blocks
