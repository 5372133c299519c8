"""What a model must have for statistics: sparse layers that can be read, and flanmoe's compute."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks, require_moe_blocks
from flanmoe.models.flan_moe_t5.configuration import Side
from flanmoe.models.own_compute import require_own_compute
from flanmoe.moe.block import MoEBlock

# The sparse blocks of a model in its order, each with the side whose tokens it sees.
Blocks = Sequence[tuple[Side, MoEBlock]]


def readable_blocks(model: PreTrainedModel, *, outputs: bool) -> Blocks:
    """Return the sparse blocks of a model in its order, each with the side whose tokens it sees.

    Args:
        model: a sparse decoder or encoder-decoder.
        outputs: whether what the experts return is to be observed too.

    Raises:
        ModelError: if the model is dense, keeps its experts in separate modules, or has outputs that cannot be
            observed.
    """
    blocks = moe_blocks(model)
    if not blocks:
        _refuse_separate_modules(model)
        require_moe_blocks(model)
    if outputs:
        for block in blocks:
            require_own_compute(
                block,
                need="What experts return can be observed where they",
                otherwise=", or leave outputs out with `StatisticsParts(outputs=False)`",
            )
    return _with_sides(model, blocks)


def token_inputs(model: PreTrainedModel) -> Mapping[Side, str]:
    """Return by side the argument of the model's forward that holds its token ids."""
    if model.config.is_encoder_decoder:
        return {"encoder": "input_ids", "decoder": "decoder_input_ids"}
    return {"decoder": "input_ids"}


def _with_sides(model: PreTrainedModel, blocks: Sequence[MoEBlock]) -> Blocks:
    in_encoder: set[int] = set()
    if model.config.is_encoder_decoder:
        in_encoder = {id(module) for module in model.get_encoder().modules()}
    return [("encoder" if id(one.experts) in in_encoder else "decoder", one) for one in blocks]


def _refuse_separate_modules(model: PreTrainedModel) -> None:
    names = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    if names:
        raise ModelError(
            "Statistics need experts whose matrices lie together in one tensor, but "
            f"{type(model).__name__} keeps each expert of {names[0]} in a module of its own. Load a checkpoint "
            "of Switch with `flanmoe.models.flan_moe_t5.switch.load_switch`."
        )
