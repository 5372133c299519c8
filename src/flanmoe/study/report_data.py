"""Everything that the report of a study shows, as frozen data.

Collecting these records is the study's work; turning them into pages is `report.py`'s. Between the two lies
`report.json`, which is exactly this: a report can be built again from it, and another program can read it.

Units: losses in nats per token of the reference answer, accuracies and shares between 0 and 1, memory in
bytes, time in seconds, floating-point operations counted as two per multiply-add.
"""

from typing import Literal

from pydantic import Field, model_validator

from flanmoe.core.config import Config
from flanmoe.study.analysis.claim_result import ClaimResult
from flanmoe.study.analysis.factorial import FactorialTable
from flanmoe.study.arm_report import ArmReport
from flanmoe.study.number_text import Metric
from flanmoe.study.written import WrittenStudy


class TaskData(Config):
    """What one task gave to training.

    Attributes:
        task: name of the task.
        num_examples: examples that it holds.
        rate: share of the draws that it was to have.
        num_draws: how often one of them stands in a row that was trained on.
        share: its share of the draws of all tasks.
        num_tokens: tokens of those draws.
        group: tasks that share one rate with it; empty for none.
        num_rejected: records of it that were left out because they cannot be read.
    """

    task: str
    num_examples: int
    rate: float = 0.0
    num_draws: int = 0
    share: float
    num_tokens: int = 0
    group: str = ""
    num_rejected: int = 0


class MixtureData(Config):
    """A mixture, and the arms that were tuned on it.

    Attributes:
        arms: their labels.
        tasks: training tasks and their shares.
    """

    arms: tuple[str, ...]
    tasks: tuple[TaskData, ...]

    @property
    def groups(self) -> dict[str, tuple[TaskData, ...]]:
        """Tasks that share a rate, by the name of their group."""
        names = dict.fromkeys(task.group for task in self.tasks if task.group)
        return {name: tuple(task for task in self.tasks if task.group == name) for name in names}


class DataReport(Config):
    """What was trained on and what was kept back.

    Attributes:
        mixtures: what was drawn from; arms with the same tasks, sizes and rates together.
        num_tunings: tunings that drew rows of their own: of other data, with another seed, or one after
            the other. Drops, cuts and padding are of all of them together.
        num_seen: different examples that stand in the rows trained on; of several tunings the most.
        num_dropped: draws that were left out because they were longer than a row.
        num_truncated: draws that were cut to fit into a row.
        num_without_exemplars: few-shot samples left out because not one exemplar fits before them.
        padding_share: padding over all tokens.
        held_out: evaluated tasks of which other examples may have been trained on (split whole).
        evaluation_only: evaluated tasks that must never be trained on.
    """

    mixtures: tuple[MixtureData, ...] = ()
    num_tunings: int = 1
    num_seen: int = 0
    num_dropped: int = 0
    num_truncated: int = 0
    num_without_exemplars: int = 0
    padding_share: float = 0.0
    held_out: tuple[str, ...] = ()
    evaluation_only: tuple[str, ...] = ()


class Comparison(Config):
    """A paired difference: subject minus reference, example by example.

    Attributes:
        subject, reference: labels of the arms that are compared, e.g. `sparse` and `dense`.
        kind: `arms` compares two arms after tuning, `tuning` one arm (named twice) after and before.
        seed: the seed that both ran with, None where the study has only one.
        metric: what was measured on every example.
        mean: mean difference.
        standard_error: of the mean, None where one example is all there is. It and the interval
            take the examples as independent draws, the tasks as given.
        clustered_standard_error: the same where the examples of one task may move together; None
            with a single task.
        low, high: ends of the interval.
        confidence: of the interval, between 0 and 1.
        num_examples: pairs.
    """

    subject: str
    reference: str
    kind: Literal["arms", "tuning"] = "arms"
    seed: int | None = None
    metric: Metric = "loss"
    mean: float
    standard_error: float | None = None
    clustered_standard_error: float | None = None
    low: float
    high: float
    confidence: float = 0.95
    num_examples: int

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> "Comparison":
        if not self.low <= self.high:
            raise ValueError(
                f"`low` must not lie above `high`, but found {self.low} and {self.high}"
            )
        return self

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """What the interval allows to say about the subject: `unclear` unless it excludes zero."""
        if self.low <= 0 <= self.high:
            return "unclear"
        lower_is_better = self.metric == "loss"
        return "better" if (self.high < 0) == lower_is_better else "worse"


class Hardware(Config):
    """The machine that the study ran on."""

    cpu: str = ""
    num_cores: int = 0
    memory_bytes: int = 0
    accelerator: str = ""


class ReportData(Config):
    """Everything that the report of one study shows.

    Attributes:
        study: name of the study.
        description: one sentence that says what it is about.
        scale: one sentence that says how small or large it is.
        created: date and time, as it is to be shown.
        versions: package name to version.
        hardware: the machine.
        baseline: label of the arm that the others are compared with; the first one unless named.
        arms: in the order in which they are shown.
        data: what was trained on and what was kept back.
        claims: what the study claims, with verdicts, in its order; they decide the verdict of the page.
        written: the files of the study as they were written.
        effects: effects of the arms' factors, a table a metric.
        comparisons: paired differences; without claims the `arms` ones, which are first, decide the verdict.
        warnings: sentences about what was left out or cut.
        notes: other sentences about what happened.
        limits: sentences about what this run cannot show, beside those that follow from the data.
    """

    study: str
    description: str = ""
    scale: str = ""
    created: str = ""
    versions: dict[str, str] = {}
    hardware: Hardware = Hardware()
    baseline: str = ""
    arms: tuple[ArmReport, ...] = Field(min_length=1)
    data: DataReport = DataReport()
    claims: tuple[ClaimResult, ...] = ()
    effects: tuple[FactorialTable, ...] = ()
    written: WrittenStudy | None = None
    comparisons: tuple[Comparison, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _labels_are_unique_and_known(self) -> "ReportData":
        labels = [arm.label for arm in self.arms]
        if len(set(labels)) != len(labels):
            raise ValueError(f"labels of arms must be unique, but found {labels}")
        if self.baseline and self.baseline not in labels:
            raise ValueError(f"`baseline` must name an arm ({labels}), but found `{self.baseline}`")
        return self

    @property
    def was_tuned(self) -> bool:
        """Whether any arm trained at all."""
        return any(arm.was_tuned for arm in self.arms)

    @property
    def baseline_arm(self) -> ArmReport:
        """The arm that the others are compared with."""
        return next((arm for arm in self.arms if arm.label == self.baseline), self.arms[0])

    def arm(self, label: str) -> ArmReport | None:
        """Return the arm of this label, None where there is none."""
        return next((arm for arm in self.arms if arm.label == label), None)
