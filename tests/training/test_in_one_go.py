"""Many small tensors go through one call and come back as they were."""

from typing import Any

import torch

from flanmoe.training.in_one_go import in_one_go


def test_tensors_come_back_with_their_own_type_and_shape() -> None:
    held: list[Any] = [
        torch.tensor(0.1),
        torch.tensor([[1, 2], [2**52 + 1, 4]]),
        torch.zeros(0, 3),
        torch.tensor([0.1, 1e-300], dtype=torch.double),
    ]
    before = [tensor.clone() for tensor in held]
    calls: list[torch.Size] = []

    def each(change: Any) -> None:
        held[:] = [change(tensor) for tensor in held]

    def doubled(flat: torch.Tensor) -> torch.Tensor:
        calls.append(flat.shape)
        return 2 * flat

    in_one_go(each, doubled)
    assert calls == [torch.Size([7])]
    for tensor, old in zip(held, before, strict=True):
        assert tensor.dtype == old.dtype
        assert torch.equal(tensor, 2 * old)


def test_nothing_needs_no_call() -> None:
    def never(flat: torch.Tensor) -> torch.Tensor:
        raise AssertionError("Nothing to do.")

    in_one_go(lambda change: None, never)
