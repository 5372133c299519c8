"""Whether a model's attention can be shared, found by trying."""

import torch
from transformers import PreTrainedModel

from flanmoe.core.console import warn
from flanmoe.evaluation.lm.forward import Forward
from flanmoe.evaluation.lm.prefixes import Prefixes
from flanmoe.evaluation.lm.rows import row_batch
from flanmoe.evaluation.lm.shared_attention import IMPLEMENTATION, RowsView
from flanmoe.evaluation.lm.token_tree import Prefix, Row
from flanmoe.evaluation.lm.work import Work

# What logits may differ by on average, as a share of their spread. Where a token sees the wrong ones, they
# differ by about as much as they spread. In short types near ties between experts fall differently.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_OF_SHORT_TYPES = 0.3


def can_share(model: PreTrainedModel) -> bool:
    """Return whether shared passes give a model's own logits; say so in a warning where they do not.

    Tried in the type of the weights, whatever precision is asked for. Linear attention, states in place of
    keys, and attention that does not go through transformers' interface make the difference.
    """
    forward = Forward(model, "float32")
    if not model._can_set_attn_implementation():  # pyright: ignore[reportPrivateUsage]
        _warn_of(forward, "does not go through transformers' attention interface")
        return False
    spread, difference = _difference(forward)
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_OF_SHORT_TYPES)
    # Logits that are no numbers are found where texts are scored, with the name of the text.
    if spread == spread and not difference <= tolerance * spread:
        _warn_of(
            forward,
            f"changes its logits by {difference / spread:.2g} of their spread (limit {tolerance:g}) "
            "when texts share their beginning",
        )
        return False
    return True


def _difference(forward: Forward) -> tuple[float, float]:
    """Spread of the logits, and the root of their mean squared difference between shared and plain passes."""
    device = forward.device
    vocabulary_size = forward.vocabulary_size
    tokens = [(7 * place + 3) % vocabulary_size for place in range(8)]
    prefix, branches = tuple(tokens[:4]), (tuple(tokens[4:6]), tuple(tokens[6:8]))
    # Two branches of one row: the second must not see the first.
    row = Row((*branches[0], *branches[1]), (-1, 0, -1, 2), ((0, 1), (1, 3)))
    with forward.sharing():
        stored = Prefixes(forward, Work()).stored(Prefix(prefix))
        batch = row_batch([row], num_before=len(prefix), device=device)
        view = RowsView(stored, batch.positions, batch.visible)
        places = (torch.zeros(2, dtype=torch.long), torch.tensor([1, 3]))
        shared = forward.logits(batch.tokens, batch.positions, places, view).double()
    last = (torch.tensor([0]), torch.tensor([len(prefix) + 1]))
    plain = torch.cat(
        [
            forward.logits(torch.tensor([[*prefix, *branch]], device=device), None, last, None)
            for branch in branches
        ]
    ).double()
    return float(plain.std()), float((shared - plain).square().mean().sqrt())


def _warn_of(forward: Forward, why: str) -> None:
    warn(
        f"{type(forward.model).__name__} {why}, so every text is read whole. That is slower; the "
        f"results are the same. (Tried: `{IMPLEMENTATION}`.)"
    )
