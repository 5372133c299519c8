"""Low-rank experts: LoRA for every expert of a sparse model, in the grouped path (`LowRankTuner`).

PEFT adapts fused experts by writing `W + scale * B A` out for all of them in every step. Here each expert
adds `scale * B (A x)` for its own tokens, so dropout, one A for all experts and ranks that differ between
experts are possible, and frozen weights get no gradient.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.models.blocks import require_moe_blocks
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute.low_rank import (
    ExpertFactors,
    LowRankExperts,
    LowRankFactors,
    set_low_rank_experts,
)
from flanmoe.tuners.adapter_saving import write_adapter
from flanmoe.tuners.attached import AttachedTuner, require_tunable_experts
from flanmoe.tuners.expert_matrices import MATRICES, ExpertMatrix, stored_matrices
from flanmoe.tuners.linear_layers import LinearConfig, LinearLayers, linear_settings
from flanmoe.tuners.merging import (
    MergedExperts,
    MergeReport,
    probe_logits,
    require_agreement,
    require_changes,
)

Ranks = int | tuple[int, ...]


class LowRankConfig(Config):
    """Low-rank changes of all experts of a sparse model.

    Attributes:
        rank: of every expert; or one for each expert of a block; or for each block by its path (such as
            `model.layers.0.mlp`) one or the other. Rank 0 leaves an expert as it is, and so does a mapping with
            blocks that it does not name.
        alpha: an expert of rank r scales its change by alpha / r.
        rank_stabilised: scale by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).
        matrices: which matrices of an expert are changed: the first (gate and up, fused), the second.
        shared_a: all experts of a block have one A, and B of their own.
        dropout: share of the inputs of A that is set to 0 in training.
        linear: changes of linear layers and routers beside the experts.
        merge: put what was learnt into the model's weights when training ends. Without it the model stays as it
            was and the adapter is saved alone.
    """

    kind: Literal["low_rank"] = "low_rank"
    rank: Ranks | dict[str, Ranks] = 8
    alpha: float = Field(default=16.0, gt=0)
    rank_stabilised: bool = False
    matrices: tuple[ExpertMatrix, ...] = Field(default=("gate_up", "down"), min_length=1)
    shared_a: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    linear: LinearConfig | None = None
    merge: bool = True

    @field_validator("rank")
    @classmethod
    def _some_rank(cls, rank: Ranks | dict[str, Ranks]) -> Ranks | dict[str, Ranks]:
        groups = rank.values() if isinstance(rank, dict) else [rank]
        ranks = [one for group in groups for one in ([group] if isinstance(group, int) else group)]
        if any(one < 0 for one in ranks) or not any(ranks):
            raise ValueError(
                f"must be at least 0 for every expert and above 0 for one of them, but is {rank}"
            )
        return rank


class LowRankTuner(AttachedTuner):
    """Low-rank changes in a model.

    Args:
        model: the model.
        changes: for each block that is changed, by its path, the changes of its experts.
        linear: by path, PEFT's settings of the layers that are changed beside the experts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        changes: Mapping[str, LowRankExperts],
        linear: Mapping[str, LoraConfig] | None = None,
    ) -> None:
        super().__init__(model)
        self.blocks = {
            block.name: block for block in require_moe_blocks(model) if block.name in changes
        }
        self.changes = dict(changes)
        for name, change in self.changes.items():
            set_low_rank_experts(self.blocks[name].experts, change)
        self.linear = LinearLayers(model, linear or {})

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT does; see `flanmoe.tuners.adapter_saving`.

        Raises:
            DiskError: if it cannot be written.
        """
        paths = {id(module): path for path, module in self.model.named_modules()}
        changes = {
            paths[id(self.blocks[name].experts)]: change for name, change in self.changes.items()
        }
        write_adapter(self.model, changes, self.linear, folder)

    def merge(self) -> MergeReport:
        """Add every change to the weights that it is of, take it off, and check both.

        Raises:
            ModelError: if a matrix did not change that should have, no expert changed, or logits changed.
        """
        before = probe_logits(self.model)
        merged, unmoved = self._merge_experts()
        unmoved += self.linear.merge()
        linear_layers = len(self.linear.layers)
        self.detach()
        require_changes(merged, unmoved)
        share, largest = require_agreement(before, probe_logits(self.model))
        return MergeReport(
            blocks=merged,
            linear_layers=linear_layers,
            agreeing_share=share,
            largest_difference=largest,
        )

    def _merge_experts(self) -> tuple[tuple[MergedExperts, ...], list[str]]:
        """Add the changes of experts; returns what that did, and the matrices that it left as they were."""
        merged: list[MergedExperts] = []
        unmoved: list[str] = []
        for name, block in self.blocks.items():
            done, left = _merge_block(block, self.changes[name])
            merged.append(done)
            unmoved += left
        return tuple(merged), unmoved

    def _take_off(self) -> None:
        for block in self.blocks.values():
            set_low_rank_experts(block.experts, None)
        self.linear.take_off()


def attach_low_rank(
    model: PreTrainedModel, config: LowRankConfig, generator: torch.Generator
) -> LowRankTuner:
    """Put low-rank changes of nothing into a model and freeze everything else.

    Args:
        model: a sparse model; it may be on the meta device.
        config: which changes.
        generator: draws A.

    Raises:
        ModelError: if the model is dense, its experts run something else than flanmoe's compute, ranks do not
            suit its blocks, or a target of `linear` matches nothing.
    """
    blocks = require_moe_blocks(model)
    for block in blocks:
        require_tunable_experts(block)
    ranks = ranks_by_block(config.rank, blocks)
    linear = linear_settings(model, config.linear)
    changes = {
        block.name: new_change(block.experts, ranks[block.name], config)
        for block in blocks
        if any(ranks[block.name])
    }
    tuner = LowRankTuner(model, changes, linear)
    if model.device.type != "meta":
        for change in changes.values():
            for factors in change.factors.values():
                factors.draw(generator)
        tuner.linear.draw(generator)
    return tuner


def new_change(experts: nn.Module, ranks: Sequence[int], config: LowRankConfig) -> LowRankExperts:
    """Return a change of nothing of the experts of one block, A not drawn yet."""

    def factors(matrix: ExpertMatrix) -> LowRankFactors | None:
        if matrix not in config.matrices:
            return None
        stored = stored_matrices(experts, matrix)
        return LowRankFactors(
            ranks,
            alpha=config.alpha,
            rank_stabilised=config.rank_stabilised,
            inputs=stored.shape[2],
            outputs=stored.shape[1],
            shared_a=config.shared_a,
            device=stored.device,
            dtype=torch.promote_types(stored.dtype, torch.float32),
        )

    change = LowRankExperts(factors("gate_up"), factors("down"), dropout=config.dropout)
    return change.train(experts.training)


def ranks_by_block(
    rank: Ranks | Mapping[str, Ranks], blocks: Sequence[MoEBlock]
) -> dict[str, tuple[int, ...]]:
    """Return the rank of every expert of every block.

    Raises:
        ModelError: if there are ranks for a block that is not there, or not one for each expert.
    """
    names = [block.name for block in blocks]
    given = rank if isinstance(rank, Mapping) else dict.fromkeys(names, rank)
    for name in given:
        if name not in names:
            raise ModelError(
                f"`rank` must name sparse blocks of the model, but names `{name}`."
                f"{nearest_name_hint(name, names)} There are {listing(names)}."
            )
    return {block.name: _ranks(given.get(block.name, 0), block) for block in blocks}


def _ranks(given: Ranks, block: MoEBlock) -> tuple[int, ...]:
    if isinstance(given, int):
        return (given,) * block.num_experts
    if len(given) != block.num_experts:
        raise ModelError(
            f"`rank` must be one number or one for each of the {block.num_experts} experts of {block.name}, "
            f"but is {len(given)} numbers."
        )
    return tuple(given)


def _merge_block(block: MoEBlock, change: LowRankExperts) -> tuple[MergedExperts, list[str]]:
    tuned, moved = set[int](), set[int]()
    unmoved: list[str] = []
    for matrix in MATRICES:
        factors = change.factors.get(matrix)
        if factors is None:
            continue
        stored = stored_matrices(block.experts, matrix)
        tuned |= {expert for expert, rank in enumerate(factors.ranks) if rank}
        for expert in range(block.num_experts):
            added = _written_out(factors.of_expert(expert))
            if not added.any():
                continue
            if _add(stored[expert], added):
                moved.add(expert)
            else:
                unmoved.append(f"{matrix} of expert {expert} of {block.name}")
    report = MergedExperts(
        name=block.name,
        num_experts=block.num_experts,
        changed=len(moved),
        left=tuple(sorted(tuned - moved)),
    )
    return report, unmoved


def _written_out(factors: ExpertFactors) -> Tensor:
    """Return the change of one expert's matrix, in the precision of its factors."""
    return (factors.scale * factors.b.detach().T) @ factors.a.detach()


def _add(stored: Tensor, change: Tensor) -> bool:
    """Add a change to an expert's matrix in place; returns whether the matrix is another now."""
    total = (stored.to(change.dtype) + change).to(stored.dtype)
    has_moved = not torch.equal(total, stored)
    stored.copy_(total)
    return has_moved
