"""Sums of outputs: padding cannot spoil them, and small types lose nothing in them."""

import torch

from flanmoe.moe.compute import ExpertOutputs
from flanmoe.statistics import OutputSums


def summed(outputs: torch.Tensor, *, valid: torch.Tensor | None = None) -> OutputSums:
    """All outputs are of expert 1 of 3, each of a token of its own, in group 1 of 2."""
    count = len(outputs)
    shown = ExpertOutputs(
        outputs=outputs,
        expert_ids=torch.ones(count, dtype=torch.long),
        token_ids=torch.arange(count),
        gates=torch.full((count,), 0.5),
    )
    valid = torch.ones(count, dtype=torch.bool) if valid is None else valid
    groups = torch.where(valid, 1, 7)
    return OutputSums.of(shown, valid, groups, num_groups=2, num_experts=3)


def test_padding_that_is_no_number_enters_nothing() -> None:
    outputs = torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [0.0, 2.0]])
    found = summed(outputs, valid=torch.tensor([True, False, True]))
    assert found.counts.tolist() == [[0, 0, 0], [0, 2, 0]]
    assert found.outputs.tolist() == [[0, 0], [3, 6], [0, 0]]
    assert found.norms.tolist() == [[0, 0, 0], [0, 7, 0]]
    assert found.squared_norms.tolist() == [[0, 0, 0], [0, 29, 0]]
    assert found.gated_norms.tolist() == [[0, 0, 0], [0, 3.5, 0]]
    # The only gate of its token is all of them.
    assert found.share_norms.tolist() == [[0, 0, 0], [0, 7, 0]]
    assert found.largest_norm.tolist() == [0, 5, 0]


def test_bfloat16_is_added_in_a_wider_type() -> None:
    # In bfloat16 itself 256 + 1 is 256.
    found = summed(torch.ones(1000, 2, dtype=torch.bfloat16))
    assert found.outputs[1].tolist() == [1000, 1000]
    assert found.outputs.dtype == found.norms.dtype == torch.double


def test_blocks_are_added_in_double() -> None:
    # In float32 2^24 + 1 is 2^24.
    found = summed(torch.full((1, 1), 2.0**24)) + summed(torch.ones(1, 1))
    assert found.outputs[1].tolist() == [2**24 + 1]


def test_a_pass_without_real_tokens() -> None:
    found = summed(torch.ones(4, 2), valid=torch.zeros(4, dtype=torch.bool))
    for name, values in OutputSums.none(2, 3, 2).tensors().items():
        assert torch.equal(values, found.tensors()[name])


def test_gates_of_zero_have_no_share() -> None:
    shown = ExpertOutputs(
        torch.ones(2, 2), torch.tensor([0, 1]), torch.tensor([0, 0]), torch.zeros(2)
    )
    valid, groups = torch.tensor([True]), torch.tensor([0])
    found = OutputSums.of(shown, valid, groups, num_groups=1, num_experts=2)
    assert found.share_norms.tolist() == [[0, 0]]


def test_the_largest_norm_of_two_parts() -> None:
    low, high = summed(torch.ones(1, 4)), summed(torch.full((1, 4), 3.0))
    assert (low + high).largest_norm.tolist() == (high + low).largest_norm.tolist() == [0, 6, 0]


def test_mean_outputs() -> None:
    found = summed(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert found.mean_outputs().tolist() == [[0, 0], [2, 4], [0, 0]]
