"""What becomes of a token's second choice: policies that may give it up before capacity is looked at.

A policy looks at the second gate after both were renormalised, g2 / (g1 + g2). A choice that is given
up takes no place at its expert, and the first gate is not raised to make up for it (Mesh-TF,
st-moe-pytorch). More than two choices are treated alike, each by itself.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SecondChoice = Literal["all", "none", "threshold", "random"]


def asked_for(
    shares: Float[Tensor, "T k"], policy: SecondChoice, *, threshold: float
) -> Bool[Tensor, "T k"]:
    """Say which choices a policy leaves standing; first choices always do.

    Args:
        shares: gates of a token's choices, which sum to 1.
        policy: `all` and `none` speak for themselves; `threshold` keeps shares above the
            threshold; `random` keeps a share s with the probability min(1, s / threshold).
        threshold: see `policy`.
    """
    match policy:
        case "all":
            asked = torch.ones_like(shares, dtype=torch.bool)
        case "none":
            asked = torch.zeros_like(shares, dtype=torch.bool)
        case "threshold":
            asked = shares > threshold
        case "random":
            asked = torch.rand_like(shares) < shares / threshold
    asked[:, 0] = True
    return asked
