"""What a model must be before it is trained: in full precision, without leaks between examples."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.packing import require_packing_without_leak
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routers.base import Router
from flanmoe.training.batch_forms import BatchForm, PairForm
from flanmoe.training.sharding import Sharding


def require_full_precision(model: nn.Module) -> None:
    """Refuse a model whose trained weights have fewer than 32 bits.

    Raises:
        ModelError: names the precision found.
    """
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    small = {str(value.dtype).rpartition(".")[2] for value in trained if value.itemsize < 4}
    if small:
        raise ModelError(
            f"Tuning needs weights in float32, but some are in {', '.join(sorted(small))}, which "
            "swallows most updates at fine-tuning rates. Load the model with `dtype=torch.float32`; "
            "`precision: bfloat16` computes in bfloat16 all the same."
        )


def require_batches_understood(
    model: PreTrainedModel,
    blocks: Sequence[MoEBlock],
    form: BatchForm,
    *,
    shares_rows: bool,
    sharding: Sharding,
) -> None:
    """Refuse a model that would get a batch wrong. To be asked while it is whole and without autocast.

    Args:
        model: the model.
        blocks: its sparse blocks.
        form: of the batches that it is to be trained on.
        shares_rows: whether rows may hold several examples.
        sharding: what is to be spread over processes.

    Raises:
        ConfigError: if an encoder-decoder is to be spread over processes.
        ModelError: if an encoder-decoder has routers that cannot know what is padding, or examples that share a
            row see each other.
    """
    if isinstance(form, PairForm):
        _require_one_piece(model, sharding)
        _require_own_routers(model, blocks)
    if shares_rows:
        require_packing_without_leak(model)


def _require_one_piece(model: PreTrainedModel, sharding: Sharding) -> None:
    if sharding != "none":
        raise ConfigError(
            f"`sharding: {sharding}` spreads decoders, but {type(model).__name__} is an encoder-decoder. Set "
            "`sharding: none`."
        )


def _require_own_routers(model: PreTrainedModel, blocks: Sequence[MoEBlock]) -> None:
    # Those of transformers' Switch and NLLB-MoE are told of no padding, and are not even seen as blocks.
    experts = getattr(model.config, "num_experts", 0)
    if any(not isinstance(block.router, Router) for block in blocks) or (experts and not blocks):
        raise ModelError(
            "The routers of a sparse encoder-decoder must be flanmoe's own, which are told of padding, but "
            f"{type(model).__name__} has others. Convert it to FlanMoeT5."
        )
