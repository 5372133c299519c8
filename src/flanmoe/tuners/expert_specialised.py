"""Expert-specialised tuning (ESFT, arXiv 2407.01906): train the experts that a task uses, and nothing else.

Chosen experts train as parameters of their own (`flanmoe.moe.compute.chosen`, docs/decisions/0013), so that
everything else stays as it is bit by bit, weight decay or not, and optimizer state has their size.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.core.files import read_json_file, whole_folder, write_json
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.models.blocks import require_moe_blocks
from flanmoe.models.loading import loading_errors
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute.chosen import ChosenExperts, set_chosen_experts
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.statistics import ExpertStatistics
from flanmoe.tuners.attached import AttachedTuner, require_tunable_experts
from flanmoe.tuners.expert_selection import (
    USUAL_SHARES,
    ExpertScore,
    ExpertSelection,
    largest_number,
    select_experts,
)
from flanmoe.tuners.merging import (
    MergedExperts,
    MergeReport,
    probe_logits,
    require_agreement,
    require_changes,
)

SELECTION_FILE = "selected_experts.json"
WEIGHTS_FILE = "experts.safetensors"


class ExpertSpecialisedConfig(Config):
    """Which experts of a sparse model train.

    Attributes:
        score: `gate` (mean gate) or `token` (share of choices); see `flanmoe.tuners.expert_selection`.
        share: of each layer the fewest experts train whose shares of the score add up to this; None for
            the paper's 0.1 of gates or 0.2 of tokens.
        statistics: file of `ExpertStatistics` with what the model does with the task; None to gather them on
            the first rows of the data that is trained on.
        groups: names of the groups of the statistics whose tokens count; none for all of them.
        rows: of the data that is trained on, which statistics are gathered from without a file.
        merge: put the trained experts into the model when training ends. Without it the model stays as it
            was and the experts are saved alone.
    """

    kind: Literal["expert_specialised"] = "expert_specialised"
    score: ExpertScore = "gate"
    share: float | None = Field(default=None, gt=0, le=1)
    statistics: str | None = None
    groups: tuple[str, ...] = ()
    rows: int = Field(default=32, ge=1)
    merge: bool = True

    @property
    def threshold(self) -> float:
        """The share that is asked for."""
        return USUAL_SHARES[self.score] if self.share is None else self.share


class ExpertSpecialisedTuner(AttachedTuner):
    """Copies of chosen experts, in a model.

    Args:
        model: a sparse model; it may be on the meta device.
        selection: which experts of which blocks.

    Raises:
        ModelError: if the model is dense, its experts run something else than flanmoe's compute, or it has no
            such blocks or experts.
    """

    def __init__(self, model: PreTrainedModel, selection: ExpertSelection) -> None:
        blocks = {block.name: block for block in require_moe_blocks(model)}
        _require_there(selection, blocks)
        super().__init__(model)
        self.selection = selection
        self.blocks = {name: blocks[name] for name in selection.experts}
        self.chosen: dict[str, ChosenExperts] = {}
        for name, block in self.blocks.items():
            numbers = selection.experts[name]
            chosen = ChosenExperts(numbers, block.num_experts, expert_parameters(block))
            self.chosen[name] = chosen.train(block.experts.training)
            set_chosen_experts(block.experts, self.chosen[name])

    def save(self, folder: Path) -> None:
        """Write the chosen experts and which they are; `put_experts` reads them.

        Raises:
            DiskError: if it cannot be written.
        """
        tensors = {
            f"{name}.{parameter}.{expert}": weight.detach()[place].cpu().contiguous()
            for name, chosen in self.chosen.items()
            for parameter, weight in chosen.weights.items()
            for place, expert in enumerate(chosen.numbers)
        }
        with whole_folder(folder, marker=SELECTION_FILE) as partial:
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            write_json(partial / SELECTION_FILE, self.selection.to_mapping())

    def merge(self) -> MergeReport:
        """Write the chosen experts over those that they are copies of, take them off, and check both.

        Raises:
            ModelError: if no expert changed, or logits changed.
        """
        before = probe_logits(self.model)
        merged = tuple(
            _written_back(self.blocks[name], chosen) for name, chosen in self.chosen.items()
        )
        self.detach()
        require_changes(merged, ())
        share, largest = require_agreement(before, probe_logits(self.model))
        return MergeReport(
            blocks=merged, linear_layers=0, agreeing_share=share, largest_difference=largest
        )

    def _take_off(self) -> None:
        for block in self.blocks.values():
            set_chosen_experts(block.experts, None)


def expert_parameters(block: MoEBlock) -> dict[str, nn.Parameter]:
    """Return the parameters of an experts module that have a part for each expert, by name."""
    own = dict(block.experts.named_parameters(recurse=False))
    return {name: own[name] for name in own if own[name].shape[0] == block.num_experts}


def selection_of(
    config: ExpertSpecialisedConfig, model: PreTrainedModel, statistics: ExpertStatistics
) -> ExpertSelection:
    """Choose the experts of a model by what statistics say of a task.

    Raises:
        ModelError: if they are of other blocks than the model has, lack a group, or saw no token.
    """
    blocks = {block.name: block.num_experts for block in require_moe_blocks(model)}
    found = {layer.name: layer.num_experts for layer in statistics.layers}
    if found != blocks:
        different = sorted({name for name, _ in found.items() ^ blocks.items()})
        raise ModelError(
            f"Statistics must be of the sparse blocks of {type(model).__name__}, but differ in "
            f"{listing(different, limit=4)}. Gather them with the model that is tuned."
        )
    groups = _groups(config.groups, statistics.groups)
    sums = {layer.name: _of_groups(layer.sums, groups) for layer in statistics.layers}
    return select_experts(sums, score=config.score, threshold=config.threshold)


def most_experts(config: ExpertSpecialisedConfig, model: PreTrainedModel) -> ExpertSelection:
    """Return as many experts of each block as can be chosen, whatever the data; for plans.

    Raises:
        ModelError: if the model is dense.
    """
    return ExpertSelection(
        experts={
            block.name: tuple(range(largest_number(block.num_experts, config.threshold)))
            for block in require_moe_blocks(model)
        }
    )


@torch.no_grad()
def put_experts(model: PreTrainedModel, folder: Path) -> ExpertSelection:
    """Write experts that `ExpertSpecialisedTuner.save` wrote into a model; returns which they are.

    Raises:
        ModelError: if the folder does not hold any, or they do not suit the model.
    """
    if not (folder / SELECTION_FILE).is_file():
        raise ModelError(
            f"A folder of tuned experts must hold {SELECTION_FILE}, but {folder} has none. Name one that "
            "flanmoe wrote."
        )
    with loading_errors(str(folder), "experts"):
        selection = ExpertSelection.parse(read_json_file(folder / SELECTION_FILE))
        tensors = load_file(folder / WEIGHTS_FILE)
    blocks = {block.name: block for block in require_moe_blocks(model)}
    _require_there(selection, blocks)
    for name, numbers in selection.experts.items():
        for parameter, weight in expert_parameters(blocks[name]).items():
            for expert in numbers:
                _put(weight[expert], tensors, f"{name}.{parameter}.{expert}")
    return selection


def _put(weight: Tensor, tensors: Mapping[str, Tensor], name: str) -> None:
    saved = tensors.get(name)
    if saved is None or saved.shape != weight.shape:
        raise ModelError(
            f"Saved experts must hold {name} of shape {tuple(weight.shape)}, but hold "
            f"{'nothing of that name' if saved is None else f'shape {tuple(saved.shape)}'}. Name the model "
            "that they were trained in."
        )
    weight.copy_(saved)


def _written_back(block: MoEBlock, chosen: ChosenExperts) -> MergedExperts:
    changed: set[int] = set()
    for name, weight in expert_parameters(block).items():
        own = chosen.weights[name].detach()
        for place, expert in enumerate(chosen.numbers):
            new = own[place].to(weight.dtype)
            if not torch.equal(new, weight[expert].detach()):
                changed.add(expert)
                weight.detach()[expert].copy_(new)
    return MergedExperts(
        name=block.name,
        num_experts=block.num_experts,
        changed=len(changed),
        left=tuple(expert for expert in chosen.numbers if expert not in changed),
    )


def _require_there(selection: ExpertSelection, blocks: Mapping[str, MoEBlock]) -> None:
    for name, numbers in selection.experts.items():
        if name not in blocks:
            raise ModelError(
                f"Chosen experts must be of sparse blocks of the model, but some are of `{name}`."
                f"{nearest_name_hint(name, blocks)} There are {listing(blocks)}."
            )
        block = blocks[name]
        require_tunable_experts(block)
        if not numbers or sorted(set(numbers)) != list(numbers) or numbers[-1] >= block.num_experts:
            raise ModelError(
                f"Chosen experts of {name} must be at least 1 of its experts 0 to {block.num_experts - 1}, "
                f"ascending, but are {list(numbers)}. Choose them with statistics of this model."
            )


def _groups(wanted: Collection[str], known: Sequence[str]) -> list[int]:
    for name in wanted:
        if name not in known:
            raise ModelError(
                f"`groups` must name groups of the statistics, but names `{name}`."
                f"{nearest_name_hint(name, known)} There are {listing(known)}."
            )
    return [number for number, name in enumerate(known) if not wanted or name in wanted]


def _of_groups(sums: RoutingSums, groups: list[int]) -> RoutingSums:
    return sums.changed(lambda values: values[groups])
