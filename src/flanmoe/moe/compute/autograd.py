"""`GroupedFFN`: an expert FFN over sorted rows whose backward pass is written out.

What is kept for the backward pass is the input (one row a token, not one a choice) and the first
product; rows are gathered and activations, unless they are kept too, computed again. The gradient
of a gate is the product of what comes back through the second matrices with what went into them, so
that outputs need not be kept either. Gradients of matrices are written once, into their place.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from flanmoe.moe.compute.backward import BackwardPass
from flanmoe.moe.compute.forward import Kept, forward_pass
from flanmoe.moe.compute.triton_pass import TritonBackwardPass, triton_forward_pass
from flanmoe.moe.compute.work import Work


class GroupedFFN(torch.autograd.Function):
    """Apply `Work` to hidden states; see `grouped_ffn`."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, hidden: Tensor, gates: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        """Compute, and keep what the backward pass reads."""
        own = tensors[: len(work.tensors)]
        with _without_autocast(hidden):
            cast = work.with_tensors([_cast(tensor, work.dtype) for tensor in own])
            inputs = hidden.to(work.dtype)
            pass_over = triton_forward_pass if work.kernels == "triton" else forward_pass
            output, kept = pass_over(cast, inputs, gates)
        ctx.work = work
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in own]
        ctx.lengths = [len(tensors) for tensors in kept]
        ctx.save_for_backward(inputs, gates, *cast.tensors, *chain.from_iterable(kept))
        return output.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of all arguments."""
        (gradient,) = grad_outputs
        work: Work = ctx.work
        inputs, gates, *rest = ctx.saved_tensors
        split = len(ctx.dtypes)
        kept = iter(rest[split:])
        _, hidden_wanted, gates_wanted, *wanted = ctx.needs_input_grad
        with _without_autocast(inputs):
            pass_back = TritonBackwardPass if work.kernels == "triton" else BackwardPass
            back = pass_back(
                work.with_tensors(rest[:split]),
                inputs,
                gates,
                gradient.to(work.dtype),
                hidden_wanted=hidden_wanted,
                gates_wanted=gates_wanted,
                wanted=[
                    dtype if needed else None
                    for dtype, needed in zip(ctx.dtypes, wanted[:split], strict=True)
                ],
            )
            back.run(Kept(*(list(islice(kept, length)) for length in ctx.lengths)))
        return (None, *back.gradients(hidden_dtype=gradient.dtype))


def grouped_ffn(
    work: Work, hidden: Float[Tensor, "T H"], gates: Float[Tensor, "T k"]
) -> Float[Tensor, "T H"]:
    """Return for each token the gate-weighted sum of its experts' outputs."""
    arguments: Sequence[Tensor | None] = [hidden, gates, *work.tensors, *work.captured]
    apply: Callable[..., Tensor] = GroupedFFN.apply  # pyright: ignore
    return apply(work, *arguments)


def _without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Products get what they are given; entering autocast only to switch it off takes longer than to ask."""
    device = like.device.type
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else nullcontext()
    )


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
