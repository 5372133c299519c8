"""What every callback of the trainer is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from flanmoe.training.report import StepReport


class StepCallback(ABC):
    """Hears of every optimizer step, after the weights have changed and before a checkpoint is made.

    Attributes:
        name: key of its state in checkpoints, unique among the callbacks of a run.
    """

    name: str

    def start(self, step: int) -> None:  # noqa: B027 - most need not do anything
        """Training begins after `step` steps (0, or that of the checkpoint just loaded)."""

    @abstractmethod
    def after_step(self, report: StepReport) -> None:
        """One optimizer step has been made."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it has gathered, as plain JSON types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - nor have state
        """Take over what `state_dict` gave."""
