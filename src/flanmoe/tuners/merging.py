"""What merging did to every expert, and whether the model still says the same."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.models.modes import evaluating

# The largest difference of a position's logits, over the largest logit. Merging changes the order of
# additions alone: 1.1e-6 was the most for eight tiny families in float32.
_TOLERANCE_FLOAT32 = 1e-3
_TOLERANCE_BELOW = 5e-2
# Positions that must agree. Rounding may send a token whose experts are nearly tied elsewhere, and every
# later position sees it; a matrix that was left out shows nearly everywhere.
_AGREEING_SHARE = 0.9
_PROBE_ROWS, _PROBE_LENGTH = 2, 32


class MergedExperts(Config):
    """What merging did to the experts of one sparse block.

    Attributes:
        name: path of the block in the model.
        num_experts: number of its experts.
        changed: number of those with a weight that changed.
        left: numbers of the experts that were to be tuned and have nothing to merge, such as those
            that no token was sent to.
    """

    name: str
    num_experts: int
    changed: int
    left: tuple[int, ...] = ()


class MergeReport(Config):
    """What merging did.

    Attributes:
        blocks: each sparse block.
        linear_layers: linear layers and routers that were merged beside the experts.
        agreeing_share: share of the positions of a probe whose logits are the same before and after.
        largest_difference: of two logits of the probe, over the largest logit.
    """

    blocks: tuple[MergedExperts, ...]
    linear_layers: int
    agreeing_share: float
    largest_difference: float

    @property
    def changed(self) -> int:
        """Experts of all blocks that changed."""
        return sum(block.changed for block in self.blocks)


def merge_sentence(report: MergeReport) -> str:
    """Say what merging did, with the experts that had nothing to merge by number."""
    total = sum(block.num_experts for block in report.blocks)
    left = [
        f"{', '.join(map(str, block.left))} of {block.name}"
        for block in report.blocks
        if block.left
    ]
    parts = [
        f"Merged: {report.changed} of {total} experts in {len(report.blocks)} sparse blocks changed",
        f"{report.linear_layers} linear layers and routers too" if report.linear_layers else "",
        f"logits agree at {report.agreeing_share:.0%} of a probe (largest difference "
        f"{report.largest_difference:.1e} of the largest logit)",
        f"nothing to merge for experts {'; '.join(left)}" if left else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def require_changes(blocks: Iterable[MergedExperts], unmoved: Iterable[str]) -> None:
    """Check that weights changed where something was merged into them.

    Args:
        blocks: what merging did to each block.
        unmoved: matrices into which something was merged and which did not change.

    Raises:
        ModelError: names them, or says that nothing changed at all.
    """
    names = list(unmoved)
    if names:
        raise ModelError(
            f"Merging must change every matrix that was tuned, but {len(names)} are as before, the first is "
            f"{names[0]}: what was learnt is too small for their precision. Merge into a model loaded with "
            "`dtype=torch.float32`."
        )
    merged = list(blocks)
    if merged and not any(block.changed for block in merged):
        raise ModelError(
            f"Merging must change at least 1 expert, but changed 0 of {sum(b.num_experts for b in merged)}. "
            "Check that the adapter was trained."
        )


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Float[Tensor, "P V"]:
    """Return the logits of a model, as it is used for answers, at the positions of a fixed probe."""
    with evaluating(model):
        return model(**_probe(model)).logits.flatten(0, 1)


def _probe(model: PreTrainedModel) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    size = (_PROBE_ROWS, _PROBE_LENGTH)
    ids = torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)
    probe = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        probe["decoder_input_ids"] = ids.flip(1)
    return probe


def require_agreement(
    before: Float[Tensor, "P V"], after: Float[Tensor, "P V"]
) -> tuple[float, float]:
    """Check that merging changed weights and not what the model says.

    Args:
        before: logits of the probe with the tuner beside the weights.
        after: with the tuner merged into them.

    Returns:
        The share of positions that agree, and the largest difference over the largest logit.

    Raises:
        ModelError: if too many positions differ by more than rounding.
    """
    tolerance = _TOLERANCE_FLOAT32 if before.dtype.itemsize >= 4 else _TOLERANCE_BELOW
    differences = (after - before).abs().amax(dim=1).double() / before.abs().max().double()
    share = float((differences <= tolerance).double().mean())
    largest = float(differences.max())
    # A difference that is not a number is not at most the tolerance either.
    if share < _AGREEING_SHARE:
        raise ModelError(
            f"Merging must leave the logits as they are at {_AGREEING_SHARE:.0%} of the positions of a probe, "
            f"but leaves {share:.0%} within {tolerance:g} of the largest logit (largest difference "
            f"{largest:g}). Use the adapter without merging it, and please report this."
        )
    return share, largest
