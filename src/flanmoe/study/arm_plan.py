"""What one arm of a study will cost, and each of its stages: gone through on models without weights."""

from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.cache import fingerprint
from flanmoe.core.config import Config
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5.shape import shape_config
from flanmoe.models.flan_moe_t5.upcycle import sparse_t5_config
from flanmoe.models.flops import FlopCount
from flanmoe.models.loading import load_config
from flanmoe.models.memory import RUNTIME_BYTES, MemoryEstimate
from flanmoe.models.meta import meta_model
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.models.row_flops import count_row_flops
from flanmoe.models.upcycle import sparse_config
from flanmoe.stages.recipe import (
    EvaluateStage,
    PretrainStage,
    Stage,
    TuneStage,
    UpcycleStage,
    UpcycleT5Stage,
    leaves_model,
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


class StageCost(Config):
    """What one stage costs.

    Attributes:
        label: the stage's name.
        kind: `tune`, `evaluate`, ...
        parameters: of the model that it leaves or scores; trainable is what it trains, 0 for none.
        memory_bytes: peak of its process.
        tokens: packed tokens that it trains on, padding included.
        flops: operations: of training with the passes that count experts for router losses of scope `global`,
            or of the questions of an evaluation.
        seconds: on this machine, roughly.
        model_bytes: the model that it leaves behind, 0 for none.
        checkpoint_bytes: its checkpoints, which go when it has finished.
    """

    label: str
    kind: str
    parameters: ParameterCount
    memory_bytes: int
    tokens: int = 0
    flops: float = 0.0
    seconds: float
    model_bytes: int = 0
    checkpoint_bytes: int = 0


class ArmPlan(Config):
    """What one arm costs with one seed, as if it ran alone.

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


def plan_arm(
    arm: Arm, machine: Machine, num_questions: Mapping[str, int]
) -> tuple[ArmPlan, tuple[StageCost, ...]]:
    """Plan one arm with one seed, and each of its stages.

    Args:
        arm: the arm.
        machine: what was measured of this machine.
        num_questions: questions of each evaluation, by the fingerprint of its stage.

    Raises:
        ModelError: if a model's configuration cannot be read, or the model cannot be upcycled, frozen
            or given expert dropout as asked.
    """
    costs = _ArmCosts(None if arm.model is None else load_config(arm.model), machine, num_questions)
    length, target_length = stated_lengths(arm.stages)
    stages = tuple(costs.stage(stage, length, target_length) for stage in arm.stages)
    last = [stage.model_bytes for stage in stages if stage.model_bytes]
    planned = ArmPlan(
        stages=tuple(stage.label for stage in arm.stages),
        parameters=costs.parameters,
        flops_per_token=count_row_flops(costs.model, length=length, target_length=target_length),
        memory=costs.memory,
        tokens=sum(stage.tokens for stage in stages),
        training_flops=sum(stage.flops for stage in stages if stage.tokens),
        seconds=sum(stage.seconds for stage in stages),
        disk_bytes=sum(stage.model_bytes + stage.checkpoint_bytes for stage in stages),
        kept_bytes=last[-1] if last else 0,
    )
    return planned, stages


class _ArmCosts:
    """The stages of an arm one after the other, and the model that they have come to."""

    def __init__(
        self, config: PreTrainedConfig | None, machine: Machine, num_questions: Mapping[str, int]
    ) -> None:
        self._model: PreTrainedModel | None = None
        self._config = config
        if config is not None:
            self._become(config)
        self._machine = machine
        self._num_questions = num_questions
        self._trainable = 0
        self.memory: MemoryEstimate | None = None

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

    def stage(self, stage: Stage, length: int, target_length: int | None) -> StageCost:
        """Go through one stage.

        Args:
            stage: the stage.
            length, target_length: rows that the FLOPs of the arm's model are stated at.
        """
        match stage:
            case UpcycleStage() | UpcycleT5Stage():
                return self._upcycle(stage)
            case EvaluateStage():
                flops = count_row_flops(self.model, length=length, target_length=target_length)
                questions = self._num_questions[fingerprint(stage.to_mapping())]
                # Beside the weights about as much again is alive at a time: a batch and its logits.
                memory = RUNTIME_BYTES + 2 * _model_bytes(count_parameters(self.model))
                return self._cost(
                    stage,
                    count_parameters(self.model).model_copy(update={"trainable": 0}),
                    memory,
                    flops=flops.total * _TOKENS_PER_QUESTION * questions,
                )
            case PretrainStage(shape=shape, tokenizer=tokenizer) if shape and tokenizer:
                self._become(shape_config(shape, vocabulary_size=tokenizer.vocabulary_size))
                return self._train(stage)
            case _:
                return self._train(stage)

    def _cost(
        self,
        stage: Stage,
        parameters: ParameterCount,
        memory_bytes: int,
        *,
        flops: float = 0.0,
        **costs: int,
    ) -> StageCost:
        return StageCost(
            label=stage.label,
            kind=stage.stage,
            parameters=parameters,
            memory_bytes=memory_bytes,
            flops=flops,
            seconds=flops / (self._machine.flops_per_second * _EFFICIENCY),
            **costs,
        )

    def _become(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._model = meta_model(config)

    def _upcycle(self, stage: UpcycleStage | UpcycleT5Stage) -> StageCost:
        dense = self._config
        assert dense is not None
        dense_bytes = _model_bytes(count_parameters(self.model))
        if isinstance(stage, UpcycleT5Stage):
            self._become(sparse_t5_config(dense, stage))
        else:
            self._become(sparse_config(dense, stage))
        counts = count_parameters(self.model).model_copy(update={"trainable": 0})
        size = _model_bytes(counts)
        return self._cost(stage, counts, RUNTIME_BYTES + dense_bytes + size, model_bytes=size)

    def _train(self, stage: TuneStage | PretrainStage) -> StageCost:
        train = stage.train
        size = tuning_size(self.model, train)
        flops = count_row_flops(self.model, length=train.length, target_length=train.target_length)
        self._trainable = size.parameters.trainable
        self.memory = max((self.memory, size.memory), key=lambda item: item.total if item else -1)
        planned = train.steps * train.rows_per_step * (train.length + (train.target_length or 0))
        model_bytes = _model_bytes(size.parameters) if leaves_model(stage) else 0
        return self._cost(
            stage,
            size.parameters,
            size.memory.total,
            flops=planned * (flops.training + _counting_flops(train, self.model, flops)),
            tokens=planned,
            model_bytes=model_bytes,
            checkpoint_bytes=_num_checkpoints(train) * size.checkpoint_bytes,
        )


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
