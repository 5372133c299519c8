"""Reading every task of a study once, before anything runs: mistakes, questions, and what is measured."""

from dataclasses import dataclass, field
from pathlib import Path

from flanmoe.core.cache import fingerprint
from flanmoe.core.seeds import SeedTree
from flanmoe.data.documents import load_documents
from flanmoe.data.mixture import Mixture
from flanmoe.data.tasks import CHOICE_SCORER
from flanmoe.evaluation.suites import Loaded, load_evaluation, warn_of_skipped
from flanmoe.stages.recipe import EvaluateStage, PretrainStage, Stage, TuneStage
from flanmoe.study.analysis.metric import ACCURACY, LOSS, NORMALISED_ACCURACY
from flanmoe.study.observed import task_of
from flanmoe.study.study import Study


@dataclass(slots=True)
class DataRead:
    """What the data of a study holds.

    Attributes:
        num_questions: questions of each evaluation, by the fingerprint of its stage.
        measured: names of the metrics that some evaluation measures.
        tasks: tasks that evaluations score.
        knows_every_task: whether no evaluation is of a suite that names its tasks only when it runs.
    """

    num_questions: dict[str, int] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    tasks: set[str] = field(default_factory=set)
    knows_every_task: bool = True
    warned: set[str] = field(default_factory=set)


def read_data(study: Study, data_dir: Path | None) -> DataRead:
    """Read every task once: a mistake in the last one should not wait for the first to be trained.

    Raises:
        DataError: if a task is not known or cannot be read.
        ConfigError: if a claim is about a metric or a task that no evaluation has.
    """
    read = DataRead()
    stages = {
        fingerprint(stage.to_mapping()): stage
        for arm in study.arms.values()
        for stage in arm.stages
    }
    for identity, stage in stages.items():
        _read_stage(stage, identity, read, data_dir)
    if study.claims:
        tasks = sorted(read.tasks) if read.knows_every_task else None
        study.check_claims(measured=sorted(read.measured), tasks=tasks)
    return read


def _read_stage(stage: Stage, identity: str, read: DataRead, data_dir: Path | None) -> None:
    if isinstance(stage, TuneStage):
        Mixture.load(stage.data, seeds=SeedTree(0), data_dir=data_dir)
    elif isinstance(stage, PretrainStage):
        load_documents(stage.documents, data_dir=data_dir)
    elif isinstance(stage, EvaluateStage):
        loaded = load_evaluation(stage, data_dir=data_dir)
        warn_of_skipped([skip for skip in loaded.skipped if skip.task not in read.warned])
        read.warned |= {skip.task for skip in loaded.skipped}
        read.num_questions[identity] = loaded.num_questions(stage.limit)
        _note_metrics(loaded, read)


def _note_metrics(loaded: Loaded, read: DataRead) -> None:
    has_choices = any(task.scorer == CHOICE_SCORER for task in loaded.tasks)
    if loaded.tasks:
        read.measured.add(LOSS.name)
    if has_choices or loaded.prompted or loaded.harness:
        read.measured |= {ACCURACY.name, NORMALISED_ACCURACY.name}
    read.tasks |= {task_of(task.name) for task in loaded.tasks}
    if loaded.prompted or loaded.harness:
        read.knows_every_task = False
