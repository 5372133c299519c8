"""Cross-entropy as a sum, to be divided by what a whole step holds."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def summed_cross_entropy(logits: Float[Tensor, "B K V"], targets: Tensor) -> Float[Tensor, ""]:
    """Return the sum of -log p(target) in nats, in float32 or better; targets of -100 count 0."""
    raised = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(raised.flatten(0, 1), targets.flatten(), reduction="sum")
