"""`AttachedTuner`: small weights that train beside a frozen model, until they are merged or taken off."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from flanmoe.models.own_compute import require_own_compute
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute.chosen import ChosenExperts
from flanmoe.moe.compute.low_rank import LowRankExperts
from flanmoe.tuners.merging import MergeReport


class AttachedTuner(ABC):
    """What a tuner has put into a model. The model's own weights are frozen for as long as it is there.

    Args:
        model: the model, before anything is put in.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._is_off = False
        self._trained_before = {
            name: parameter.requires_grad for name, parameter in model.named_parameters()
        }
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """The weights that train, by their names in the model."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained to a folder of its own.

        Raises:
            DiskError: if it cannot be written.
        """

    @abstractmethod
    def merge(self) -> MergeReport:
        """Put what was trained into the model's own weights, take the rest off, and check both.

        Raises:
            ModelError: if weights did not change that should have, or outputs changed that should not.
        """

    def detach(self) -> None:
        """Take off what was put in: the model is then as it was before, bit by bit. Twice is once."""
        if self._is_off:
            return
        self._is_off = True
        self._take_off()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained_before[name])

    @abstractmethod
    def _take_off(self) -> None: ...


def has_tuner(model: nn.Module) -> bool:
    """Return whether a tuner stands in a model or a copy of it."""
    kinds = (LowRankExperts, ChosenExperts, BaseTunerLayer)
    return any(isinstance(module, kinds) for module in model.modules())


def require_tunable_experts(block: MoEBlock) -> None:
    """Refuse experts that do not look for what a tuner puts beside them.

    Raises:
        ModelError: names the block and what its experts run.
    """
    require_own_compute(block, need="Tuning experts needs experts that")
