"""Doing something to many small tensors at once, such as adding them up over processes.

A reduction waits for the slowest process each time, and a copy from an accelerator for all its work.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def in_one_go(each: Callable[[Change], None], together: Change) -> None:
    """Replace tensors by what `together` makes of all of them in one.

    They travel side by side as one tensor of float64, in which whole numbers are exact up to 2^53, and come
    back with their own type and shape.

    Args:
        each: replaces every tensor by what the function that it is given returns for it; always the same
            tensors in the same order.
        together: is given all of them, flat, and returns as many values.
    """
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    each(keep)
    if not tensors:
        return
    flat = together(torch.cat([tensor.reshape(-1).double() for tensor in tensors]))
    pieces = iter(flat.split([tensor.numel() for tensor in tensors]))
    each(lambda tensor: next(pieces).reshape(tensor.shape).to(tensor.dtype))
