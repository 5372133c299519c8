"""The backward pass that is written out: numerical derivatives, what is kept, what is left out, every path."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flanmoe.core.errors import ModelError
from flanmoe.moe.compute import (
    ExpertOutputs,
    FusedExperts,
    Gated,
    Plain,
    backward,
    expert_ffn,
    expert_ffn_reference,
    forward,
    linear,
    product_path,
    products,
    work,
)
from flanmoe.moe.compute.buffers import Buffers
from flanmoe.moe.compute.fused import Part
from flanmoe.moe.compute.products import Choice
from flanmoe.moe.compute.sums import fetch_rows

EXPERTS, HIDDEN, WIDTH, TOKENS = 4, 8, 16, 12


class Case:
    """Inputs of one call; the third expert has no token, and one assignment goes to no expert."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        factor: int = 2,
        hidden_size: int = HIDDEN,
        width: int = WIDTH,
        num_tokens: int = TOKENS,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        first = factor * width

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            return drawn.to(dtype).requires_grad_()

        ids = torch.rand(num_tokens, EXPERTS, generator=generator).topk(2).indices
        self.expert_ids = torch.where(ids == 2, 3, ids)
        self.expert_ids[0, 0] = EXPERTS
        self.hidden, self.gates = normal(num_tokens, hidden_size), normal(num_tokens, 2)
        self.gate_up = normal(EXPERTS, first, hidden_size)
        self.down = normal(EXPERTS, hidden_size, width)
        self.gate_up_bias, self.down_bias = normal(EXPERTS, first), normal(EXPERTS, hidden_size)

    @property
    def leaves(self) -> list[Tensor]:
        return [
            self.hidden,
            self.gates,
            self.gate_up,
            self.down,
            self.gate_up_bias,
            self.down_bias,
        ]

    def experts(self, combine: Callable[[Tensor], Tensor], **options: Any) -> FusedExperts:
        return FusedExperts(
            self.gate_up, self.down, combine, self.gate_up_bias, self.down_bias, **options
        )

    def run(self, experts: FusedExperts) -> Tensor:
        return expert_ffn(self.hidden, self.expert_ids, self.gates, experts)


class Slope(nn.Module):
    """An activation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, product: Tensor) -> Tensor:
        gate, up = product.chunk(2, dim=-1)
        return gate * torch.sigmoid(self.slope * gate) * up


@pytest.mark.parametrize("keep_activation", [False, True])
@pytest.mark.parametrize("several_runs", [False, True])
@pytest.mark.parametrize("combine", [Gated("silu"), Gated("gelu_tanh"), Plain("gelu")], ids=str)
def test_derivatives_are_the_numerical_ones(
    combine: Gated | Plain,
    several_runs: bool,
    keep_activation: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "_RUN_BYTES", 1 if several_runs else 2**22)
    factor = 2 if isinstance(combine, Gated) else 1
    case = Case(factor=factor, hidden_size=2, width=2, num_tokens=5)

    def function(hidden: Tensor, gates: Tensor, *rest: Tensor) -> Tensor:
        gate_up, down, *biases = rest
        experts = FusedExperts(gate_up, down, combine, *biases, keep_activation=keep_activation)
        return expert_ffn(hidden, case.expert_ids, gates, experts)

    assert torch.autograd.gradcheck(function, case.leaves)


def test_parameters_that_functions_bring_along_are_trained() -> None:
    case, slope, norm = Case(), Slope(), nn.RMSNorm(HIDDEN, dtype=torch.float64)
    leaves = [*case.leaves, slope.slope, norm.weight]
    experts = case.experts(slope, output_norm=norm)
    found = torch.autograd.grad(case.run(experts).square().sum(), leaves)
    slow = expert_ffn_reference(case.hidden, case.expert_ids, case.gates, experts)
    expected = torch.autograd.grad(slow.square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("keep_activation", [False, True])
@pytest.mark.parametrize("combine", [Gated("silu"), Plain("relu")], ids=str)
def test_the_input_the_first_product_and_what_is_asked_for_are_all_that_is_kept(
    combine: Gated | Plain, keep_activation: bool
) -> None:
    factor = 2 if isinstance(combine, Gated) else 1
    case = Case(torch.float32, factor=factor)
    weights = {leaf.data_ptr() for leaf in case.leaves}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.run(case.experts(combine, keep_activation=keep_activation))
    visits = int((case.expert_ids < EXPERTS).sum())
    assert sum(kept) == visits * (factor + keep_activation) * WIDTH


@pytest.mark.parametrize("several_runs", [False, True])
@pytest.mark.parametrize("options", [{}, {"hidden_dropout": 0.4}, {"output_norm": torch.tanh}])
@pytest.mark.parametrize("combine", [Gated("silu"), Plain("relu")], ids=str)
def test_kept_activations_change_no_bit(
    combine: Gated | Plain,
    options: dict[str, Any],
    several_runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "_RUN_BYTES", 1 if several_runs else 2**22)
    results = []
    for keep_activation in (False, True):
        case = Case(torch.float32, factor=2 if isinstance(combine, Gated) else 1)
        torch.manual_seed(7)
        output = case.run(case.experts(combine, keep_activation=keep_activation, **options))
        gradients = torch.autograd.grad(output.square().sum(), case.leaves, retain_graph=True)
        # Going backward again finds what was kept as it was.
        again = torch.autograd.grad(output.square().sum(), case.leaves)
        assert all(torch.equal(*pair) for pair in zip(gradients, again, strict=True))
        results.append([output, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_activations_that_autograd_differentiates_cannot_be_kept() -> None:
    case = Case()
    with pytest.raises(ModelError) as raised:
        case.run(case.experts(F.mish, keep_activation=True))
    assert str(raised.value) == (
        "Activations can be kept where their derivative is written out (relu, silu, gelu, gelu_tanh; gated or "
        "alone), but these experts compute `mish` between their products, which is run again under "
        "autograd. Leave `keep_activation` out for them."
    )


@pytest.mark.parametrize("trained", range(6))
def test_one_input_alone(trained: int) -> None:
    case, alone = Case(), Case()
    whole = torch.autograd.grad(case.run(case.experts(Gated("silu"))).sum(), case.leaves)
    for number, leaf in enumerate(alone.leaves):
        leaf.requires_grad_(number == trained)
    alone.run(alone.experts(Gated("silu"))).sum().backward()
    for number, leaf in enumerate(alone.leaves):
        if number == trained:
            torch.testing.assert_close(leaf.grad, whole[number])
        else:
            assert leaf.grad is None


def test_frozen_experts_cost_no_product_for_their_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a gradient that nobody wants")

    monkeypatch.setattr(linear, "segment_outer", refuse)
    monkeypatch.setattr(linear, "new_gradient", refuse)
    case = Case()
    for leaf in (case.gate_up, case.down):
        leaf.requires_grad_(False)
    case.run(case.experts(Gated("silu"))).sum().backward()
    assert case.hidden.grad is not None


def test_nothing_is_kept_without_a_backward_pass() -> None:
    case = Case()
    with torch.no_grad():
        output = case.run(case.experts(Gated("silu")))
    assert not output.requires_grad
    torch.testing.assert_close(output, case.run(case.experts(Gated("silu"))).detach())


def test_gradients_lie_as_parameters_do() -> None:
    """Autograd takes a gradient as it is only then; it copies any other."""
    case = Case(torch.float32)
    stored = nn.Parameter(case.gate_up.detach().transpose(1, 2).contiguous())
    experts = FusedExperts(stored.transpose(1, 2), case.down, Gated("silu"))
    case.run(experts).sum().backward()
    assert stored.grad is not None
    assert stored.grad.is_contiguous()
    assert (stored.grad[2] == 0).all()
    assert (case.down.grad[2] == 0).all()  # pyright: ignore[reportOptionalSubscript]


def test_a_second_computation_draws_the_same_dropout() -> None:
    results = []
    for recompute in (False, True):
        case = Case()
        experts = case.experts(Gated("silu"), hidden_dropout=0.4)
        torch.manual_seed(7)
        output = (
            checkpoint(case.run, experts, use_reentrant=False) if recompute else case.run(experts)
        )
        output.square().sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in case.leaves)])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize(
    "combine", [Gated("silu"), Plain("relu"), torch.relu], ids=["gated", "plain", "any"]
)
def test_dropout_does_not_depend_on_how_experts_are_put_into_runs(
    combine: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for run_bytes in (1, 2**22):
        monkeypatch.setattr(work, "_RUN_BYTES", run_bytes)
        case = Case(factor=2 if isinstance(combine, Gated) else 1)
        torch.manual_seed(7)
        output = case.run(case.experts(combine, hidden_dropout=0.4))
        results.append([output, *torch.autograd.grad(output.square().sum(), case.leaves)])
    torch.testing.assert_close(*results)


def test_deterministic_algorithms_are_enough() -> None:
    case = Case(torch.float32)
    experts = case.experts(Gated("silu"))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        gradients = [torch.autograd.grad(case.run(experts).sum(), case.leaves) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def on_an_accelerator(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute on the CPU as on other devices: all experts in one run, tokens fetch their rows."""

    def add_rows(total: Tensor, rows: Tensor, grouping: Any, segments: Any, **options: Any) -> None:
        assert segments.num_rows == grouping.order.numel()
        fetch_rows(total, rows, grouping, options["gates"])

    monkeypatch.setattr(forward, "add_rows", add_rows)
    monkeypatch.setattr(backward, "add_rows", add_rows)
    monkeypatch.setattr(Buffers, "place", lambda *arguments: None)
    monkeypatch.setattr(work, "_RUN_BYTES", 2**40)
    monkeypatch.setattr(products, "CHOICES", (Choice(path, lambda rows, matrices: True, ""),))  # pyright: ignore


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_activation": True},
        {"output_norm": partial(F.rms_norm, normalized_shape=(HIDDEN,))},
    ],
    ids=["", "kept", "norm"],
)
@pytest.mark.parametrize("combine", [Gated("silu"), Plain("gelu")], ids=str)
@pytest.mark.parametrize("path", ["expert", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_on_an_accelerator(
    path: str,
    dtype: torch.dtype,
    combine: Gated | Plain,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factor = 2 if isinstance(combine, Gated) else 1
    case, exact = Case(dtype, factor=factor), Case(factor=factor)
    expected = exact.run(exact.experts(combine, **options))
    wanted = torch.autograd.grad(expected.sum(), exact.leaves)
    on_an_accelerator(path, monkeypatch)
    output = case.run(case.experts(combine, **options))
    found = torch.autograd.grad(output.sum(), case.leaves)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for ours, theirs in zip((output, *found), (expected, *wanted), strict=True):
        assert ours.dtype == dtype
        scale = theirs.detach().abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)


def test_functions_run_under_the_autocast_of_the_caller() -> None:
    seen: list[bool] = []

    def combine(product: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate) * up

    case = Case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = case.run(case.experts(combine))
    output.sum().backward()
    assert len(seen) > 2
    assert all(seen)
    assert output.dtype == torch.float32
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in case.leaves)


@pytest.mark.parametrize("run_bytes", [1, 2**22])
def test_an_observer_sees_each_assignment(run_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_RUN_BYTES", run_bytes)
    case = Case()
    shown: list[ExpertOutputs] = []
    experts = case.experts(Gated("silu"), output_norm=torch.tanh, observer=shown.append)
    case.run(experts)
    (found,) = shown
    assert not found.outputs.requires_grad
    visits = [
        (int(expert), token, choice)
        for token, row in enumerate(case.expert_ids)
        for choice, expert in enumerate(row)
        if expert < EXPERTS
    ]
    assert found.expert_ids.tolist() == [expert for expert, _, _ in sorted(visits)]
    assert found.token_ids.tolist() == [token for _, token, _ in sorted(visits)]
    for (expert, token, choice), output, gate in zip(
        sorted(visits), found.outputs, found.gates, strict=True
    ):
        product = case.gate_up[expert] @ case.hidden[token] + case.gate_up_bias[expert]
        inner = Gated("silu")(product)
        expected = torch.tanh(case.down[expert] @ inner + case.down_bias[expert])
        torch.testing.assert_close(output, expected.detach())
        assert gate == case.gates[token, choice]


def test_sizes_that_do_not_fit_are_refused() -> None:
    case = Case()
    experts = case.experts(Gated("silu"))
    with pytest.raises(ModelError) as raised:
        expert_ffn(case.hidden[:, 1:], case.expert_ids, case.gates, experts)
    assert str(raised.value) == (
        "Experts take and give hidden states of one size, but these take 8 and give 8 numbers, and the hidden "
        "states have 7."
    )


def test_mixed_dtypes_are_refused_outside_autocast() -> None:
    case = Case(torch.float32)
    experts = case.experts(Gated("silu"))
    with pytest.raises(ModelError) as raised:
        expert_ffn(case.hidden.bfloat16(), case.expert_ids, case.gates, experts)
    assert str(raised.value) == (
        "Hidden states and experts must have one dtype outside autocast, but the hidden states are "
        "torch.bfloat16 and `gate_up` is torch.float32. Convert the model with `model.to`, or run it under "
        "torch.autocast."
    )
    with torch.autocast("cpu", torch.bfloat16):
        expert_ffn(case.hidden.bfloat16(), case.expert_ids, case.gates, experts)


@pytest.mark.parametrize("expert", [-1, EXPERTS + 1])
def test_ids_that_are_no_expert_are_refused_where_experts_are_in_parts(expert: int) -> None:
    case = Case()
    whole = case.experts(Gated("silu"))
    experts = dataclasses.replace(whole, split=lambda expert_ids: [Part(whole, expert_ids)])
    torch.testing.assert_close(case.run(experts), case.run(whole))
    case.expert_ids[1, 0] = expert
    with pytest.raises(ModelError, match=f"the first is {expert}"):
        case.run(experts)


def test_the_path_is_named_on_request() -> None:
    case = Case(torch.float32)
    experts = case.experts(Gated("silu"))
    assert product_path(case.hidden, experts).path == "expert"
    with torch.autocast("cpu", torch.bfloat16):
        assert product_path(case.hidden, experts).path == "rounded"
