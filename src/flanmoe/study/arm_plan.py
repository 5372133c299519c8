"""What one arm of a study will cost: its stages gone through on models without weights."""

from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.cache import fingerprint
from flanmoe.core.config import Config
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5.shape import shape_config
from flanmoe.models.flan_moe_t5.upcycle import sparse_t5_config
from flanmoe.models.flops import FlopCount
from flanmoe.models.loading import load_config
from flanmoe.models.memory import MemoryEstimate
from flanmoe.models.meta import meta_model
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.models.row_flops import count_row_flops
from flanmoe.models.upcycle import sparse_config
from flanmoe.stages.recipe import (
    EvaluateStage,
    PretrainStage,
    Stage,
    UpcycleStage,
    UpcycleT5Stage,
    stated_lengths,
)
from flanmoe.stages.tuning_size import tuning_size
from flanmoe.study.machine import Machine
from flanmoe.study.study import Arm
from flanmoe.training.arguments import TuneConfig
from flanmoe.training.router_losses import scope_of

# Share of the measured rate of matrix products that a whole step reaches, evaluation included: measured
# with the quickstart on 2 CPU cores (docs/results).
_EFFICIENCY = 0.45
_BYTES_FLOAT32 = 4
# Prompt and reference answer of an instruction exemplar, about; a plan does not tokenise the questions.
_TOKENS_PER_QUESTION = 300


class ArmPlan(Config):
    """What one arm costs with one seed.

    Attributes:
        stages: labels in order.
        parameters: of the model that the arm ends with; trainable is what its last tuning trains, 0
            where nothing is tuned.
        flops_per_token: forward FLOPs of one token of that model, in the context of that tuning.
        memory: peak of its most demanding tuning; None where nothing is tuned.
        tokens: packed tokens that it is tuned on, padding included.
        training_flops: of all tuning steps, with the passes that count experts for router losses of
            scope `global`; frozen parameters count as if they trained.
        seconds: of tuning and evaluation on this machine, roughly.
        disk_bytes: largest space that it takes at one time: saved models and the checkpoints of one
            tuning (one where they are only written after Ctrl-C).
        kept_bytes: what is left of that when it has finished: its last model.
    """

    stages: tuple[str, ...]
    parameters: ParameterCount
    flops_per_token: FlopCount
    memory: MemoryEstimate | None
    tokens: int
    training_flops: float
    seconds: float
    disk_bytes: int
    kept_bytes: int


def plan_arm(arm: Arm, machine: Machine, num_questions: Mapping[str, int]) -> ArmPlan:
    """Plan one arm with one seed.

    Args:
        arm: the arm.
        machine: what was measured of this machine.
        num_questions: questions of each evaluation, by the fingerprint of its stage.

    Raises:
        ModelError: if a model's configuration cannot be read, or the model cannot be upcycled, frozen
            or given expert dropout as asked.
    """
    costs = _ArmCosts(None if arm.model is None else load_config(arm.model), num_questions)
    length, target_length = stated_lengths(arm.stages)
    for stage in arm.stages:
        costs.add(stage, length, target_length)
    return ArmPlan(
        stages=tuple(stage.label for stage in arm.stages),
        parameters=costs.parameters,
        flops_per_token=count_row_flops(costs.model, length=length, target_length=target_length),
        memory=costs.memory,
        tokens=costs.tokens,
        training_flops=costs.training_flops,
        seconds=costs.all_flops / (machine.flops_per_second * _EFFICIENCY),
        disk_bytes=costs.disk,
        kept_bytes=costs.last,
    )


class _ArmCosts:
    """Sums over the stages of an arm, and the model that they have come to."""

    def __init__(self, config: PreTrainedConfig | None, num_questions: Mapping[str, int]) -> None:
        self._model: PreTrainedModel | None = None
        self._config = config
        if config is not None:
            self._become(config)
        self._num_questions = num_questions
        self._trainable = 0
        self.memory: MemoryEstimate | None = None
        self.tokens = self.disk = self.last = 0
        self.training_flops = self.all_flops = 0.0

    @property
    def model(self) -> PreTrainedModel:
        """The model in hand, on the meta device."""
        # A recipe without a model begins with a stage that makes one.
        assert self._model is not None
        return self._model

    @property
    def parameters(self) -> ParameterCount:
        """Counts of the model in hand; trainable is what its last training trains."""
        return count_parameters(self.model).model_copy(update={"trainable": self._trainable})

    def add(self, stage: Stage, length: int, target_length: int | None) -> None:
        """Go through one stage.

        Args:
            stage: the stage.
            length, target_length: rows that the FLOPs of the arm's model are stated at.
        """
        match stage:
            case UpcycleStage() | UpcycleT5Stage():
                self._upcycle(stage)
            case EvaluateStage():
                flops = count_row_flops(self.model, length=length, target_length=target_length)
                questions = self._num_questions[fingerprint(stage.to_mapping())]
                self.all_flops += flops.total * _TOKENS_PER_QUESTION * questions
            case PretrainStage(shape=shape, tokenizer=tokenizer) if shape and tokenizer:
                self._become(shape_config(shape, vocabulary_size=tokenizer.vocabulary_size))
                self._train(stage.train)
            case _:
                self._train(stage.train)

    def _become(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._model = meta_model(config)

    def _upcycle(self, stage: UpcycleStage | UpcycleT5Stage) -> None:
        dense = self._config
        assert dense is not None
        if isinstance(stage, UpcycleT5Stage):
            self._become(sparse_t5_config(dense, stage))
        else:
            self._become(sparse_config(dense, stage))
        self.last = _model_bytes(count_parameters(self.model))
        self.disk += self.last

    def _train(self, train: TuneConfig) -> None:
        size = tuning_size(self.model, train)
        flops = count_row_flops(self.model, length=train.length, target_length=train.target_length)
        self._trainable = size.parameters.trainable
        self.memory = max((self.memory, size.memory), key=lambda item: item.total if item else -1)
        planned = train.steps * train.rows_per_step * (train.length + (train.target_length or 0))
        self.tokens += planned
        spent = planned * (flops.training + _counting_flops(train, self.model, flops))
        self.training_flops += spent
        self.all_flops += spent
        self.last = _model_bytes(size.parameters)
        # A checkpoint holds the weights and what the optimizer keeps.
        checkpoint = self.last + size.memory.optimizer
        self.disk += self.last + _num_checkpoints(train) * checkpoint


def _counting_flops(train: TuneConfig, model: PreTrainedModel, flops: FlopCount) -> float:
    """Return what the trainer spends on a token before its step: a forward pass, or nothing.

    Experts are counted beforehand where router losses are taken over a step of several micro-batches.
    """
    blocks = moe_blocks(model)
    several = train.rows_per_step > train.micro_batch_rows
    return flops.total if several and blocks and scope_of(train.router, blocks).needs_use else 0.0


def _model_bytes(parameters: ParameterCount) -> int:
    return _BYTES_FLOAT32 * parameters.total


def _num_checkpoints(train: TuneConfig) -> int:
    # Those that are kept stand beside the next one while it is written.
    return 1 + train.keep_checkpoints if train.checkpoint_every_steps else 1
