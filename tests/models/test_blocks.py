"""`MoEBlock` views of native models: the contract, counts, layouts, and what cannot be read."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks, require_moe_blocks
from flanmoe.models.meta import meta_model
from flanmoe.moe.block import ExpertWeights, MoEBlock
from flanmoe.moe.layer import Experts, ExpertsConfig, SparseFFN
from flanmoe.moe.routers import SwitchConfig
from flanmoe.testing.contracts import check_counts, check_experts_read_back, check_moe_blocks
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

# layers, experts, top_k, hidden size, expert width, renormalised
_EXPECTED = {
    "mixtral": ([0, 1], 8, 2, 32, 64, True),
    "qwen2_moe": ([0, 1], 8, 2, 32, 24, False),
    "qwen3_moe": ([0, 1], 8, 2, 32, 24, True),
    "olmoe": ([0, 1], 8, 4, 32, 24, False),
    "gpt_oss": ([0, 1], 8, 2, 32, 64, True),
    "deepseek_v3": ([1, 2], 8, 2, 32, 24, True),
    "granitemoe": ([0, 1], 8, 2, 32, 64, True),
}


def _description(blocks: list[MoEBlock]) -> tuple:
    (rest,) = {
        (b.num_experts, b.top_k, b.hidden_size, b.expert_width, b.norm_top_k) for b in blocks
    }
    return ([block.layer for block in blocks], *rest)


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_the_contract_holds(name: str) -> None:
    check_moe_blocks(tiny_model(name))


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_counts_are_the_configurations_also_without_weights(name: str) -> None:
    model = tiny_model(name)
    assert _description(moe_blocks(model)) == _EXPECTED[name]
    assert _description(moe_blocks(meta_model(model.config))) == _EXPECTED[name]


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("norm", [True, False])
def test_renormalised_gates_are_told_from_plain_ones(name: str, norm: bool) -> None:
    model = tiny_model(name, norm_topk_prob=norm)
    # Routers whose weights are zero would give equal gates whatever they do.
    for block in moe_blocks(model):
        block.router.get_parameter("weight").data.zero_()
    assert {block.norm_top_k for block in moe_blocks(model)} == {norm}


def test_a_qwen_model_with_some_dense_layers_has_fewer_blocks() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [block.layer for block in moe_blocks(model)] == [1]


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_what_is_read_computes_what_the_experts_module_computes(name: str) -> None:
    model = tiny_model(name).double()
    block = moe_blocks(model)[0]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index in (0, 5):
        chosen = torch.full((5, 1), index)
        found = block.experts(hidden, chosen, torch.ones(5, 1, dtype=torch.float64))
        weights = block.read_expert(index)
        gate = F.linear(hidden, weights.gate, weights.gate_bias)
        up = F.linear(hidden, weights.up, weights.up_bias)
        product = _gpt_oss_gate(gate, up) if name == "gpt_oss" else F.silu(gate) * up
        expected = F.linear(product, weights.down, weights.down_bias)
        torch.testing.assert_close(found, expected)


def _gpt_oss_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class _Router(nn.Module):
    """Dropless top-1 over four experts, as native routers return it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = F.linear(hidden, self.weight)
        gates, ids = logits.softmax(dim=-1).topk(1)
        return logits, gates, ids


def _ungated(kind: str) -> tuple[MoEBlock, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Four ungated experts of width 3 on 6 channels, and what their own module computes with one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "ours":
            config = ExpertsConfig(num_experts=4, expert_width=3, activation="relu", gated=False)
            router = SwitchConfig(num_experts=4).build(hidden_size=6)
            model: nn.Module = nn.Sequential(SparseFFN(router, Experts(config, 6)))
            experts = model[0].experts
        else:
            config = NemotronHConfig(
                hidden_size=6, moe_intermediate_size=3, n_routed_experts=4, mlp_hidden_act="relu"
            )
            experts = NemotronHExperts(config)
            for parameter in experts.parameters():
                nn.init.normal_(parameter)
            model = nn.Sequential(_Block(_Router(), experts))
        (block,) = moe_blocks(model.double())

    def compute(hidden: torch.Tensor, index: int) -> torch.Tensor:
        chosen = torch.full((len(hidden), 1), index)
        return experts(hidden, chosen, hidden.new_ones(len(hidden), 1))

    return block, compute


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_experts_without_a_gate_are_read_and_written(kind: str) -> None:
    block, compute = _ungated(kind)
    check_counts(block)
    check_experts_read_back(block)
    hidden = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = [compute(hidden, index) for index in range(4)]
    for index in range(4):
        weights = block.read_expert(index)
        assert weights.gate is None
        expected = F.linear(F.linear(hidden, weights.up).relu(), weights.down)
        torch.testing.assert_close(before[index], expected)
    block.write_expert(3, block.read_expert(1))
    assert torch.equal(compute(hidden, 3), before[1])
    assert not torch.equal(before[3], before[1])


def test_reading_gives_copies() -> None:
    block = moe_blocks(tiny_model("mixtral"))[0]
    weights = block.read_expert(1)
    weights.gate.zero_()
    assert block.read_expert(1).gate.abs().sum() > 0


def test_writing_works_while_the_parameters_need_gradients() -> None:
    model = tiny_model("gpt_oss").train()
    block = moe_blocks(model)[0]
    block.write_expert(0, block.read_expert(1))
    assert torch.equal(block.read_expert(0).down_bias, block.read_expert(1).down_bias)
    assert all(p.requires_grad and p.is_leaf for p in block.experts.parameters())


def test_the_models_own_hooks_and_weights_are_not_touched_by_looking() -> None:
    model = tiny_model("deepseek_v3")
    calls = []
    for block in moe_blocks(model):
        block.router.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moe_blocks(model)
    assert calls == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_dense_models_have_no_blocks(name: str) -> None:
    model = tiny_model(name)
    assert moe_blocks(model) == []
    with pytest.raises(ModelError) as caught:
        require_moe_blocks(model)
    assert str(caught.value) == (
        f"This needs a sparse model, but {type(model).__name__} has no module with a router and "
        "experts. Make it sparse first with `flanmoe upcycle`."
    )


def test_an_expert_that_is_not_there() -> None:
    block = moe_blocks(tiny_model("mixtral"))[0]
    for index in (-1, 8):
        with pytest.raises(ModelError, match=rf"has experts 0 to 7, but expert {index} was asked"):
            block.read_expert(index)


def test_an_expert_of_another_shape() -> None:
    block = moe_blocks(tiny_model("mixtral"))[0]
    weights = block.read_expert(0)
    narrow = ExpertWeights(weights.gate[:5], weights.up[:5], weights.down[:, :5])
    with pytest.raises(ModelError, match=r"of shapes \[\(64, 32\), \(64, 32\), \(32, 64\)\], but"):
        block.write_expert(0, narrow)


def test_biases_where_there_are_none_and_none_where_there_are() -> None:
    plain = moe_blocks(tiny_model("mixtral"))[0]
    biased = moe_blocks(tiny_model("gpt_oss"))[0]
    with pytest.raises(ModelError, match="were given"):
        plain.write_expert(0, dataclasses.replace(plain.read_expert(0), down_bias=torch.zeros(32)))
    with pytest.raises(ModelError, match="were given"):
        biased.write_expert(0, dataclasses.replace(biased.read_expert(0), down_bias=None))


class _Experts(nn.Module):
    def __init__(self, **flags: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 6, 5))
        self.down_proj = nn.Parameter(torch.zeros(4, 5, 3))
        for name, value in flags.items():
            setattr(self, name, value)


class _Block(nn.Module):
    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = experts


_FLAGS = {"has_gate": True, "is_transposed": False, "is_concatenated": True, "has_bias": False}


@pytest.mark.parametrize(
    ("router", "experts", "message"),
    [
        (nn.Linear(5, 4), _Experts(**_FLAGS), "has none among its children"),
        (nn.Linear(5, 4), _Experts(), "has no flag `has_gate`, `is_transposed`"),
    ],
)
def test_unreadable_blocks_are_refused_in_words(
    router: nn.Module, experts: nn.Module, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        moe_blocks(nn.Sequential(_Block(router, experts)))
