"""The pass over kernels that fetch rows and put them back, with kernels written out in place of Triton's.

`test_triton_kernels.py` compares Triton's with the same definitions.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flanmoe.core.errors import ModelError
from flanmoe.moe.compute import (
    FusedExperts,
    Gated,
    Plain,
    expert_ffn,
    expert_ffn_reference,
    product_path,
    triton_pass,
    work,
)
from flanmoe.moe.compute.grouping import Segments
from flanmoe.moe.compute.low_rank import LowRankExperts, LowRankFactors

EXPERTS, HIDDEN, WIDTH, TOKENS, CHOICES = 5, 8, 12, 14, 3
LOW_RANK = LowRankFactors(
    [2] * EXPERTS,
    alpha=4.0,
    rank_stabilised=False,
    inputs=HIDDEN,
    outputs=2 * WIDTH,
    shared_a=False,
    device=torch.device("cpu"),
    dtype=torch.float64,
)


def written_out_mm(
    tokens: Tensor, token_ids: Tensor, matrices: Tensor, segments: Segments
) -> Tensor:
    rows, own = tokens[token_ids], matrices[segments.experts]
    products = [rows[start:end] @ own[expert] for expert, start, end in segments.used()]
    return torch.cat([rows.new_empty(0, matrices.shape[2]), *products])


def written_out_scattered(
    rows: Tensor,
    matrices: Tensor,
    segments: Segments,
    *,
    order: Tensor,
    gates: Tensor | None,
    out: Tensor,
) -> None:
    every = torch.arange(rows.shape[0])
    products = written_out_mm(rows, every, matrices, segments)
    out[order] = products if gates is None else (products * gates.unsqueeze(1)).to(out.dtype)


def written_out_outer(
    left: Tensor,
    right: Tensor,
    segments: Segments,
    *,
    left_ids: Tensor | None,
    right_ids: Tensor | None,
    out: Tensor,
) -> None:
    left = left if left_ids is None else left[left_ids]
    right = right if right_ids is None else right[right_ids]
    own = out[segments.experts]
    for expert, start, end in segments.used():
        own[expert] = left[start:end].t() @ right[start:end]


@pytest.fixture(params=["one run", "a run an expert"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_pass, "available", lambda: True)
    monkeypatch.setattr(triton_pass, "gathered_mm", written_out_mm)
    monkeypatch.setattr(triton_pass, "scattered_mm", written_out_scattered)
    monkeypatch.setattr(triton_pass, "gathered_outer", written_out_outer)
    monkeypatch.setattr(work, "_RUN_BYTES", 1 if request.param == "a run an expert" else 2**22)


def inputs_of(*, gated: bool, complete: bool) -> dict[str, Tensor]:
    """Draw a batch; the third expert has no token, and unless it is complete two choices are no expert."""
    generator = torch.Generator().manual_seed(int(complete))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    expert_ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(CHOICES).indices
    expert_ids = torch.where(expert_ids == 2, 3, expert_ids)
    if not complete:
        expert_ids[0, 0] = expert_ids[4, 1] = EXPERTS
    first = (2 if gated else 1) * WIDTH
    return {
        "hidden": normal(TOKENS, HIDDEN),
        "expert_ids": expert_ids,
        "gates": normal(TOKENS, CHOICES),
        "gate_up": normal(EXPERTS, first, HIDDEN),
        "down": normal(EXPERTS, HIDDEN, WIDTH),
        "gate_up_bias": normal(EXPERTS, first),
    }


def experts_of(inputs: dict[str, Tensor], combine: Any, **options: Any) -> FusedExperts:
    return FusedExperts(
        inputs["gate_up"],
        inputs["down"],
        combine,
        inputs["gate_up_bias"],
        kernels="triton",
        **options,
    )


def run(inputs: dict[str, Tensor], experts: FusedExperts) -> Tensor:
    return expert_ffn(inputs["hidden"], inputs["expert_ids"], inputs["gates"], experts)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("combine", "keep_activation"),
    [
        (Gated("silu"), False),
        (Gated("silu"), True),
        (Plain("gelu"), False),
        (Plain("gelu"), True),
        (F.mish, False),
    ],
    ids=["gated", "gated, kept", "plain", "plain, kept", "any"],
)
def test_outputs_and_gradients_are_those_of_the_definition(
    combine: Any, keep_activation: bool, complete: bool
) -> None:
    inputs = inputs_of(gated=isinstance(combine, Gated), complete=complete)
    experts = experts_of(inputs, combine, keep_activation=keep_activation)
    leaves = [tensor for tensor in inputs.values() if tensor.is_floating_point()]
    expected = expert_ffn_reference(
        inputs["hidden"], inputs["expert_ids"], inputs["gates"], experts
    )
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    output = run(inputs, experts)
    found = torch.autograd.grad(output.square().sum(), leaves)
    for ours, theirs in zip((output, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("trained", ["hidden", "gates", "gate_up", "down", "gate_up_bias"])
def test_one_input_alone(trained: str) -> None:
    inputs = inputs_of(gated=True, complete=False)
    experts = experts_of(inputs, Gated("silu"))
    (expected,) = torch.autograd.grad(run(inputs, experts).sum(), [inputs[trained]])
    for name, tensor in inputs.items():
        if tensor.is_floating_point():
            tensor.requires_grad_(name == trained)
    run(inputs, experts).sum().backward()
    for name, tensor in inputs.items():
        if name == trained:
            torch.testing.assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


@pytest.mark.usefixtures("kernels")
def test_the_path_has_a_name_of_its_own() -> None:
    inputs = inputs_of(gated=True, complete=True)
    experts = experts_of(inputs, Gated("silu"))
    assert product_path(inputs["hidden"], experts).path == "triton"
    assert (
        product_path(inputs["hidden"], dataclasses.replace(experts, kernels="torch")).path
        == "expert"
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("a bias of the second matrices", {"down_bias": torch.zeros(EXPERTS, HIDDEN).double()}),
        ("a norm of their outputs", {"output_norm": torch.tanh}),
        ("expert dropout", {"hidden_dropout": 0.1}),
        ("an observer of their outputs", {"observer": lambda outputs: None}),
        ("low-rank changes", {"low_rank": LowRankExperts(LOW_RANK, None)}),
    ],
)
def test_what_stands_between_products_and_tokens_is_refused(
    name: str, option: dict[str, Any]
) -> None:
    inputs = inputs_of(gated=True, complete=True)
    experts = experts_of(inputs, Gated("silu"), **option)
    with pytest.raises(ModelError) as raised:
        run(inputs, experts)
    assert str(raised.value) == (
        "Triton's kernels for experts compute full matrices, at most with a bias of the first, but these "
        f'experts have {name}. Compute them with `set_experts_implementation("flanmoe")`.'
    )


def test_without_triton_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_pass, "available", lambda: False)
    inputs = inputs_of(gated=True, complete=True)
    with pytest.raises(ModelError) as raised:
        run(inputs, experts_of(inputs, Gated("silu")))
    assert str(raised.value) == (
        "Triton's kernels for experts need the package `triton`, which is not installed; PyTorch's CUDA builds "
        'bring it. Install it, or compute with `set_experts_implementation("flanmoe")`.'
    )
