"""What an evaluation found: one record per example, scores per task, and averages over the suite.

On disk a result is two files in one folder: `scores.json` (everything but the examples) and
`examples.jsonl` (one line per example), so that any number can be taken again from the examples.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from flanmoe.core import files
from flanmoe.core.config import Config
from flanmoe.core.errors import DataError
from flanmoe.evaluation.metrics import Estimate

SCORES_FILE = "scores.json"
EXAMPLES_FILE = "examples.jsonl"
TRAINING_HASHES_FILE = "training_hashes.json"


class ExampleRecord(Config):
    """What a model did with one example.

    Attributes:
        task: name of the task.
        key: name of the example within its task.
        content_hash: hash of what the example asks and answers; the same in every prompt format.
        prompt_hash: hash of the rendered prompt and of what is asked after it.
        loss: negative log-likelihood of the reference answer, nats per token, end-of-turn token
            included; None where the answer is only picked or generated.
        num_tokens: tokens of the reference answer that the loss is over, 0 without one.
        choice_scores: log-likelihood of each choice in nats; empty where none are compared.
        predicted: index of the likeliest choice (the first of equals), None where none are compared.
        label: index of the right choice, None without choices.
        correct: whether the answer is right; None where there is nothing that is right or wrong.
        score: 1 for a right answer and 0 for a wrong or unreadable one; for tasks of lm-eval its metric.
        chance: the score that guessing is expected to give; None where it is not known.
        output: what the model wrote, as it came; None where nothing was generated.
        extracted: the answer that was read out of it, or the choice that was likeliest; None where no
            answer could be read.
        unfinished: whether the model used up all tokens that it was allowed to write.
        seen: whether the model was trained on this example.
        truncated: whether the prompt had to be cut on its left to fit into the model's positions.
    """

    task: str
    key: str
    content_hash: str
    prompt_hash: str
    loss: float | None = None
    num_tokens: int = 0
    choice_scores: tuple[float, ...] = ()
    predicted: int | None = None
    label: int | None = None
    correct: bool | None = None
    score: float | None = None
    chance: float | None = None
    output: str | None = None
    extracted: str | None = None
    unfinished: bool = False
    seen: bool = False
    truncated: bool = False

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, value: Any) -> Any:
        """Fill in the score of a right or wrong answer, and the chance among choices of which one is right."""
        values = dict(value)
        if values.get("score") is None and values.get("correct") is not None:
            values["score"] = float(values["correct"])
        if values.get("chance") is None and values.get("choice_scores"):
            values["chance"] = 1 / len(values["choice_scores"])
        return values


class Scores(Config):
    """Loss and accuracy over one set of examples, or averaged over tasks.

    Attributes:
        loss: mean over examples of the nats per token of the reference answer, None where none has one.
        accuracy: mean score of the examples that have one: the share of right answers, or the metric of
            a task of lm-eval.
        chance: the accuracy that guessing would give on the same examples.
        normalised_accuracy: accuracy in percent of the way from chance to perfect; below 0 is worse
            than guessing.
        normalised_standard_error: its standard error, in percent as well.
    """

    loss: Estimate | None = None
    accuracy: Estimate | None = None
    chance: float | None = None
    normalised_accuracy: float | None = None
    normalised_standard_error: float | None = None


class TaskScore(Config):
    """Scores of one task.

    Attributes:
        task: its name.
        cluster: the group of tasks that it belongs to.
        part_of: the task of the suite that this is one part of, None where it is a whole one. The parts
            are averaged first and then count as one task.
        headline: over the examples that the model has not seen; over all where it has seen
            every one.
        only_seen: True where the headline is over seen examples for want of others.
        seen: scores over the seen examples, None where there are none.
        num_examples: examples evaluated.
        num_seen: how many of them the model was trained on.
        num_truncated: how many prompts were cut on their left.
        num_unreadable: how many generated answers could not be read; they count as wrong.
        num_unfinished: how many answers used up all tokens that the model was allowed to write.
    """

    task: str
    cluster: str
    part_of: str | None = None
    headline: Scores
    only_seen: bool
    seen: Scores | None
    num_examples: int
    num_seen: int
    num_truncated: int
    num_unreadable: int = 0
    num_unfinished: int = 0


class SkippedTask(Config):
    """A task that could not be evaluated, and why.

    Attributes:
        task: its name.
        reason: one or two sentences.
        group: the group of the suite whose average lacks it, "" where it belongs to none.
    """

    task: str
    reason: str
    group: str = ""


class LeftOut(Config):
    """Questions that are there and were not evaluated.

    Attributes:
        task: the task or data set that they belong to.
        reason: why.
        number: how many.
    """

    task: str
    reason: str
    number: int


class GroupCoverage(Config):
    """What the average of one group of a suite is over; its scores are `SuiteResult.clusters[group]`.

    Attributes:
        group: its name.
        title: its name in words.
        mode: how the questions are put: `direct` or `chain_of_thought`.
        shots: worked examples before each question, as the suite defines it.
        held: `in` where the published training data covers the group, `out` where not.
        num_tasks: tasks that the suite defines for it; parts of one task count once.
        missing: tasks (or parts) without data.
        partial: whether there are any.
    """

    group: str
    title: str
    mode: str
    shots: int
    held: str
    num_tasks: int
    missing: tuple[str, ...]
    partial: bool


class NormalisedAverage(Config):
    """The mean over groups of their chance-normalised scores, percent (FLAN-MoE, arXiv 2305.14705).

    Attributes:
        groups: the groups that it is over.
        mean: the average; 0 is guessing, 100 is perfect.
        standard_error: sampling error of the questions, the tasks taken as given; None where a group's
            is not known.
        missing: groups that belong to it and have no data.
        partial: whether it lacks a group, or one of its groups lacks a task.
    """

    groups: tuple[str, ...]
    mean: float
    standard_error: float | None
    missing: tuple[str, ...] = ()
    partial: bool = False


class SuiteResult(Config):
    """Everything that one evaluation of one model found.

    Headline numbers (`pooled`, `macro`, `clusters`) leave out examples that the model was trained
    on, and tasks of which it has seen everything, unless nothing is left; `only_seen` then says so.

    Attributes:
        tasks: scores per task, in the order of the suite.
        skipped: tasks without data.
        left_out: questions that are there and were not evaluated.
        pooled: over all examples, every example counting the same; its clustered standard errors
            take the tasks as clusters.
        macro: over tasks, every task counting the same.
        clusters: the same over the tasks of each cluster, which is the group of a suite that has groups.
        groups: what the average of each group is over; empty for plain lists of tasks.
        normalised_average: the suite's headline; None where it has none, or no data for it.
        held: the same over the groups that the published training data covers (`in`) and does not (`out`).
        harness: for tasks of lm-eval every metric as lm-eval aggregates it.
        only_seen: True where the model has seen every example of the suite.
        num_examples, num_seen, num_truncated: totals over the tasks.
        seconds: wall-clock seconds of the scoring; of one that was stopped and gone on with, those of all legs
            up to their last finished batch, and likewise for tokens.
        tokens: tokens that went through the model, padding left out.
        padding_tokens: padding that went through the model.
        shared_tokens: tokens that did not have to, because another request had the same beginning.
        generated_tokens: tokens that the model wrote.
        model_hash: hash of the model's weights.
        settings: how the suite was set up.
        versions: of Python, the platform and the packages that decide results.
        examples: one record each; kept in a file of their own.
    """

    tasks: tuple[TaskScore, ...]
    skipped: tuple[SkippedTask, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    pooled: Scores
    macro: Scores
    clusters: dict[str, Scores]
    groups: tuple[GroupCoverage, ...] = ()
    normalised_average: NormalisedAverage | None = None
    held: dict[str, NormalisedAverage] = {}
    harness: dict[str, dict[str, float]] = {}
    only_seen: bool
    num_examples: int
    num_seen: int
    num_truncated: int
    seconds: float
    tokens: int
    padding_tokens: int
    shared_tokens: int = 0
    generated_tokens: int = 0
    model_hash: str
    settings: dict[str, Any]
    versions: dict[str, str]
    examples: tuple[ExampleRecord, ...] = Field(default=(), exclude=True, repr=False)

    @property
    def partial(self) -> bool:
        """Whether the averages lack a task of the suite."""
        return bool(self.skipped)

    def to_mapping(self) -> dict[str, Any]:
        """Return everything but the examples as plain JSON types, `partial` included."""
        return {**super().to_mapping(), "partial": self.partial}

    def summary(self) -> "SuiteResult":
        """Return the result without its examples."""
        return self.model_copy(update={"examples": ()})


def write_result(result: SuiteResult, folder: Path) -> Path:
    """Write a result into a folder and return the path of its scores.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    lines = [_line(record) for record in result.examples]
    files.write_text(folder / EXAMPLES_FILE, "".join(f"{line}\n" for line in lines))
    # Last, so that scores never stand there without their examples.
    files.write_json(folder / SCORES_FILE, result.to_mapping())
    return folder / SCORES_FILE


def read_result(path: Path) -> SuiteResult:
    """Read what `write_result` wrote, from the folder or from its scores file.

    Raises:
        DataError: if the folder holds no result, or not one that this version can read.
    """
    folder = path if path.is_dir() else path.parent
    scores = folder / SCORES_FILE
    if not scores.is_file():
        raise DataError(
            f"{path} holds no evaluation result: {scores} does not exist. "
            "Name a folder that `flanmoe eval --out` or an evaluation stage wrote."
        )
    try:
        values = dict(files.read_json_file(scores))
        records = [json.loads(line) for line in _lines(folder / EXAMPLES_FILE)]
    except (OSError, ValueError) as error:
        raise DataError(f"The evaluation result in {folder} cannot be read: {error}.") from error
    values.pop("partial", None)
    origin = str(scores)
    examples = tuple(ExampleRecord.parse(record, origin=origin) for record in records)
    return SuiteResult.parse({**values, "examples": examples}, origin=origin)


def _line(record: ExampleRecord) -> str:
    return json.dumps(record.to_mapping(), ensure_ascii=False, allow_nan=False)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_training_hashes(folder: Path, hashes: Iterable[str]) -> None:
    """Keep with a saved model the content hashes of the examples that it was trained on."""
    files.write_json(folder / TRAINING_HASHES_FILE, {"hashes": sorted(set(hashes))})


def read_training_hashes(folder: Path) -> frozenset[str]:
    """Return the content hashes kept with a saved model; none where the folder has no such file.

    Raises:
        DataError: if the file is there but does not hold a list of hashes.
    """
    path = folder / TRAINING_HASHES_FILE
    if not path.exists():
        return frozenset()
    try:
        hashes = files.read_json_file(path)["hashes"]
    except (ValueError, KeyError, TypeError) as error:
        raise _bad_hashes(path) from error
    if not isinstance(hashes, list) or not all(isinstance(item, str) for item in hashes):
        raise _bad_hashes(path)
    return frozenset(hashes)


def _bad_hashes(path: Path) -> DataError:
    return DataError(
        f'The file {path} must hold {{"hashes": [...]}} with one text per trained example, but does not. '
        "Without it seen examples cannot be told from new ones: restore it from the training run."
    )
