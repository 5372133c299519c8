"""Low-rank changes of experts against matrices with the change written out, on generated inputs."""

import dataclasses
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flanmoe.moe.compute import FusedExperts, expert_ffn, expert_ffn_reference, gated, work
from flanmoe.moe.compute.grouping import Segments, group
from flanmoe.moe.compute.low_rank import LowRankExperts, LowRankFactors, LowRankMatrices

HIDDEN, WIDTH = 6, 5


@dataclasses.dataclass
class Case:
    """Experts, their change and one batch."""

    experts: FusedExperts
    change: LowRankExperts
    hidden: torch.Tensor
    expert_ids: torch.Tensor
    gates: torch.Tensor

    def changed(self) -> FusedExperts:
        return dataclasses.replace(self.experts, low_rank=self.change)

    def run(self) -> torch.Tensor:
        return expert_ffn(self.hidden, self.expert_ids, self.gates, self.changed())

    def leaves(self) -> dict[str, torch.Tensor]:
        factors = dict(self.change.named_parameters())
        return {"hidden": self.hidden, "gates": self.gates, **factors}


def factors_of(
    ranks: list[int], inputs: int, outputs: int, *, generator: torch.Generator, **options: Any
) -> LowRankFactors:
    values = {"alpha": 3.0, "rank_stabilised": False, "shared_a": False, **options}
    factors = LowRankFactors(
        ranks,
        inputs=inputs,
        outputs=outputs,
        device=torch.device("cpu"),
        dtype=torch.float64,
        **values,
    )
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return factors


def case_of(
    seed: int,
    *,
    ranks: list[int],
    num_tokens: int = 7,
    has_gate: bool = True,
    biased: bool = False,
    matrices: tuple[str, ...] = ("gate_up", "down"),
    dropout: float = 0.0,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    num_experts = len(ranks)
    first = 2 * WIDTH if has_gate else WIDTH

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    change = LowRankExperts(
        factors_of(ranks, HIDDEN, first, generator=generator, **options)
        if "gate_up" in matrices
        else None,
        factors_of(ranks, WIDTH, HIDDEN, generator=generator, **options)
        if "down" in matrices
        else None,
        dropout=dropout,
    )
    experts = FusedExperts(
        gate_up=drawn(num_experts, first, HIDDEN),
        down=drawn(num_experts, HIDDEN, WIDTH),
        combine=gated(F.silu) if has_gate else F.gelu,
        gate_up_bias=drawn(num_experts, first) if biased else None,
        down_bias=drawn(num_experts, HIDDEN) if biased else None,
    )
    # An id of `num_experts` stands for no expert.
    expert_ids = torch.randint(0, num_experts + 1, (num_tokens, 2), generator=generator)
    gates = torch.rand(num_tokens, 2, generator=generator, dtype=torch.float64)
    hidden = drawn(num_tokens, HIDDEN).requires_grad_()
    return Case(experts, change, hidden, expert_ids, gates.requires_grad_())


def written_out(factors: LowRankFactors | None, weight: torch.Tensor) -> torch.Tensor:
    """W + scale * B A of every expert, from the flat factors, without any of the fast code."""
    if factors is None:
        return weight
    starts = [0, *itertools.accumulate(factors.ranks)]
    rows = []
    for expert, rank in enumerate(factors.ranks):
        if rank == 0:
            rows.append(weight[expert])
            continue
        own = slice(starts[expert], starts[expert] + rank)
        a = factors.a[:rank] if factors.shared_a else factors.a[own]
        scale = factors.alpha / (rank**0.5 if factors.rank_stabilised else rank)
        rows.append(weight[expert] + scale * factors.b[own].T @ a)
    return torch.stack(rows)


def defined(case: Case) -> torch.Tensor:
    """What `expert_ffn` must return, by the sum that defines it."""
    materialised = dataclasses.replace(
        case.experts,
        gate_up=written_out(case.change.gate_up, case.experts.gate_up),
        down=written_out(case.change.down, case.experts.down),
    )
    return expert_ffn_reference(case.hidden, case.expert_ids, case.gates, materialised)


def gradients(output: torch.Tensor, case: Case) -> dict[str, torch.Tensor]:
    leaves = case.leaves()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    found = torch.autograd.grad((output * weights).sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any),
    num_tokens=st.integers(1, 9),
    has_gate=st.booleans(),
    biased=st.booleans(),
    shared_a=st.booleans(),
    rank_stabilised=st.booleans(),
    matrices=st.sampled_from([("gate_up",), ("down",), ("gate_up", "down")]),
    normed=st.booleans(),
    run_bytes=st.sampled_from([1, 2**22]),
)
def test_outputs_and_gradients_are_those_of_the_matrices_written_out(
    seed: int, ranks: list[int], normed: bool, run_bytes: int, **options: Any
) -> None:
    case = case_of(seed, ranks=ranks, **options)
    if normed:
        experts = dataclasses.replace(case.experts, output_norm=torch.tanh)
        case = dataclasses.replace(case, experts=experts)
    with mock.patch.object(work, "_RUN_BYTES", run_bytes):
        found, expected = case.run(), defined(case)
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:  # not where every assignment is to no expert
            torch.testing.assert_close(gradients(found, case), gradients(expected, case))


def segments_of(counts: list[int]) -> Segments:
    expert_ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    gates = torch.ones(len(expert_ids), 1)
    return group(expert_ids.unsqueeze(1), gates, len(counts)).whole


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    rank=st.integers(1, 3),
    shared_a=st.booleans(),
)
def test_the_map_and_its_gradients_are_those_of_autograd(
    seed: int, counts: list[int], rank: int, shared_a: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranks = [rank] * len(counts)
    factors = factors_of(ranks, 4, 3, generator=generator, shared_a=shared_a)
    weight = torch.randn(len(counts), 3, 4, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    rows = torch.randn(sum(counts), 4, generator=generator, dtype=torch.float64).requires_grad_()
    back = torch.randn(sum(counts), 3, generator=generator, dtype=torch.float64)
    stacked = factors.stacked()
    matrices = LowRankMatrices(weight.detach(), *(tensor.detach() for tensor in stacked))
    segments = segments_of(counts)
    a = stacked[0].expand(len(counts), -1, -1)
    changed = weight + stacked[1].transpose(1, 2) @ a
    parts = zip(rows.split(counts), changed, strict=True)
    expected = torch.cat([own @ matrix.T for own, matrix in parts])
    torch.testing.assert_close(matrices.forward(rows.detach(), segments), expected)
    wanted = torch.autograd.grad(expected, [rows, weight, *stacked], back)
    torch.testing.assert_close(matrices.input_gradient(back, segments), wanted[0])
    into = matrices.new_gradients(tuple(counts), [torch.float64] * 3)
    matrices.weight_gradients(back, rows.detach(), segments, into)
    torch.testing.assert_close(into, list(wanted[1:]))


@pytest.mark.parametrize("shared_a", [False, True])
def test_gradcheck(shared_a: bool) -> None:
    case = case_of(3, ranks=[1, 2, 0], num_tokens=4, shared_a=shared_a)
    names, leaves = zip(*case.change.named_parameters(), strict=True)

    def run(hidden: torch.Tensor, gates: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        holder = _Holder(dataclasses.replace(case, hidden=hidden, gates=gates))
        values = {f"case_change.{name}": one for name, one in zip(names, factors, strict=True)}
        return torch.func.functional_call(holder, values)

    assert torch.autograd.gradcheck(run, (case.hidden, case.gates, *leaves), fast_mode=True)


class _Holder(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case_change = case.change
        self._case = case

    def forward(self) -> torch.Tensor:
        return self._case.run()


def test_matrices_get_no_gradient_beside_their_change() -> None:
    case = case_of(5, ranks=[2, 2])
    case.experts.gate_up.requires_grad_()
    case.experts.down.requires_grad_()
    case.run().sum().backward()
    assert case.experts.gate_up.grad is None
    assert case.experts.down.grad is None
    for name, leaf in case.leaves().items():
        assert leaf.grad is not None, name
        assert leaf.grad.abs().sum() > 0, name


def test_a_new_change_is_one_of_nothing() -> None:
    case = case_of(2, ranks=[3, 3, 3])
    for factors in case.change.factors.values():
        factors.draw(torch.Generator().manual_seed(0))
        limit = factors.a.shape[1] ** -0.5
        assert 0.8 * limit < float(factors.a.detach().abs().max()) <= limit
    plain = expert_ffn(case.hidden, case.expert_ids, case.gates, case.experts)
    torch.testing.assert_close(case.run(), plain)


def test_experts_without_tokens_have_a_gradient_of_zero() -> None:
    case = case_of(4, ranks=[2, 2, 2])
    case.expert_ids = torch.ones_like(case.expert_ids)
    case.run().sum().backward()
    for factors in case.change.factors.values():
        own = factors.a.grad.view(3, 2, -1)
        assert not own[0].any()
        assert not own[2].any()
        assert own[1].any()


def test_dropout_sets_inputs_of_a_to_0_and_keeps_their_mean() -> None:
    case = case_of(6, ranks=[4], num_tokens=64, dropout=0.25, matrices=("gate_up",))
    factors = case.change.gate_up
    assert factors is not None
    weight = torch.zeros_like(case.experts.gate_up)
    rows = torch.ones(4000, HIDDEN, dtype=torch.float64)
    # A that hands its inputs through, B that hands them on.
    eye = torch.eye(HIDDEN, dtype=torch.float64).unsqueeze(0)
    b = torch.eye(HIDDEN, 2 * WIDTH, dtype=torch.float64).unsqueeze(0)
    matrices = LowRankMatrices(weight, eye, b, dropout=0.25, seed=11)
    found = matrices.forward(rows, segments_of([4000]))[:, :HIDDEN]
    assert set(found.unique().tolist()) == {0.0, 1 / 0.75}
    # Four standard errors of a mean over 24,000 draws.
    assert abs(float((found == 0).double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 24_000) ** 0.5
    # The way back drops the same.
    back = matrices.input_gradient(
        torch.ones(4000, 2 * WIDTH, dtype=torch.float64), segments_of([4000])
    )
    torch.testing.assert_close(back, found)


@pytest.mark.parametrize("shared_a", [False, True])
def test_with_dropout_gradients_are_those_of_what_was_computed(shared_a: bool) -> None:
    case = case_of(8, ranks=[2, 1, 3], dropout=0.4, shared_a=shared_a)
    _, leaves = zip(*case.leaves().items(), strict=True)

    def run(*_: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return case.run()

    # gradcheck changes the leaves in place, so that the function may read them from the case.
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert not torch.allclose(run(), defined(case))


def test_dropout_repeats_with_the_seed_and_ends_with_training() -> None:
    case = case_of(8, ranks=[2, 1, 3], dropout=0.4)

    def run(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return case.run()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    case.change.eval()
    torch.testing.assert_close(run(0), defined(case))


def test_activation_checkpointing_drops_the_same_again() -> None:
    case = case_of(9, ranks=[2, 2, 2], dropout=0.3)
    found: list[dict[str, torch.Tensor]] = []
    for again in (False, True):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            output = checkpoint(case.run, use_reentrant=False) if again else case.run()
            found.append(gradients(output, case))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_expert_dropout_stands_beside_it() -> None:
    case = case_of(9, ranks=[2, 2, 2])
    case.experts = dataclasses.replace(case.experts, hidden_dropout=0.5)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        found = case.run()
    materialised = dataclasses.replace(
        case.experts,
        gate_up=written_out(case.change.gate_up, case.experts.gate_up),
        down=written_out(case.change.down, case.experts.down),
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        expected = expert_ffn(case.hidden, case.expert_ids, case.gates, materialised)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, case), gradients(expected, case))


def test_under_autocast_products_are_in_bfloat16_and_gradients_in_float32() -> None:
    case = case_of(10, ranks=[2, 3, 1], num_tokens=40)
    expected = defined(case)
    wanted = gradients(expected, case)
    tolerance = 0.05 * float(expected.detach().abs().max())
    single = dataclasses.replace(
        case,
        experts=dataclasses.replace(
            case.experts, gate_up=case.experts.gate_up.float(), down=case.experts.down.float()
        ),
        change=case.change.float(),
        hidden=case.hidden.detach().float().requires_grad_(),
        gates=case.gates.detach().float().requires_grad_(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = single.run()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=tolerance)
    assert not torch.allclose(found.double(), expected, rtol=1e-5)
    for name, gradient in gradients(found, single).items():
        assert gradient.dtype == torch.float32, name
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=0.05, atol=0.05 * largest)
