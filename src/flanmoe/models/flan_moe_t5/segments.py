"""Packed encoder-decoder batches: who may look at whom, and what the decoder is given.

Example k of a row is the tokens of the encoder and those of the decoder that carry segment k; 0 is padding. T5
knows positions only as distances between two tokens. Those inside one example do not depend on where in the row
it lies, and masks leave no others, so relative positions begin anew in every example by themselves.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flanmoe.core.errors import ModelError

# The label of a place that enters no loss, as transformers has it.
IGNORED_LABEL = -100


def own_segment(
    queries: Int[Tensor, "B Q"], keys: Int[Tensor, "B K"], *, causal: bool
) -> Bool[Tensor, "B 1 Q K"]:
    """Return True where a query may see a key: tokens of its own segment, none behind it if causal.

    A query of padding sees all padding, and everything where there is none, so that no softmax is empty;
    nothing comes of it. An example without tokens on the other side sees nothing there.
    """
    padding = (queries == 0).unsqueeze(2) & ~(keys == 0).any(dim=1).view(-1, 1, 1)
    sees = (queries.unsqueeze(2) == keys.unsqueeze(1)) | padding
    if causal:
        sees = sees & torch.ones_like(sees[0]).tril()
    return sees.unsqueeze(1)


def additive(mask: Bool[Tensor, "B 1 Q K"], dtype: torch.dtype) -> Float[Tensor, "B 1 Q K"]:
    """Return 0 where a mask is True and the least number of `dtype` elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)


def shifted_right(
    labels: Int[Tensor, "B L"],
    segments: Int[Tensor, "B L"] | None,
    *,
    start_token_id: int,
    pad_token_id: int,
) -> Int[Tensor, "B L"]:
    """Return the decoder's inputs: every example's labels one place later, after a start token.

    Args:
        labels: what the decoder is to write; -100 becomes padding.
        segments: the number of each token's example; without it every row is one.
        start_token_id, pad_token_id: token ids.
    """
    tokens = labels.masked_fill(labels == IGNORED_LABEL, pad_token_id)
    shifted = tokens.roll(1, dims=1)
    if segments is None:
        begins = torch.zeros_like(labels, dtype=torch.bool)
    else:
        begins = segments != segments.roll(1, dims=1)
    begins[:, 0] = True
    return shifted.masked_fill(begins, start_token_id)


def require_both(encoder: Tensor | None, decoder: Tensor | None) -> None:
    """Refuse segments of one side alone.

    Raises:
        ModelError: if exactly one of them is None.
    """
    if (encoder is None) != (decoder is None):
        given, missing = ("encoder", "decoder") if decoder is None else ("decoder", "encoder")
        raise ModelError(
            f"A packed batch needs the segments of both sides, but only those of the {given} are given: the "
            f"{missing}'s tokens could not be told apart. Pass `segment_ids` and `decoder_segment_ids`."
        )
