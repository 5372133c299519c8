"""What can be said of a training run before its first step."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from flanmoe.models.expert_dropout import check_expert_dropout
from flanmoe.models.freezing import frozen
from flanmoe.models.memory import MemoryEstimate, estimate_memory
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.training.arguments import TuneConfig, require_target_length


@dataclass(frozen=True, slots=True)
class TuningSize:
    """Counts and memory.

    Attributes:
        parameters: counts; what is frozen is not trainable.
        memory: the peak.
    """

    parameters: ParameterCount
    memory: MemoryEstimate


def tuning_size(model: PreTrainedModel, config: TuneConfig) -> TuningSize:
    """Count a model and estimate its memory as it will be trained; it may be on the meta device.

    Raises:
        ConfigError: if an encoder-decoder is to be trained without a length of targets, or a decoder with one.
        ModelError: if `freeze` or `expert_dropout` does not suit the model.
    """
    require_target_length(config, is_encoder_decoder=model.config.is_encoder_decoder)
    check_expert_dropout(model, config.expert_dropout or 0.0)
    with frozen(model, config.freeze):
        memory = estimate_memory(
            model,
            rows=config.micro_batch_rows,
            length=config.length,
            target_length=config.target_length,
            precision=config.precision,
            optimizer=config.optimizer,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        return TuningSize(count_parameters(model), memory)
