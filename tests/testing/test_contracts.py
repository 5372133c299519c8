"""The contract checks must fail for blocks that break the contract."""

import dataclasses

import pytest
import torch

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import FusedBlock, moe_blocks
from flanmoe.moe.block import ExpertWeights
from flanmoe.testing.contracts import (
    check_counts,
    check_experts_read_back,
    check_moe_blocks,
    check_router,
    check_writing_reaches_the_model,
)
from flanmoe.testing.tiny_models import tiny_model


def _block(**changes) -> tuple:
    model = tiny_model("mixtral")
    block = moe_blocks(model)[0]
    assert isinstance(block, FusedBlock)
    return model, dataclasses.replace(block, **changes)


def test_a_dense_model_has_nothing_to_check() -> None:
    with pytest.raises(ModelError, match="has no module with a router"):
        check_moe_blocks(tiny_model("llama"))


def test_weights_are_put_back() -> None:
    model = tiny_model("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_moe_blocks(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_wrong_width_is_seen() -> None:
    class Cut(FusedBlock):
        def read_expert(self, index):
            weights = super().read_expert(index)
            return ExpertWeights(weights.gate[:9], weights.up[:9], weights.down[:, :9])

    _, block = _block()
    cut = Cut(**{f.name: getattr(block, f.name) for f in dataclasses.fields(block)})
    with pytest.raises(AssertionError, match="expert 0 has"):
        check_counts(cut)


def test_a_missed_expert_is_seen() -> None:
    _, block = _block(num_experts=7)
    with pytest.raises(AssertionError, match="expert parameters are read"):
        check_counts(block)


def test_an_expert_that_overwrites_its_neighbour_is_seen() -> None:
    class Leaky(FusedBlock):
        def write_expert(self, index, weights):
            super().write_expert(index, weights)
            super().write_expert((index + 1) % self.num_experts, weights)

    _, block = _block()
    leaky = Leaky(**{f.name: getattr(block, f.name) for f in dataclasses.fields(block)})
    with pytest.raises(AssertionError, match="after writing expert 0, expert 1 reads wrong"):
        check_experts_read_back(leaky)


def test_a_wrong_norm_top_k_is_seen() -> None:
    model, block = _block(norm_top_k=False)
    with pytest.raises(AssertionError, match="norm_top_k is False"):
        check_router(model, block)


def test_experts_that_are_not_the_models_own_are_seen() -> None:
    model, _ = _block()
    _, foreign = _block()
    with pytest.raises(AssertionError, match="the router ran 0 times"):
        check_writing_reaches_the_model(model, foreign)
    own = moe_blocks(model)[0]
    assert isinstance(own, FusedBlock)
    with pytest.raises(AssertionError, match="gate has no effect"):
        check_writing_reaches_the_model(model, dataclasses.replace(own, experts=foreign.experts))
