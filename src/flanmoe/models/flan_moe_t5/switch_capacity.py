"""Capacity in transformers' Switch and in FlanMoeT5.

There an expert takes the first `expert_capacity` tokens of a sequence that choose it, padding included, in
training as in evaluation, whatever the length. Here C = max(minimum, factor * real tokens / experts), with a
factor for each mode. A factor so small that the minimum alone counts, with sequences as groups, is the same
integer; no factor, no limit, is an integer larger than any sequence.
"""

from typing import Any

import torch

from flanmoe.moe.routers.capacity import CapacityConfig

# Larger than any sequence, and the largest that every runtime can read as an integer.
UNLIMITED = 2**31 - 1
# Sequences up to this many tokens are looked at when the two are compared.
_LONGEST_SEQUENCE = 2**20
_NEGLIGIBLE_FACTOR = 1e-9


def our_capacity(expert_capacity: int) -> dict[str, Any]:
    """Return `CapacityConfig` settings for transformers' integer: the same in training, none in evaluation."""
    if expert_capacity >= _LONGEST_SEQUENCE:
        return {"train": None, "evaluation": None, "group": "segment"}
    return {
        "train": _NEGLIGIBLE_FACTOR,
        "evaluation": None,
        "rounding": "down",
        "minimum": expert_capacity,
        "group": "segment",
    }


def their_capacity(
    capacity: CapacityConfig | None, num_experts: int, *, training: bool
) -> int | None:
    """Return the integer that limits an expert as one of our modes does; None if there is none.

    Args:
        capacity: of a router; None for one that never drops.
        num_experts: experts of the router.
        training: whether the mode is training.
    """
    factor = None if capacity is None else capacity.factor(training=training)
    if capacity is None or factor is None:
        return UNLIMITED
    longest = torch.tensor([_LONGEST_SEQUENCE])
    grows = int(capacity.capacities(longest, num_experts, factor=factor)) > capacity.minimum
    return None if grows or capacity.group == "batch" else capacity.minimum
