"""Are transformers' Switch losses switched on by the configuration, and do they leave padding out?"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from flanmoe.stages.doctor.check import Check, Measured
from flanmoe.stages.doctor.tiny import tiny_encoder_decoder, token_rows

_REAL, _PADDING = 10, 30
_WAY_OUT = (
    "Use FlanMoeT5 and flanmoe's trainer; "
    "`flanmoe.models.flan_moe_t5.switch.load_switch` reads a Switch checkpoint."
)


def _switch(**values: Any) -> PreTrainedModel:
    return tiny_encoder_decoder("switch_transformers", **values)


@torch.no_grad()
def _output(model: PreTrainedModel, *, padding: int = 0, **options: Any) -> Any:
    tokens, labels = token_rows(2, _REAL, seed=1), token_rows(2, _REAL, seed=2)
    mask = torch.ones_like(tokens)
    return model(
        input_ids=pad(tokens, (0, padding)),
        attention_mask=pad(mask, (0, padding)),
        labels=labels,
        **options,
    )


def _share_by_configuration() -> Measured:
    plain = float(_output(_switch()).loss)
    configured = float(_output(_switch(output_router_logits=True)).loss)
    requested = float(_output(_switch(), output_router_logits=True).loss)
    detail = (
        f"Loss without router losses {plain:.4f}, with the flag in the configuration {configured:.4f}, with "
        f"the keyword in the call {requested:.4f}."
    )
    return Measured((configured - plain) / (requested - plain), detail)


def _with_padding(loss: str) -> Measured:
    model = _switch()
    plain, padded = (
        float(getattr(_output(model, padding=padding, output_router_logits=True), loss))
        for padding in (0, _PADDING)
    )
    return Measured(
        padded / plain,
        f"{plain:.3f} without padding, {padded:.3f} with {_PADDING} padding positions behind {_REAL} tokens.",
    )


def _padding_check(name: str, loss: str, what: str, meaning: str) -> Check:
    return Check(
        name=name,
        library="transformers",
        measures=f"Switch: {what} of the encoder with padding over without, under a correct mask",
        expected=1.0,
        meaning=meaning,
        way_out=_WAY_OUT,
        probe=lambda: _with_padding(loss),
    )


CHECKS = (
    Check(
        name="switch_config_flag",
        library="transformers",
        measures="Switch: share of its router losses in the loss when the configuration asks for them",
        expected=1.0,
        meaning=(
            "`output_router_logits: true` in the configuration does nothing. transformers' trainers do not "
            "pass the keyword either, so the routers train without balance loss and without z-loss."
        ),
        way_out=f"{_WAY_OUT} Otherwise put `output_router_logits=True` into every batch.",
        probe=_share_by_configuration,
    ),
    _padding_check(
        "switch_padding_balance",
        "encoder_aux_loss",
        "balance loss",
        "Padding is balanced along with the text: how long the longest example of a batch is changes the "
        "loss, and routers learn to spread padding.",
    ),
    _padding_check(
        "switch_padding_z",
        "encoder_z_loss",
        "z-loss",
        "The z-loss is averaged over padding as well, so its weight depends on how much of a batch is padding.",
    ),
)
