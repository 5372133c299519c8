"""Whether a model keeps the examples of a packed row apart, asked of the model itself.

Native transformers decoders are told where an example begins by `position_ids` that restart, and
build their attention mask from them. A class that does not hand its positions to the mask lets every
example read the ones before it, without a word; so do recurrent layers, which carry a state along the
row. No list of model types is kept (DESIGN 5.1): one short row shows it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.meta import embedding_weight
from flanmoe.models.modes import evaluating

# Two rows of two examples each. In a sparse model other tokens make other batches for the experts,
# which rounds differently; where two experts tie, rounding can choose the other one. That happens in
# one row at most, a leak in both.
_NUM_ROWS = 2
_NUM_TOKENS = 8
# Of the spread of the logits: far above what rounding in float32 moves them by, far below what a leak
# does (docs/decisions/0003-packing.md has both).
_TOLERANCE = 0.05


def require_packing_without_leak(model: PreTrainedModel) -> None:
    """Refuse a model whose packed examples see each other.

    Costs two forward passes over 32 tokens. The model is left as it was, training mode included.

    Raises:
        ModelError: if the logits of an example change with the example before it.
    """
    before, after = _logits_of_second_example(model)
    leak = float((before - after).abs().amax(dim=(1, 2)).min())
    limit = _TOLERANCE * float(before.std())
    if leak > limit:
        raise ModelError(
            "Examples that share a row must not see each other, but the logits of an example in "
            f"{type(model).__name__} moved by {leak:.2g} when the example before it changed (limit "
            f"{limit:.2g}): the class does not read where an example begins. Put one example into "
            "each row with `packing: {examples_per_row: 1}`."
        )


@torch.no_grad()
def _logits_of_second_example(
    model: PreTrainedModel,
) -> tuple[Float[Tensor, "B L V"], Float[Tensor, "B L V"]]:
    """Return the logits of the second example of each row after one neighbour and after another."""
    table = embedding_weight(model)
    tokens = _tokens(table.shape[0]).to(table.device)
    positions = torch.arange(_NUM_TOKENS, device=table.device).repeat(_NUM_ROWS, 2)
    neighbour, other, second = tokens.split(_NUM_TOKENS, dim=1)
    with evaluating(model):
        before, after = (
            model(
                input_ids=torch.cat([first, second], dim=1),
                position_ids=positions,
                use_cache=False,
            ).logits[:, _NUM_TOKENS:]
            for first in (neighbour, other)
        )
    return before.double(), after.double()


def _tokens(vocabulary_size: int) -> Int[Tensor, "B L"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size, (_NUM_ROWS, 3 * _NUM_TOKENS), generator=generator)
