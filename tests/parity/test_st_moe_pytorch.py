"""Our ST-MoE router and experts against st-moe-pytorch 0.1.8, from the same weights.

Where the peer differs from the paper's code (Mesh-TF) the test asserts the difference and says why.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from st_moe_pytorch import MoE
from torch import Tensor
from torch.nn import functional as F

from flanmoe.moe.compute import FusedExperts, expert_ffn
from flanmoe.moe.losses import balance_loss, router_probabilities, z_loss
from flanmoe.moe.routers import CapacityConfig, StMoeConfig
from flanmoe.moe.routers.second_choice import SecondChoice
from flanmoe.moe.routing import Routing

HIDDEN = 6
ALWAYS, NEVER = 0.0, 1e9


def peer(*, num_experts: int, capacity_factor: float, threshold: float, seed: int) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(
        dim=HIDDEN,
        num_experts=num_experts,
        threshold_train=threshold,
        threshold_eval=threshold,
        capacity_factor_train=capacity_factor,
        capacity_factor_eval=capacity_factor,
        # With it the gates get a second gradient, through the experts' inputs.
        straight_through_dispatch_tensor=False,
    )
    return moe.double()


def route(moe: MoE, hidden: Tensor, *, capacity_factor: float, policy: SecondChoice) -> Routing:
    """Route with our router and the peer's weights; each sequence is a group."""
    config = StMoeConfig(
        num_experts=moe.num_experts,
        second_choice=policy,
        threshold=1.0,
        capacity=CapacityConfig(train=capacity_factor, rounding="down", group="segment"),
    )
    router = config.build(hidden_size=HIDDEN).double()
    router.weight = moe.gate.to_gates.weight
    num_sequences, length, _ = hidden.shape
    segments = torch.arange(num_sequences).repeat_interleave(length)
    return router(hidden.flatten(0, 1), segments=segments)


def experts_of(moe: MoE) -> FusedExperts:
    layers = [expert.net for expert in moe.experts.experts]

    def combine(product: Tensor) -> Tensor:
        # The peer has the gate in the second half.
        up, gate = product.chunk(2, dim=-1)
        return F.gelu(gate) * up

    return FusedExperts(
        gate_up=torch.stack([net[0].weight for net in layers]),
        down=torch.stack([net[2].weight for net in layers]),
        combine=combine,
        gate_up_bias=torch.stack([net[0].bias for net in layers]),
        down_bias=torch.stack([net[2].bias for net in layers]),
    )


def output(moe: MoE, hidden: Tensor, routing: Routing) -> Tensor:
    tokens = expert_ffn(hidden.flatten(0, 1), *routing.slots(), experts_of(moe))
    return tokens.view_as(hidden)


class Case(NamedTuple):
    num_experts: int
    capacity_factor: float
    policy: SecondChoice
    num_sequences: int
    length: int
    seed: int

    def build(self) -> tuple[MoE, Tensor]:
        moe = peer(
            num_experts=self.num_experts,
            capacity_factor=self.capacity_factor,
            threshold=ALWAYS if self.policy == "all" else NEVER,
            seed=self.seed,
        )
        shape = (self.num_sequences, self.length, HIDDEN)
        return moe, torch.randn(shape, dtype=torch.float64)


cases = st.builds(
    Case,
    num_experts=st.integers(2, 6),
    capacity_factor=st.sampled_from([0.5, 1.0, 1.25, 2.0]),
    policy=st.sampled_from(["all", "none"]),
    num_sequences=st.integers(1, 3),
    length=st.integers(1, 24),
    seed=st.integers(0, 2**31),
)


@given(cases)
def test_output_and_gradients_equal_the_peers(case: Case) -> None:
    moe, hidden = case.build()
    hidden.requires_grad_()
    leaves = [hidden, *moe.parameters()]
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
    theirs = moe(hidden)
    expected = torch.autograd.grad((theirs.outputs * weights).sum(), leaves, allow_unused=True)
    routing = route(moe, hidden, capacity_factor=case.capacity_factor, policy=case.policy)
    ours = output(moe, hidden, routing)
    torch.testing.assert_close(ours, theirs.outputs, atol=1e-7, rtol=0)
    found = torch.autograd.grad((ours * weights).sum(), leaves, allow_unused=True)
    names = ["hidden", *(name for name, _ in moe.named_parameters())]
    for name, one, other in zip(names, found, expected, strict=True):
        # The multiplicative bias of the peer's activation stays 1 and is no parameter of ours.
        if "mult_bias" not in name and other is not None:
            assert one is not None, name
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0, msg=name)


@given(cases)
def test_z_loss_equals_the_peers(case: Case) -> None:
    moe, hidden = case.build()
    expected = moe(hidden).router_z_loss
    routing = route(moe, hidden, capacity_factor=case.capacity_factor, policy=case.policy)
    assert z_loss(routing).item() == pytest.approx(expected.item(), rel=1e-9)


@given(cases)
def test_balance_loss_is_the_peers_where_no_first_choice_is_dropped(case: Case) -> None:
    moe, hidden = case.build()
    # Room for all: the peer caps the capacity at the length of a sequence.
    moe.gate.capacity_factor_train = 2.0 * moe.num_experts
    expected = moe(hidden).balance_loss
    found = [
        balance_loss(
            route(moe, row.unsqueeze(0), capacity_factor=99.0, policy=case.policy),
            counting="first",
        )
        for row in hidden
    ]
    # The peer takes the mean of its mask in float32.
    assert torch.stack(found).mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_peers_balance_loss_looks_away_from_overflow() -> None:
    # Its first-choice mask is a view of the mask that capacity is then applied to, so tokens that
    # overflow are not counted. Mesh-TF counts before capacity, and so do we: with every token on one
    # expert the loss must be E.
    moe = peer(num_experts=4, capacity_factor=1.0, threshold=ALWAYS, seed=0)
    with torch.no_grad():
        moe.gate.to_gates.weight.zero_()
        moe.gate.to_gates.weight[2, 0] = 50.0
    hidden = torch.zeros(1, 32, HIDDEN, dtype=torch.float64)
    hidden[..., 0] = 1.0
    routing = route(moe, hidden, capacity_factor=1.0, policy="all")
    assert balance_loss(routing, counting="first").item() == pytest.approx(4.0)
    # 8 of the 32 tokens fit.
    assert moe(hidden).balance_loss.item() == pytest.approx(4.0 * 8 / 32)


def test_random_policy_keeps_the_same_second_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = peer(num_experts=4, capacity_factor=2.0, threshold=1.0, seed=1)
    hidden = torch.randn(2, 16, HIDDEN, dtype=torch.float64)
    draws = torch.rand(2, 16, 2, dtype=torch.float64)

    def filled(values: Tensor, low: float, high: float) -> Tensor:
        return values.copy_(draws.permute(2, 0, 1))

    monkeypatch.setattr(Tensor, "uniform_", filled)
    theirs = moe(hidden).outputs
    monkeypatch.undo()
    monkeypatch.setattr(torch, "rand_like", lambda shares: draws.view_as(shares))
    routing = route(moe, hidden, capacity_factor=2.0, policy="random")
    assert 0 < int((~routing.choices.asked).sum()) < 32
    torch.testing.assert_close(output(moe, hidden, routing), theirs, atol=1e-7, rtol=0)


def test_the_peer_draws_in_evaluation_too_and_ours_does_not() -> None:
    moe = peer(num_experts=4, capacity_factor=2.0, threshold=1.0, seed=2).eval()
    hidden = torch.randn(2, 16, HIDDEN, dtype=torch.float64)
    assert not torch.equal(moe(hidden).outputs, moe(hidden).outputs)
    router = StMoeConfig(num_experts=4, threshold=1.0).build(hidden_size=HIDDEN).eval()
    one, other = router(hidden[0].float()), router(hidden[0].float())
    assert one.expert_ids.equal(other.expert_ids)
    assert one.gates.equal(other.gates)


def test_the_peers_router_computes_in_the_precision_of_its_input() -> None:
    # With 8 bits of mantissa experts tie although their scores differ.
    moe = peer(num_experts=64, capacity_factor=2.0, threshold=ALWAYS, seed=3).bfloat16()
    hidden = torch.randn(1, 256, HIDDEN).bfloat16()
    theirs = moe.gate.to_gates(hidden)
    assert theirs.dtype == torch.bfloat16
    router = StMoeConfig(num_experts=64).build(hidden_size=HIDDEN)
    router.weight = moe.gate.to_gates.weight
    ours = router(hidden[0])
    assert ours.logits.dtype == torch.float32

    def ties(logits: Tensor) -> int:
        best, second = router_probabilities(logits).topk(2).values.unbind(dim=1)
        return int((best == second).sum())

    assert ties(theirs[0].float()) > 0
    assert ties(ours.logits) == 0
