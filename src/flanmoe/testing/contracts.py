"""What every `MoEBlock` must do, as checks that a new architecture's tests can call.

Each check raises AssertionError with the block's name and what it found. Weights are put back.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.models.blocks import require_moe_blocks
from flanmoe.moe.block import ExpertWeights, MoEBlock
from flanmoe.moe.routing import Routing


def check_moe_blocks(model: PreTrainedModel) -> None:
    """Run every check on every sparse block of a model.

    Raises:
        ModelError: if the model has no sparse block.
        AssertionError: if a block breaks the contract.
    """
    for block in require_moe_blocks(model):
        check_counts(block)
        check_experts_read_back(block)
        check_router(model, block)
        check_writing_reaches_the_model(model, block)


def check_counts(block: MoEBlock) -> None:
    """Check that every expert has the block's sizes,
    and that the experts' parameters are all read."""
    assert 0 <= block.top_k <= block.num_experts, f"{block.name}: top_k {block.top_k}"
    wide, high = (block.expert_width, block.hidden_size), (block.hidden_size, block.expert_width)
    read = 0
    for index in range(block.num_experts):
        weights = block.read_expert(index)
        first = (weights.up,) if weights.gate is None else (weights.gate, weights.up)
        shapes = tuple(matrix.shape for matrix in (*first, weights.down))
        assert shapes == (*[wide] * len(first), high), f"{block.name}: expert {index} has {shapes}"
        read += sum(matrix.numel() for matrix in _matrices(weights).values())
    held = sum(p.numel() for p in block.experts.parameters(recurse=False))
    assert read == held, f"{block.name}: {read} of {held} expert parameters are read"


def check_experts_read_back(block: MoEBlock) -> None:
    """Check that an expert reads as it was written, and that its neighbours do not change."""
    before = [block.read_expert(index) for index in range(block.num_experts)]
    for index in (0, block.num_experts - 1):
        fresh = _random_like(before[index], seed=index)
        block.write_expert(index, fresh)
        for other in range(block.num_experts):
            expected = fresh if other == index else before[other]
            assert _equal(block.read_expert(other), expected), (
                f"{block.name}: after writing expert {index}, expert {other} reads wrong"
            )
        block.write_expert(index, before[index])


def check_router(model: PreTrainedModel, block: MoEBlock) -> None:
    """Check what the router returns inside the model:
    shapes, ids, and whether gates are renormalised."""
    tokens = _tokens(model)
    routing = _routing(model, block, tokens)
    num_tokens = tokens.numel()
    assert routing.logits.shape == (num_tokens, block.num_experts), f"{block.name}: logits"
    expert_ids, gates = routing.slots()
    assert expert_ids.shape == (num_tokens, block.top_k), f"{block.name}: expert ids"
    distinct = expert_ids.sort(dim=-1).values.diff(dim=-1)
    assert (distinct > 0).all(), f"{block.name}: a token visits an expert twice"
    sums = gates.sum(dim=-1)
    constant = bool((sums.max() - sums.min()) < 1e-4 * sums.max())
    assert constant == block.norm_top_k, f"{block.name}: norm_top_k is {block.norm_top_k}"


def check_writing_reaches_the_model(model: PreTrainedModel, block: MoEBlock) -> None:
    """Check that the model's output depends on each matrix of an expert
    that is in use, as written."""
    tokens = _tokens(model)
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        index = int(_routing(model, block, tokens).expert_ids[0])
        weights = block.read_expert(index)
        for name, matrix in _matrices(weights).items():
            block.write_expert(index, dataclasses.replace(weights, **{name: matrix + 0.5}))
            after = model(tokens, use_cache=False).logits
            assert not torch.equal(before, after), f"{block.name}: {name} has no effect"
        block.write_expert(index, weights)
        restored = model(tokens, use_cache=False).logits
    assert torch.equal(before, restored), f"{block.name}: writing back does not restore the model"


def _routing(model: PreTrainedModel, block: MoEBlock, tokens: Tensor) -> Routing:
    seen: list[Routing] = []

    def record(module: Any, arguments: Any, returned: Any) -> None:
        seen.append(block.routing(returned))

    handle = block.router.register_forward_hook(record)
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    assert len(seen) == 1, f"{block.name}: the router ran {len(seen)} times in one forward pass"
    return seen[0]


def _tokens(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (2, 12), generator=generator)


def _matrices(weights: ExpertWeights) -> dict[str, Float[Tensor, "..."]]:
    values = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return {name: value for name, value in values.items() if value is not None}


def _random_like(weights: ExpertWeights, *, seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    fresh = {
        name: torch.randn(matrix.shape, generator=generator).to(matrix)
        for name, matrix in _matrices(weights).items()
    }
    return dataclasses.replace(weights, **fresh)


def _equal(found: ExpertWeights, expected: ExpertWeights) -> bool:
    ours, theirs = _matrices(found), _matrices(expected)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
