"""What a study will cost: parameters, memory, FLOPs, tokens, time and disk, nothing run.

Of every stage as it runs, once for all arms that need it, and of every arm as if it ran alone.
Models are built on the meta device, so a plan needs the configuration of a model and not its weights.
"""

from pathlib import Path

from flanmoe.core.config import Config
from flanmoe.stages.recipe import PretrainStage, TuneStage
from flanmoe.study.arm_plan import ArmPlan, plan_arm
from flanmoe.study.data_read import DataRead, read_data
from flanmoe.study.graph import build_graph
from flanmoe.study.graph_plan import (
    GraphTotal,
    StagePlan,
    graph_table,
    graph_total,
    stage_costs,
    stage_plans,
    with_costs,
)
from flanmoe.study.machine import Machine, this_machine
from flanmoe.study.nodes import StageGraph
from flanmoe.study.number_text import duration
from flanmoe.study.number_text import short as short_text
from flanmoe.study.number_text import size as size_text
from flanmoe.study.study import Study
from flanmoe.study.tables.base import MOST_ARM_COLUMNS, TextTable, turned
from flanmoe.study.tables.terminal import TerminalTable


class StudyPlan(Config):
    """What a study costs, and why it cannot run here, if so.

    Attributes:
        study: its name.
        baseline: the arm that the others are compared with.
        seeds: how many times each arm runs.
        arms: name to plan of one seed, as if it ran alone.
        stages: what runs, in order: stages that several arms need are one.
        total: all stages together.
        machine: what was measured of this machine.
        refusals: one sentence for each thing that will not fit.
    """

    study: str
    baseline: str
    seeds: int
    arms: dict[str, ArmPlan]
    stages: tuple[StagePlan, ...]
    total: GraphTotal
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
    read = read_data(study, data_dir)
    graph = build_graph(study, data_dir)
    return _planned(study, graph, read, folder=folder, workers=1)[0]


def plan_graph(
    study: Study, graph: StageGraph, data_dir: Path | None, *, folder: Path, workers: int
) -> tuple[StudyPlan, StageGraph]:
    """Plan a study whose graph is at hand, and return the graph with what each stage takes.

    Args:
        study: the study.
        graph: its stages.
        data_dir: data folder, None where none was named.
        folder: where the study writes.
        workers: how many stages run at a time.

    Raises:
        UserError: see `plan_study`.
    """
    return _planned(study, graph, read_data(study, data_dir), folder=folder, workers=workers)


def _planned(
    study: Study,
    graph: StageGraph,
    read: DataRead,
    *,
    folder: Path | None,
    workers: int,
) -> tuple[StudyPlan, StageGraph]:
    machine = this_machine(folder or Path.cwd(), precision=_precision(study))
    planned = {name: plan_arm(arm, machine, read.num_questions) for name, arm in study.arms.items()}
    arms = {name: plan for name, (plan, _) in planned.items()}
    costs = stage_costs(graph, {name: stages for name, (_, stages) in planned.items()})
    total = graph_total(graph, costs, workers=workers)
    plan = StudyPlan(
        study=study.name,
        baseline=study.baseline_arm,
        seeds=len(study.seeds),
        arms=arms,
        stages=stage_plans(graph, costs),
        total=total,
        machine=machine,
        refusals=(
            *_too_large(study, arms),
            *refusals(arms, machine, disk_bytes=total.disk_bytes),
        ),
    )
    return plan, with_costs(graph, costs)


def _precision(study: Study) -> str:
    return next(
        (
            stage.train.precision
            for arm in study.arms.values()
            for stage in arm.stages
            if isinstance(stage, TuneStage | PretrainStage)
        ),
        "bfloat16",
    )


def _too_large(study: Study, arms: dict[str, ArmPlan]) -> list[str]:
    limit = study.max_parameters
    return [
        f"Arm `{name}` has {arm.parameters.total / 1e6:,.1f} million parameters, but the study allows "
        f"{limit / 1e6:,.1f} million (`max_parameters`); make its model smaller."
        for name, arm in arms.items()
        if limit is not None and arm.parameters.total > limit
    ]


def refusals(arms: dict[str, ArmPlan], machine: Machine, *, disk_bytes: int) -> list[str]:
    """Return one sentence for each thing that will not fit on a machine.

    Args:
        arms: the arms.
        machine: the machine.
        disk_bytes: the most that the study takes at one time.
    """
    found: list[str] = []
    for name, arm in arms.items():
        if arm.memory is not None and arm.memory.total > machine.memory_bytes:
            found.append(
                f"Arm `{name}` needs about {size_text(arm.memory.total)} of memory, but "
                f"{size_text(machine.memory_bytes)} are free; lower `train.length` or take a smaller model."
            )
    if disk_bytes > machine.disk_bytes:
        found.append(
            f"The arms need about {size_text(disk_bytes)} of disk, but {size_text(machine.disk_bytes)} are "
            "free; name a folder on another disk with `--out`."
        )
    return found


def _against(arm: ArmPlan, plan: StudyPlan) -> str:
    base = plan.arms[plan.baseline].flops_per_token.total
    return f"{100 * (arm.flops_per_token.total / base - 1):+.1f} %"


def plan_tables(plan: StudyPlan) -> tuple[TerminalTable, TerminalTable]:
    """Return the tables of a plan: a column an arm, of many arms a row; and a row a stage as it runs."""
    return _arm_table(plan), graph_table(plan.stages, plan.total, len(plan.arms))


def _arm_table(plan: StudyPlan) -> TerminalTable:
    is_turned = len(plan.arms) > MOST_ARM_COLUMNS
    # Stages of many arms stand in the table of stages alone.
    rows = _arm_rows(plan)[is_turned:]
    seeds = f"{plan.seeds} seed{'s' if plan.seeds > 1 else ''}"
    text = TextTable(
        header=("", *plan.arms),
        rows=tuple((label, *values) for label, values in rows),
        title=f"Plan of {plan.study} ({seeds}), each arm alone with one of them",
    )
    return TerminalTable(turned(text) if is_turned else text)


def _arm_rows(plan: StudyPlan) -> list[tuple[str, list[str]]]:
    arms = plan.arms.values()
    return [
        ("stages", [", ".join(arm.stages) for arm in arms]),
        ("parameters", [f"{arm.parameters.total / 1e6:,.1f} M" for arm in arms]),
        ("active for a token", [f"{arm.parameters.active / 1e6:,.1f} M" for arm in arms]),
        ("trainable", [f"{arm.parameters.trainable / 1e6:,.1f} M" for arm in arms]),
        ("FLOPs a token, forward", [short_text(arm.flops_per_token.total) for arm in arms]),
        ("against the baseline", [_against(arm, plan) for arm in arms]),
        ("tokens to train on", [f"{arm.tokens:,}" for arm in arms]),
        ("FLOPs to train", [f"{arm.training_flops:.2e}" for arm in arms]),
        ("peak memory", [size_text(arm.memory.total) if arm.memory else "-" for arm in arms]),
        ("disk while running", [size_text(arm.disk_bytes) for arm in arms]),
        ("time here, roughly", [duration(arm.seconds) for arm in arms]),
    ]
