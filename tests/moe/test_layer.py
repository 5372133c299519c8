"""`SparseFFN` against the written-out sum of its experts, and its view as a `MoEBlock`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import FusedBlock, moe_blocks
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.layer import Experts, ExpertsConfig, SparseFFN
from flanmoe.moe.losses import balance_loss, z_loss
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.moe.replay import RoutingReplay
from flanmoe.moe.routers import (
    CapacityConfig,
    ExpertChoiceConfig,
    GShardConfig,
    RouterConfig,
    StMoeConfig,
    SwitchConfig,
    TopKConfig,
    parse_router,
)
from flanmoe.moe.routing import ForcedRouting, Routing
from flanmoe.testing.contracts import check_counts, check_experts_read_back
from flanmoe.testing.routing import kept_pairs

HIDDEN_SIZE, WIDTH = 5, 3
# The same limit in both modes, so that evaluation drops tokens and draws nothing.
TIGHT = CapacityConfig(train=0.5, evaluation=0.5, minimum=1)

KINDS: dict[str, Callable[[int], RouterConfig]] = {
    "switch": lambda n: SwitchConfig(num_experts=n, capacity=TIGHT, init_std=1.0),
    "straight_through": lambda n: SwitchConfig(
        num_experts=n, capacity=TIGHT, gate="straight_through", init_std=1.0
    ),
    "gshard": lambda n: GShardConfig(num_experts=n, capacity=TIGHT, init_std=1.0),
    "gshard_raw": lambda n: GShardConfig(
        num_experts=n, capacity=TIGHT, normalize=False, init_std=1.0
    ),
    "st_moe": lambda n: StMoeConfig(num_experts=n, capacity=TIGHT, init_std=1.0),
    "top_k": lambda n: TopKConfig(num_experts=n, init_std=1.0),
    "expert_choice": lambda n: ExpertChoiceConfig(num_experts=n, capacity_factor=1.0, init_std=1.0),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def sparse_ffn(kind: str, *, num_experts: int = 4, seed: int = 0, **experts: Any) -> SparseFFN:
    """A float64 block in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ExpertsConfig(num_experts=num_experts, expert_width=WIDTH, **experts)
        router = KINDS[kind](num_experts).build(hidden_size=HIDDEN_SIZE)
        return SparseFFN(router, Experts(config, HIDDEN_SIZE)).double().eval()


def hidden_states(*axes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*axes, HIDDEN_SIZE, generator=generator, dtype=torch.float64)


def gate_written_out(kind: str, block: SparseFFN, token: Tensor, pair: int) -> Tensor:
    """The gate with which an expert's output enters a token's, from the definition."""
    p = (block.router.weight @ token).softmax(dim=0)
    if kind == "straight_through":
        return p[pair] / p[pair].detach()
    if kind in ("switch", "gshard_raw", "expert_choice"):
        return p[pair]
    return p[pair] / (p.topk(2).values.sum() + 1e-9)


def expert_written_out(block: SparseFFN, expert: int, token: Tensor) -> Tensor:
    first, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
    gate, up = first[:WIDTH] @ token, first[WIDTH:] @ token
    return down @ (gate / (1 + torch.exp(-gate)) * up)


def written_out(kind: str, block: SparseFFN, hidden: Tensor, routing: Routing) -> Tensor:
    """The sum over assignments, one after another. `routing` says only which they are."""
    rows = [torch.zeros(HIDDEN_SIZE, dtype=torch.float64) for _ in hidden]
    for token, expert in kept_pairs(routing):
        gate = gate_written_out(kind, block, hidden[token], expert)
        rows[token] = rows[token] + gate * expert_written_out(block, expert, hidden[token])
    return torch.stack(rows) if rows else torch.zeros_like(hidden)


@EVERY_KIND
@settings(max_examples=20)
@given(num_tokens=st.integers(0, 10), num_experts=st.integers(2, 4), seed=st.integers(0, 2**31))
def test_equals_the_written_out_sum_and_its_gradients(
    kind: str, num_tokens: int, num_experts: int, seed: int
) -> None:
    block = sparse_ffn(kind, num_experts=num_experts, seed=seed)
    hidden = hidden_states(num_tokens, seed=seed).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    masks = {
        "valid": torch.rand(num_tokens, generator=generator) < 0.8,
        "segments": torch.randint(3, (num_tokens,), generator=generator),
    }
    fast = block(hidden, **masks)
    slow = written_out(kind, block, hidden, block.router(hidden, **masks))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    leaves = [hidden, *block.parameters()]
    weights = torch.linspace(-1, 1, fast.numel(), dtype=torch.float64).view_as(fast)
    for found, expected in zip(
        gradients((fast * weights).sum(), leaves),
        gradients((slow * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    if not loss.requires_grad:  # no token is served
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@EVERY_KIND
def test_float32_gradients_are_those_of_float64(kind: str) -> None:
    exact = sparse_ffn(kind)
    single = sparse_ffn(kind).float()
    hidden = hidden_states(12)
    routing = exact.router(hidden)
    leaves, single_leaves = list(exact.parameters()), list(single.parameters())
    expected = torch.autograd.grad(exact(hidden).square().sum(), leaves)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    output = single(hidden.float(), replay=RoutingReplay(routing.forced))
    found = torch.autograd.grad(output.square().sum(), single_leaves)
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5 * scale)


@EVERY_KIND
def test_unserved_tokens_and_padding_get_zeros_and_the_others_do_not(kind: str) -> None:
    block = sparse_ffn(kind)
    hidden, valid = hidden_states(16), torch.arange(16) % 4 > 0
    output = block(hidden, valid=valid)
    served = torch.zeros(16, dtype=torch.bool)
    served[block.router(hidden, valid=valid).token_ids] = True
    assert not output[~served].any()
    assert output[served].any(dim=1).all()
    assert not served[~valid].any()
    if kind in ("switch", "straight_through", "expert_choice"):
        assert served.sum() < valid.sum()


@pytest.mark.parametrize("noise", [math.nan, math.inf])
@EVERY_KIND
def test_padding_that_is_not_finite_spoils_no_output_and_no_gradient(
    kind: str, noise: float
) -> None:
    block = sparse_ffn(kind)
    clean, spoilt = hidden_states(8), hidden_states(8)
    valid = torch.arange(8) < 6
    clean[~valid], spoilt[~valid] = 0, noise
    found, expected = (block(tokens, valid=valid) for tokens in (spoilt, clean))
    assert torch.equal(found, expected)
    leaves = list(block.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@EVERY_KIND
@pytest.mark.parametrize("axes", [(3, 4), (2, 2, 3), (1, 12)])
def test_leading_axes_are_tokens_row_after_row(kind: str, axes: tuple[int, ...]) -> None:
    block = sparse_ffn(kind)
    hidden = hidden_states(12)
    valid, segments = torch.arange(12) % 5 > 0, torch.arange(12) // 4
    expected = block(hidden, valid=valid, segments=segments)
    found = block(
        hidden.view(*axes, HIDDEN_SIZE), valid=valid.view(axes), segments=segments.view(axes)
    )
    assert torch.equal(found, expected.view(*axes, HIDDEN_SIZE))


def test_a_single_token_needs_no_leading_axis() -> None:
    block, hidden = sparse_ffn("top_k"), hidden_states(1)
    assert torch.equal(block(hidden[0]), block(hidden)[0])


def test_forced_experts_are_computed() -> None:
    block, hidden = sparse_ffn("top_k"), hidden_states(2)
    forced = ForcedRouting.of_experts(torch.tensor([[3, 1], [0, 2]]))
    p = (hidden @ block.router.weight.T).softmax(dim=1)
    for token, (first, second) in enumerate([(3, 1), (0, 2)]):
        total = p[token, first] + p[token, second] + 1e-9
        expected = sum(
            p[token, expert] / total * expert_written_out(block, expert, hidden[token])
            for expert in (first, second)
        )
        found = block(hidden, replay=RoutingReplay(forced))[token]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_an_activation_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ValidationError) as raised:
        ExpertsConfig.model_validate({"num_experts": 1, "expert_width": 1, "activation": "swish"})
    (problem,) = raised.value.errors()
    assert problem["loc"] == ("activation",)
    assert problem["msg"] == "Input should be 'relu', 'silu', 'gelu' or 'gelu_tanh'"
    assert problem["input"] == "swish"


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda x: max(x, 0.0)),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        (
            "gelu_tanh",
            lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation: str, function: Callable[[float], float], gated: bool) -> None:
    config = ExpertsConfig(num_experts=1, expert_width=1, activation=activation, gated=gated)
    experts = Experts(config, 1).double()
    with torch.no_grad():
        experts.gate_up_proj[:] = torch.tensor([[0.75], [3.0]][: 2 if gated else 1])
        experts.down_proj[:] = 2.0
    for value in (-2.0, -0.3, 0.0, 1.1):
        inner = function(0.75 * value) * (3.0 * value if gated else 1.0)
        one = torch.ones(1, 1, dtype=torch.float64)
        found = experts(value * one, torch.zeros(1, 1, dtype=torch.long), 0.25 * one)
        assert found.item() == pytest.approx(0.25 * 2.0 * inner, abs=1e-12)


def test_expert_dropout_in_training_alone() -> None:
    # Inner units of 1 and an output that is their mean: what dropout leaves over of it.
    config = ExpertsConfig(
        num_experts=1, expert_width=40_000, activation="relu", gated=False, dropout=0.25
    )
    experts = Experts(config, 1).double()
    with torch.no_grad():
        experts.gate_up_proj.fill_(1.0)
        experts.down_proj.fill_(1 / 40_000)
    token, expert = torch.ones(1, 1).double(), torch.zeros(1, 1, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = experts.train()(token, expert, token).item()
    # The standard deviation is 0.003; scaled by 1 / 0.75, so that the mean is 1.
    assert found != pytest.approx(1.0, abs=1e-6)
    assert found == pytest.approx(1.0, abs=0.015)
    assert experts.eval()(token, expert, token).item() == pytest.approx(1.0, abs=1e-12)


def test_fresh_matrices_have_variance_one_over_their_inputs() -> None:
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig(num_experts=4, expert_width=16), 64)
    assert experts.gate_up_proj.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert experts.down_proj.std().item() == pytest.approx(1 / 4, rel=0.05)
    router = SwitchConfig(num_experts=64).build(hidden_size=256)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_router_and_experts_of_different_numbers_are_refused() -> None:
    experts = Experts(ExpertsConfig(num_experts=3, expert_width=2), 4)
    with pytest.raises(ModelError) as caught:
        SparseFFN(SwitchConfig(num_experts=4).build(hidden_size=4), experts)
    assert str(caught.value) == (
        "A sparse block needs a router and experts of one number, but the router chooses from 4 "
        "and there are 3."
    )


class Layer(nn.Module):
    """A residual connection around a dense or a sparse FFN."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, hidden: Tensor, **masks: Tensor) -> Tensor:
        inner = self.ffn(hidden, **masks) if isinstance(self.ffn, SparseFFN) else self.ffn(hidden)
        return hidden + inner


class Model(nn.Module):
    """A dense layer between two sparse ones."""

    def __init__(self) -> None:
        super().__init__()
        dense = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE).double()
        kinds = [sparse_ffn("gshard"), dense, sparse_ffn("expert_choice", seed=1)]
        self.layers = nn.ModuleList(Layer(ffn) for ffn in kinds)

    def forward(self, hidden: Tensor, **masks: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, **masks)
        return hidden


def block_of(kind: str, **experts: Any) -> FusedBlock:
    holder = nn.ModuleDict({"ffn": sparse_ffn(kind, **experts)})
    (block,) = moe_blocks(holder)
    assert isinstance(block, FusedBlock)
    return block


def test_sparse_blocks_are_found_inside_a_model() -> None:
    model = Model()
    blocks = moe_blocks(model)
    assert all(isinstance(block, MoEBlock) for block in blocks)
    assert [(block.name, block.layer) for block in blocks] == [
        ("layers.0.ffn", 0),
        ("layers.2.ffn", 2),
    ]
    assert [block.top_k for block in blocks] == [2, 0]
    for block in blocks:
        assert (block.num_experts, block.hidden_size, block.expert_width) == (4, HIDDEN_SIZE, WIDTH)
        assert block.router is model.get_submodule(block.name).router
        assert block.experts is model.get_submodule(block.name).experts


@pytest.mark.parametrize(
    ("kind", "normalised"),
    [
        ("switch", False),
        ("straight_through", True),
        ("gshard", True),
        ("gshard_raw", False),
        ("top_k", True),
        ("expert_choice", False),
    ],
)
def test_renormalised_gates_are_told_from_plain_ones(kind: str, normalised: bool) -> None:
    assert block_of(kind).norm_top_k == normalised


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["switch", "gshard", "top_k"])
def test_the_contract_of_blocks_holds(kind: str, gated: bool) -> None:
    check_counts(block_of(kind, gated=gated))
    check_experts_read_back(block_of(kind, gated=gated))


def test_an_expert_reads_as_its_matrices_and_not_as_a_view() -> None:
    block = block_of("top_k")
    weights = block.read_expert(2)
    fused = block.experts.get_parameter("gate_up_proj").detach()[2]
    assert torch.equal(weights.gate, fused[:WIDTH])
    assert torch.equal(weights.up, fused[WIDTH:])
    assert torch.equal(weights.down, block.experts.get_parameter("down_proj").detach()[2])
    weights.gate.zero_()
    assert block.read_expert(2).gate.any()


@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_what_is_written_is_computed(matrix: str) -> None:
    ffn, hidden = sparse_ffn("top_k"), hidden_states(6)
    (block,) = moe_blocks(nn.ModuleDict({"ffn": ffn}))
    pairs = kept_pairs(ffn.router(hidden))
    changed = {token for token, expert in pairs if expert == 1}
    assert 0 < len(changed) < 6
    before = ffn(hidden)
    weights = block.read_expert(1)
    doubled = 2 * getattr(weights, matrix)
    block.write_expert(1, dataclasses.replace(weights, **{matrix: doubled}))
    after = ffn(hidden)
    differs = (after != before).any(dim=1)
    assert {token for token in range(6) if differs[token]} == changed


def sparse_block_of_width(width: int) -> FusedBlock:
    experts = Experts(ExpertsConfig(num_experts=2, expert_width=width), HIDDEN_SIZE)
    router = SwitchConfig(num_experts=2).build(hidden_size=HIDDEN_SIZE)
    (block,) = moe_blocks(nn.ModuleDict({"other": SparseFFN(router, experts)}))
    assert isinstance(block, FusedBlock)
    return block


def test_what_cannot_be_written_or_read_is_refused() -> None:
    block = block_of("top_k")
    weights = block.read_expert(0)
    with pytest.raises(ModelError, match=r"ffn has experts 0 to 3, but expert 4 was asked for\."):
        block.read_expert(4)
    with pytest.raises(ModelError) as caught:
        block.write_expert(0, sparse_block_of_width(WIDTH + 1).read_expert(0))
    assert str(caught.value) == (
        "An expert of ffn has matrices and biases of shapes [(3, 5), (3, 5), (5, 3)], but [(4, 5), (4, 5), "
        "(5, 4)] were given. Write an expert that was read from a block of the same shape."
    )
    with pytest.raises(ModelError, match=r"\(3,\)\] were given"):
        block.write_expert(0, dataclasses.replace(weights, gate_bias=torch.ones(WIDTH)))
    without_gate = dataclasses.replace(weights, gate=None)
    with pytest.raises(
        ModelError, match=r"\[\(3, 5\), \(3, 5\), \(5, 3\)\], but \[\(3, 5\), \(5, 3\)\]"
    ):
        block.write_expert(0, without_gate)
    with pytest.raises(ModelError, match=r"\[\(3, 5\), \(5, 3\)\], but \[\(3, 5\), \(3, 5\), "):
        block_of("top_k", gated=False).write_expert(0, weights)


def test_the_recorder_sees_what_the_routers_decided() -> None:
    model = Model()
    hidden = hidden_states(2, 6)
    valid = torch.arange(12).view(2, 6) % 6 < 4
    segments = torch.tensor([[0] * 6, [1] * 6])
    with RoutingRecorder(moe_blocks(model)).recording() as layers:
        model(hidden, valid=valid, segments=segments)
    assert len(layers) == 2
    first = model.layers[0].ffn.router(
        hidden.flatten(0, 1), valid=valid.flatten(), segments=segments.flatten()
    )
    assert kept_pairs(layers[0]) == kept_pairs(first)
    for layer in layers:
        assert torch.equal(layer.valid, valid.flatten())
        assert torch.equal(layer.segments, segments.flatten())
        assert not layer.gates.requires_grad
    # Each expert of the last layer takes 4 / 4 tokens of each of two examples.
    assert layers[1].expert_counts().tolist() == [2, 2, 2, 2]
    assert balance_loss(layers[1]).item() == 0.0


def test_router_losses_of_a_recording_reach_the_routers_and_the_layers_below() -> None:
    model = Model()
    last, seen = model.layers[2].ffn, []
    last.router.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with RoutingRecorder(moe_blocks(model)).recording() as layers:
        model(hidden_states(2, 6))
    z_loss(layers[1]).backward()
    # d/dW of the mean of lse(W x)^2 is the mean of 2 lse softmax(W x) x.
    logits = layers[1].logits.detach()
    factors = 2 * logits.logsumexp(dim=1, keepdim=True) * logits.softmax(dim=1) / 12
    expected = factors.T @ seen[0].detach()
    torch.testing.assert_close(last.router.weight.grad, expected, rtol=1e-10, atol=1e-14)
    assert last.experts.down_proj.grad is None
    assert model.layers[0].ffn.experts.down_proj.grad.abs().sum() > 1e-3


def test_rows_are_examples_where_nothing_else_is_said() -> None:
    router = parse_router({"kind": "expert_choice", "num_experts": 3}).build(hidden_size=5)
    block = SparseFFN(router, Experts(ExpertsConfig(num_experts=3, expert_width=4), hidden_size=5))
    # Another mean for each row, so that experts like the one better than the other.
    hidden = torch.randn(2, 20, 5) + torch.tensor([[[-2.0]], [[2.0]]])
    alone = torch.stack([block(row) for row in hidden])
    torch.testing.assert_close(block(hidden), alone)
    together = block(hidden, segments=torch.zeros(2, 20, dtype=torch.long))
    assert not torch.allclose(together, alone)


def test_a_recording_with_padding_that_the_block_was_not_told_of_is_refused() -> None:
    router = parse_router({"kind": "top_k", "num_experts": 3}).build(hidden_size=5)
    model = torch.nn.Sequential(
        SparseFFN(router, Experts(ExpertsConfig(num_experts=3, expert_width=4), hidden_size=5))
    )
    recorder = RoutingRecorder(moe_blocks(model))
    valid = torch.tensor([True, True, False])
    with pytest.raises(ModelError) as caught, recorder.recording(valid=valid):
        model(torch.randn(3, 5))
    assert str(caught.value) == (
        "The router of 0 must know which tokens are padding, but counted 3 real tokens where there "
        "are 2. Pass `valid` to the block in the model's forward."
    )
