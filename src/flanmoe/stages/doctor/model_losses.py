"""Which router losses a model's own loss holds, as its configuration stands."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.meta import embedding_weight
from flanmoe.models.modes import evaluating
from flanmoe.stages.doctor.check import Check, CheckSkipped, Measured

_ROWS, _LENGTH = 2, 16


def checks(model: Callable[[], PreTrainedModel], config: PreTrainedConfig) -> tuple[Check, ...]:
    """Return the check of a model's own auxiliary loss; `model` gives it, or skips."""
    return (
        Check(
            name="model_balance_loss",
            library="model",
            measures="share of the model's own balance loss that its loss holds as it is configured",
            expected=1.0,
            meaning=(
                "The coefficient in the configuration is without effect until `output_router_logits` is on: a "
                "trainer that leaves the loss to the model trains without balance loss."
            ),
            way_out=(
                "flanmoe's trainer computes its own (`train: {router: ...}`) and leaves the model's off. "
                "Elsewhere set `output_router_logits: true`."
            ),
            probe=lambda: _share(model(), config),
        ),
    )


@torch.no_grad()
def _share(model: PreTrainedModel, config: PreTrainedConfig) -> Measured:
    if not moe_blocks(model):
        raise CheckSkipped("There are no sparse blocks.")
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if config.is_encoder_decoder or coefficient is None:
        raise CheckSkipped(
            f"{type(model).__name__} has no balance loss of its own (no `router_aux_loss_coef`)."
        )
    with evaluating(model):
        asked = _output(model, output_router_logits=True)
        if getattr(asked, "aux_loss", None) is None:
            raise CheckSkipped(f"{type(model).__name__} computes no balance loss.")
        without = float(_output(model, output_router_logits=False).loss)
        added = float(asked.loss) - without
        if not added:
            raise CheckSkipped(f"`router_aux_loss_coef` is {coefficient:g}: nothing is added.")
        share = (float(_output(model).loss) - without) / added
        with _even_routers(model):
            even = float(_output(model, output_router_logits=True).aux_loss)
    top_k = moe_blocks(model)[0].top_k
    return Measured(
        share,
        f"`router_aux_loss_coef` is {coefficient:g}. Even use scores {even:.2f} with {top_k} experts a token: "
        f"{_convention(even, top_k)}.",
        is_note=True,
    )


def _convention(even: float, top_k: int) -> str:
    if abs(even - top_k) < 0.01 * top_k:
        return "all choices are counted, `convention: huggingface`"
    if abs(even - 1.0) < 0.01:
        return "even use is 1, `convention: mesh_tf` where only first choices are counted"
    return "none of flanmoe's conventions"


def _output(model: PreTrainedModel, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding_weight(model).shape[0]
    tokens = torch.randint(vocabulary, (_ROWS, _LENGTH), generator=generator)
    return model(input_ids=tokens, labels=tokens, use_cache=False, **options)


@contextmanager
def _even_routers(model: PreTrainedModel) -> Generator[None]:
    """Let every router give all experts the same probability inside the `with` block."""
    weights = [p for block in moe_blocks(model) for p in block.router.parameters()]
    before: list[Tensor] = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    try:
        yield
    finally:
        for weight, kept in zip(weights, before, strict=True):
            weight.copy_(kept)
