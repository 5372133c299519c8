"""The ledger of a tuning run: rows, tokens, steps, seconds, FLOPs, peak memory."""

import time
from collections.abc import Mapping
from typing import Any, final

import torch

from flanmoe.core.ledger import Ledger
from flanmoe.core.memory import peak_memory_bytes
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.report import StepReport

# Of training's forward and backward pass, the forward pass is a third (`models.flops`).
_FORWARD_SHARE = 1 / 3


@final
class LedgerKeeper(StepCallback):
    """Adds up what the run costs; what a killed run did after its last checkpoint is not counted.

    Attributes:
        ledger: costs so far, the counting passes of the router losses included.
        counting: seconds and FLOPs of those passes alone (without the output layer they cost a
            little less than stated).

    Args:
        flops_per_token: training FLOPs of one token, forward and backward; padding costs the same.
        device: where the model is; memory is that of this device.
    """

    name = "ledger"

    def __init__(self, *, flops_per_token: float, device: torch.device) -> None:
        self.ledger = Ledger()
        self.counting = Ledger()
        self._flops_per_token = flops_per_token
        self._device = device
        self._last = time.monotonic()

    def start(self, step: int) -> None:
        """Measure seconds from here, and memory on a GPU.

        The peak of this process is the caller's to reset: a reset here would hide what came before
        training from the peak of the stage.
        """
        self._last = time.monotonic()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def after_step(self, report: StepReport) -> None:
        """Add the costs of a step."""
        now = time.monotonic()
        totals = report.totals
        counting = Ledger(
            flops=report.counted_tokens * self._flops_per_token * _FORWARD_SHARE,
            seconds=report.counting_seconds,
        )
        self.counting += counting
        self.ledger += Ledger(
            sequences=totals.rows,
            real_tokens=totals.real_tokens,
            padding_tokens=totals.padding_tokens,
            loss_tokens=totals.loss_tokens,
            steps=1,
            flops=totals.tokens * self._flops_per_token + counting.flops,
            seconds=now - self._last,
            peak_memory_bytes=self._peak_memory(),
        )
        self._last = now

    def state_dict(self) -> dict[str, Any]:
        """Return the costs so far."""
        return {"ledger": self.ledger.to_mapping(), "counting": self.counting.to_mapping()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the costs of an earlier part of the run."""
        self.ledger = Ledger.parse(state["ledger"])
        self.counting = Ledger.parse(state["counting"])

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_memory_bytes()
