"""What can be said of a training run before its first step."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from flanmoe.models.activations import FLOAT32_BYTES
from flanmoe.models.expert_dropout import check_expert_dropout
from flanmoe.models.freezing import frozen
from flanmoe.models.kept_activation import kept_activation
from flanmoe.models.memory import MemoryEstimate, estimate_memory
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.training.arguments import TuneConfig, require_target_length
from flanmoe.tuners.tuning import planned_parameters


@dataclass(frozen=True, slots=True)
class TuningSize:
    """Counts and memory.

    Attributes:
        parameters: counts of the model; trainable is what training changes, a tuner's own weights included,
            and what is frozen is not.
        memory: the peak.
        trained_alone: what training changes where checkpoints hold nothing else; None where they hold the
            model.
    """

    parameters: ParameterCount
    memory: MemoryEstimate
    trained_alone: int | None = None

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint: the weights that it holds, and what the optimizer keeps."""
        held = self.parameters.total if self.trained_alone is None else self.trained_alone
        return FLOAT32_BYTES * held + self.memory.optimizer


def tuning_size(model: PreTrainedModel, config: TuneConfig) -> TuningSize:
    """Count a model and estimate its memory as it will be trained; it may be on the meta device.

    Raises:
        ConfigError: if an encoder-decoder is to be trained without a length of targets, or a decoder with one.
        ModelError: if `freeze`, `expert_dropout`, `keep_expert_activation` or `tuner` does not suit the model.
        RunError: if the statistics that a tuner names cannot be read.
    """
    require_target_length(config, is_encoder_decoder=model.config.is_encoder_decoder)
    check_expert_dropout(model, config.expert_dropout or 0.0)
    beside = planned_parameters(model, config.tuner) if config.tuner else []
    with (
        kept_activation(model, config.keep_expert_activation),
        _all_frozen(model) if config.tuner else frozen(model, config.freeze),
    ):
        memory = estimate_memory(
            model,
            rows=config.micro_batch_rows,
            length=config.length,
            target_length=config.target_length,
            precision=config.precision,
            optimizer=config.optimizer,
            gradient_checkpointing=config.gradient_checkpointing,
            beside=beside,
        )
        parameters = count_parameters(model)
    if config.tuner is None:
        return TuningSize(parameters, memory)
    trained = sum(parameter.numel() for parameter in beside)
    return TuningSize(parameters.model_copy(update={"trainable": trained}), memory, trained)


@contextmanager
def _all_frozen(model: PreTrainedModel) -> Generator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)
