"""The stages `upcycle` and `upcycle_t5`: a dense model becomes a sparse one, checked before it is saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.config import Config, apply_overrides
from flanmoe.core.console import progress, say
from flanmoe.core.files import require_new_folder, whole_folder
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.results import write_training_hashes
from flanmoe.models.flan_moe_t5.configuration import SIDES
from flanmoe.models.flan_moe_t5.upcycle import upcycle_t5
from flanmoe.models.loading import MODEL_MARKER, save_model
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.models.upcycle import check_step0, upcycle
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import UpcycleStage, UpcycleT5Stage

# What the two models are compared on: plain prose of ours, enough to visit many experts.
_PROBE_TEXT = (
    "A market opens before sunrise. Farmers unload crates of apples, onions and late tomatoes, a baker "
    "sets out forty loaves, and a girl counts change from a tin. By nine o'clock the square is full; by two "
    "it is swept. If each of twelve stalls sells thirty kilograms at two euros a kilogram, how much money "
    "changes hands? First multiply twelve by thirty, which is 360, then double it: 720 euros. Not every "
    "sale is a good one, though. The river, which floods in spring, decides more than the price does, and "
    "the council argues about a wall: engineers want concrete, biologists want reeds, historians want the "
    "old mill kept. def total(stalls, weight, price): return stalls * weight * price. True or false: a "
    "reed bed slows water? True. The answer is (B)."
)


class UpcycleResult(Config):
    """What upcycling did.

    Attributes:
        step0_max_abs_diff: largest difference between a logit of the dense and of the sparse model.
        exact: whether the stage promises that it is 0 up to rounding.
        dense, sparse: parameter counts.
    """

    step0_max_abs_diff: float
    exact: bool
    dense: ParameterCount
    sparse: ParameterCount


def run_upcycle(
    stage: UpcycleStage | UpcycleT5Stage, held: HeldModel, context: StageContext
) -> tuple[HeldModel, UpcycleResult]:
    """Upcycle the model in hand, compare it with the dense one, save it in the stage's folder.

    Raises:
        ModelError: if the model cannot be upcycled as asked, or an exact stage differs at step 0.
    """
    return upcycle_and_save(stage, held, context.model_folder, context.seeds.child("upcycle"))


def upcycle_and_save(
    stage: UpcycleStage | UpcycleT5Stage, held: HeldModel, folder: Path, seeds: SeedTree
) -> tuple[HeldModel, UpcycleResult]:
    """Upcycle, compare, save to `folder`; see `run_upcycle`.

    What the dense model was trained on, the sparse one has seen: its training hashes go along.
    """
    # Read before the bar: loading may show one of its own.
    dense, tokenizer, hashes = held.model(), held.tokenizer(), held.training_hashes()
    with progress("    upcycling", total=3, unit="parts") as advance:
        sparse = _sparse(dense, stage, seeds)
        advance(note="built")
        difference = check_step0(dense, sparse, probe_tokens(tokenizer), stage)
        advance(note="checked")
        with whole_folder(folder, marker=MODEL_MARKER) as partial:
            save_model(sparse, tokenizer, partial)
            write_training_hashes(partial, hashes)
        advance(note="saved")
    say(f"    largest logit difference from the dense model: {difference:.2e}")
    result = UpcycleResult(
        step0_max_abs_diff=difference,
        exact=stage.exact,
        dense=count_parameters(dense),
        sparse=count_parameters(sparse),
    )
    return held.saved(sparse, folder), result


def _sparse(
    dense: PreTrainedModel, stage: UpcycleStage | UpcycleT5Stage, seeds: SeedTree
) -> PreTrainedModel:
    if isinstance(stage, UpcycleT5Stage):
        return upcycle_t5(dense, stage, seeds)
    return upcycle(dense, stage, seeds)


def probe_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return one row of token ids (1, L) on which a dense and a sparse model are compared."""
    encoded = tokenizer(_PROBE_TEXT, return_tensors="pt", add_special_tokens=False)
    return encoded["input_ids"]


def upcycle_folder(
    base: str, out: Path, values: Mapping[str, Any], *, overrides: Sequence[str] = (), seed: int
) -> dict[str, Any]:
    """Upcycle `base` into the new folder `out`; what `flanmoe upcycle` does.

    Args:
        base: a known name, a folder or a hub id.
        out: folder of the sparse model.
        values: settings of the stage: `upcycle_t5` where a router is among them, else `upcycle`.
        overrides: more settings, as `dotted.key=value`.
        seed: root of every draw.

    Raises:
        RunError: if `out` already holds files.
        ConfigError: if a setting is wrong.
        ModelError: if the base cannot be upcycled as asked.
    """
    require_new_folder(out, way_out="Name another one as OUT")
    stage = _stage_of(apply_overrides(values, overrides))
    _, result = upcycle_and_save(stage, HeldModel(base), out, SeedTree(seed).child("upcycle"))
    say(f"Written to {out}.")
    RunDir(out).write_json("upcycle.json", {**stage.to_mapping(), "seed": seed, "base": base})
    return {"model": str(out), **result.to_mapping()}


def _stage_of(values: Mapping[str, Any]) -> UpcycleStage | UpcycleT5Stage:
    origin = "The command line"
    if any(f"{side}_router" in values for side in SIDES):
        return UpcycleT5Stage.parse({"stage": "upcycle_t5", **values}, origin=origin)
    return UpcycleStage.parse({"stage": "upcycle", **values}, origin=origin)
