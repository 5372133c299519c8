"""Does transformers' NLLB-MoE run the experts that its router chooses?"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flanmoe.stages.doctor.check import Check, CheckSkipped, Measured
from flanmoe.stages.doctor.tiny import NUM_EXPERTS, tiny_encoder_decoder, token_rows

_TOP_K = 2


class _Counts:
    """How many tokens the router of one block chose each expert for, and each expert was called with."""

    def __init__(self) -> None:
        self.chosen = torch.zeros(NUM_EXPERTS, dtype=torch.long)
        self.called = torch.zeros(NUM_EXPERTS, dtype=torch.long)

    def listen(self, router: nn.Module, experts: nn.ModuleDict) -> None:
        router.get_submodule("classifier").register_forward_hook(self._choose)
        # A dropout lies among them.
        for number in range(NUM_EXPERTS):
            experts[f"expert_{number}"].register_forward_hook(partial(self._call, number))

    def _choose(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        chosen = logits.reshape(-1, NUM_EXPERTS).topk(_TOP_K, dim=-1).indices
        self.chosen += torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS)

    def _call(self, number: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.called[number] += output.numel() // output.shape[-1]


@torch.no_grad()
def _probe() -> Measured:
    model = tiny_encoder_decoder("nllb-moe", init_std=0.2)
    counts = _listening(model)
    if not counts:
        raise CheckSkipped("NLLB-MoE has no blocks of a router and separate experts any more.")
    tokens = token_rows(4, 32)
    model(input_ids=tokens, decoder_input_ids=tokens)
    # With as much capacity as tokens nothing is dropped, so calls and choices have to agree.
    served = sum(int(torch.minimum(count.called, count.chosen).sum()) for count in counts)
    chosen = sum(int(count.chosen.sum()) for count in counts)
    called = torch.stack([count.called for count in counts]).sum(dim=0)
    asked = torch.stack([count.chosen for count in counts]).sum(dim=0)
    return Measured(
        served / chosen,
        f"Tokens by expert, chosen: {asked.tolist()}; called with: {called.tolist()}.",
    )


def _listening(model: nn.Module) -> list[_Counts]:
    """Start counting in every block with a router and experts that are modules of their own."""
    counts: list[_Counts] = []
    for module in model.modules():
        parts = dict(module.named_children())
        router, experts = parts.get("router"), parts.get("experts")
        if router is not None and isinstance(experts, nn.ModuleDict):
            counts.append(_Counts())
            counts[-1].listen(router, experts)
    return counts


CHECKS = (
    Check(
        name="nllb_experts",
        library="transformers",
        measures="NLLB-MoE: share of the (token, expert) pairs chosen by the routers that experts could serve",
        expected=1.0,
        meaning=(
            "Experts that the routers choose are not run, and others run in their place: a checkpoint gives "
            "other outputs than the model that was published, and training moves the wrong experts."
        ),
        way_out="Do not use NLLB-MoE with this version of transformers, neither to train nor to translate.",
        probe=_probe,
    ),
)
