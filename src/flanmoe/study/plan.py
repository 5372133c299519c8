"""What a study will cost: parameters, memory, FLOPs, tokens, time and disk of every arm, nothing run.

Models are built on the meta device, so a plan needs the configuration of a model and not its weights.
"""

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from flanmoe.core.cache import fingerprint
from flanmoe.core.config import Config
from flanmoe.core.seeds import SeedTree
from flanmoe.data.mixture import Mixture
from flanmoe.evaluation.suites import load_evaluation, warn_of_skipped
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flops import FlopCount, count_flops
from flanmoe.models.loading import load_config
from flanmoe.models.memory import MemoryEstimate
from flanmoe.models.meta import meta_model
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.models.upcycle import sparse_config
from flanmoe.stages.recipe import EvaluateStage, TuneStage, UpcycleStage, stated_context_length
from flanmoe.stages.tune import tuning_size
from flanmoe.study.machine import Machine, this_machine
from flanmoe.study.report_text import size as size_text
from flanmoe.study.study import Arm, Study
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


class StudyPlan(Config):
    """What a study costs, and why it cannot run here, if so.

    Attributes:
        study: its name.
        seeds: how many times each arm runs.
        arms: name to plan of one seed.
        machine: what was measured of this machine.
        refusals: one sentence for each thing that will not fit.
    """

    study: str
    seeds: int
    arms: dict[str, ArmPlan]
    machine: Machine
    refusals: tuple[str, ...]

    @property
    def refusal(self) -> str | None:
        """Why it cannot run here, None where it can."""
        return f"This will not fit: {' '.join(self.refusals)}" if self.refusals else None


def plan_study(study: Study, data_dir: Path | None, *, folder: Path | None = None) -> StudyPlan:
    """Plan every arm; `folder` is where the study would write.

    Raises:
        ModelError: if a model's configuration cannot be read, or the model cannot be upcycled, frozen
            or given expert dropout as asked.
        DataError: if a task is not known or cannot be read.
    """
    num_questions = _read_data(study, data_dir)
    precision = next(
        (
            stage.train.precision
            for arm in study.arms.values()
            for stage in arm.stages
            if isinstance(stage, TuneStage)
        ),
        "bfloat16",
    )
    machine = this_machine(folder or Path.cwd(), precision=precision)
    arms = {name: _plan_arm(arm, machine, num_questions) for name, arm in study.arms.items()}
    return StudyPlan(
        study=study.name,
        seeds=len(study.seeds),
        arms=arms,
        machine=machine,
        refusals=tuple(refusals(arms, machine, seeds=len(study.seeds))),
    )


def _read_data(study: Study, data_dir: Path | None) -> dict[str, int]:
    """Read every task once: a mistake in the last one should not wait for the first to be trained.

    Returns:
        The number of questions of each evaluation, by the fingerprint of its stage.
    """
    num_questions: dict[str, int] = {}
    checked: set[str] = set()
    warned: set[str] = set()
    for arm in study.arms.values():
        for stage in arm.stages:
            identity = fingerprint(stage.to_mapping())
            if identity in checked:
                continue
            checked.add(identity)
            if isinstance(stage, TuneStage):
                Mixture.load(stage.data, seeds=SeedTree(0), data_dir=data_dir)
            elif isinstance(stage, EvaluateStage):
                loaded = load_evaluation(stage, data_dir=data_dir)
                warn_of_skipped([skip for skip in loaded.skipped if skip.task not in warned])
                warned |= {skip.task for skip in loaded.skipped}
                num_questions[identity] = loaded.num_questions(stage.limit)
    return num_questions


def _plan_arm(arm: Arm, machine: Machine, num_questions: Mapping[str, int]) -> ArmPlan:
    config: PreTrainedConfig = load_config(arm.model)
    model = meta_model(config)
    memory: MemoryEstimate | None = None
    length = stated_context_length(arm.stages)
    trainable = 0
    tokens, training_flops, all_flops, disk, last = 0, 0.0, 0.0, 0, 0
    for stage in arm.stages:
        match stage:
            case UpcycleStage():
                config = sparse_config(config, stage)
                model = meta_model(config)
                last = _model_bytes(count_parameters(model))
                disk += last
            case TuneStage():
                flops = count_flops(model, context_length=stage.train.length)
                size = tuning_size(model, stage.train)
                trainable = size.parameters.trainable
                memory = max((memory, size.memory), key=lambda item: item.total if item else -1)
                planned = stage.train.steps * stage.train.rows_per_step * stage.train.length
                tokens += planned
                tuning_flops = planned * (
                    flops.training + _counting_flops(stage.train, model, flops)
                )
                training_flops += tuning_flops
                all_flops += tuning_flops
                last = _model_bytes(size.parameters)
                disk += last + _num_checkpoints(stage.train) * _checkpoint_bytes(size.parameters)
            case EvaluateStage():
                flops = count_flops(model, context_length=length)
                questions = num_questions[fingerprint(stage.to_mapping())]
                all_flops += flops.total * _TOKENS_PER_QUESTION * questions
    return ArmPlan(
        stages=tuple(stage.label for stage in arm.stages),
        parameters=count_parameters(model).model_copy(update={"trainable": trainable}),
        flops_per_token=count_flops(model, context_length=length),
        memory=memory,
        tokens=tokens,
        training_flops=training_flops,
        seconds=all_flops / (machine.flops_per_second * _EFFICIENCY),
        disk_bytes=disk,
        kept_bytes=last,
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


def _checkpoint_bytes(parameters: ParameterCount) -> int:
    # Weights, and two moments of what trains.
    return _BYTES_FLOAT32 * (parameters.total + 2 * parameters.trainable)


def refusals(arms: dict[str, ArmPlan], machine: Machine, *, seeds: int) -> list[str]:
    """Return one sentence for each thing that will not fit on a machine."""
    found: list[str] = []
    for name, arm in arms.items():
        if arm.memory is not None and arm.memory.total > machine.memory_bytes:
            found.append(
                f"Arm `{name}` needs about {size_text(arm.memory.total)} of memory, but "
                f"{size_text(machine.memory_bytes)} are free; lower `train.length` or take a smaller model."
            )
    # Arms run one after the other, and each leaves its last model behind.
    kept = seeds * sum(arm.kept_bytes for arm in arms.values())
    needed = kept + max(arm.disk_bytes - arm.kept_bytes for arm in arms.values())
    if needed > machine.disk_bytes:
        found.append(
            f"The arms need about {size_text(needed)} of disk, but {size_text(machine.disk_bytes)} are "
            "free; name a folder on another disk with `--out`."
        )
    return found


def plan_table(plan: StudyPlan) -> Table:
    """Return a table of a plan, one column an arm."""
    table = Table(title=f"Plan of {plan.study} ({plan.seeds} seed{'s' if plan.seeds > 1 else ''})")
    table.add_column("")
    for name in plan.arms:
        table.add_column(name, justify="right")
    arms = plan.arms.values()
    rows: list[tuple[str, list[str]]] = [
        ("stages", [", ".join(arm.stages) for arm in arms]),
        ("parameters", [f"{arm.parameters.total / 1e6:,.1f} M" for arm in arms]),
        ("active for a token", [f"{arm.parameters.active / 1e6:,.1f} M" for arm in arms]),
        ("trainable", [f"{arm.parameters.trainable / 1e6:,.1f} M" for arm in arms]),
        ("FLOPs a token, forward", [f"{arm.flops_per_token.total / 1e6:,.0f} M" for arm in arms]),
        ("tokens to tune on", [f"{arm.tokens:,}" for arm in arms]),
        ("FLOPs to tune", [f"{arm.training_flops:.2e}" for arm in arms]),
        ("peak memory", [size_text(arm.memory.total) if arm.memory else "-" for arm in arms]),
        ("disk while running", [size_text(arm.disk_bytes) for arm in arms]),
        ("time here, roughly", [f"{arm.seconds / 60:.1f} min" for arm in arms]),
    ]
    for label, values in rows:
        table.add_row(label, *values)
    return table
