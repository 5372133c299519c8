"""Log-likelihoods of tokens from logits."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def token_likelihoods(
    logits: Float[Tensor, "N V"], places: Sequence[int], targets: Sequence[int]
) -> tuple[Float[Tensor, " M"], list[bool]]:
    """Return the log-likelihood in nats of each target, in float64 on the CPU, and if it is the likeliest.

    The softmax is float32.

    Args:
        logits: what is expected at each place.
        places: for each target its place.
        targets: token ids.
    """
    chosen = torch.tensor(places, dtype=torch.long, device=logits.device)
    tokens = torch.tensor(targets, dtype=torch.long, device=logits.device)
    totals = logits.float().logsumexp(dim=-1)
    likelihoods = (logits[chosen, tokens].float() - totals[chosen]).double().cpu()
    return likelihoods, (logits.argmax(dim=-1)[chosen] == tokens).tolist()
