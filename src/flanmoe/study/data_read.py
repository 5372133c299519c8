"""Reading every task of a study once, before anything runs: mistakes, questions, and what is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flanmoe.core.cache import fingerprint
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing
from flanmoe.core.seeds import SeedTree
from flanmoe.data.documents import load_documents
from flanmoe.data.mixture import Mixture
from flanmoe.data.renderers.base import Occasion
from flanmoe.data.tasks import CHOICE_SCORER, Task, without_format
from flanmoe.evaluation.suites import Loaded, load_evaluation, warn_of_skipped
from flanmoe.stages.recipe import EvaluateStage, PretrainStage, Stage, TuneStage
from flanmoe.study.analysis.metric import ACCURACY, LOSS, NORMALISED_ACCURACY
from flanmoe.study.study import Study


@dataclass(slots=True)
class DataRead:
    """What the data of a study holds.

    Attributes:
        num_questions: questions of each evaluation, by the fingerprint of its stage.
        metrics: names of the metrics that each evaluation measures, likewise.
        tasks: tasks that evaluations score.
        knows_every_task: whether no evaluation is of a suite that names its tasks only when it runs.
    """

    num_questions: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, frozenset[str]] = field(default_factory=dict)
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
        _check_claims(study, read)
    return read


def _read_stage(stage: Stage, identity: str, read: DataRead, data_dir: Path | None) -> None:
    if isinstance(stage, TuneStage):
        for task in Mixture.load(stage.data, seeds=SeedTree(0), data_dir=data_dir).tasks:
            _render_one(task)
    elif isinstance(stage, PretrainStage):
        load_documents(stage.documents, data_dir=data_dir)
    elif isinstance(stage, EvaluateStage):
        loaded = load_evaluation(stage, data_dir=data_dir)
        warn_of_skipped([skip for skip in loaded.skipped if skip.task not in read.warned])
        read.warned |= {skip.task for skip in loaded.skipped}
        read.num_questions[identity] = loaded.num_questions(stage.limit)
        read.metrics[identity] = _metrics(loaded)
        for task in loaded.tasks:
            _render_one(task)
        read.tasks |= {without_format(task.name) for task in loaded.tasks}
        if loaded.prompted or loaded.harness:
            read.knows_every_task = False


def _render_one(task: Task) -> None:
    """Render an example: a family that is not there, or a field that it needs, should not wait for training."""
    task.renderer(task.examples[0], Occasion(seeds=SeedTree(0), count_tokens=lambda text: 0))


def _metrics(loaded: Loaded) -> frozenset[str]:
    found: set[str] = set()
    if loaded.tasks:
        found.add(LOSS.name)
    if loaded.prompted or loaded.harness or any(t.scorer == CHOICE_SCORER for t in loaded.tasks):
        found |= {ACCURACY.name, NORMALISED_ACCURACY.name}
    return frozenset(found)


def _check_claims(study: Study, read: DataRead) -> None:
    tasks = sorted(read.tasks) if read.knows_every_task else None
    measured = {
        system: _measured(study, parts, read.metrics) for system, parts in study.systems.items()
    }
    everything = frozenset[str]().union(*measured.values())
    study.check_claims(measured=sorted(everything), tasks=tasks)
    for claim in study.resolved_claims:
        for arm in claim.contrast(study.factors).weights:
            if claim.metric not in measured[arm]:
                found = listing(sorted(measured[arm])) or "nothing"
                raise ConfigError(
                    f"claims have 1 problem:\n  {claim.name}.metric: must be one that every arm of the claim "
                    f"is scored by at its end, but `{arm}` is scored by {found} and not by `{claim.metric}`."
                )


def _measured(
    study: Study, parts: Sequence[str], metrics: Mapping[str, frozenset[str]]
) -> frozenset[str]:
    """Return what the last evaluation of any part of an arm measures."""
    last = [stage for part in parts for stage in study.evaluations(part)[-1:]]
    return frozenset[str]().union(*(metrics[fingerprint(stage.to_mapping())] for stage in last))
