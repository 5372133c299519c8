"""Tasks that lm-eval itself defines, by name, or that a user defines for it in YAML.

Prompts, data, answers and metrics are lm-eval's. What is ours: a group is taken apart into its tasks, so that
one without data is left out by name; questions are drawn as for other tasks; results are kept per example.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import lm_eval
from datasets.exceptions import DatasetsError
from lm_eval.api.task import Task as HarnessTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from flanmoe.core.console import say
from flanmoe.core.errors import ConfigError, DataError, ModelError
from flanmoe.core.names import nearest_name_hint
from flanmoe.evaluation.lm import Encoded
from flanmoe.evaluation.results import ExampleRecord, SkippedTask

HARNESS_PREFIX = "lm-eval/"

# A data set cannot be reached, is not there, or needs a package that is not installed.
_NO_DATA = (OSError, DatasetsError, ImportError)


@dataclass(frozen=True, slots=True)
class HarnessGroup:
    """What one name stands for: a task of lm-eval, or all tasks of one of its groups.

    Attributes:
        name: as it was asked for, `lm-eval/NAME`.
        tasks: by `lm-eval/TASK`, those that have data.
        skipped: those that have none.
    """

    name: str
    tasks: dict[str, HarnessTask]
    skipped: tuple[SkippedTask, ...]


class Harnessed(Protocol):
    """What is needed of a language model to say whether prompts were cut."""

    def encode(self, context: str, continuation: str) -> Encoded:
        """Tokenise a request."""
        ...

    def truncates(self, context: str, max_new_tokens: int) -> bool:
        """Say whether a prompt is cut to leave room for new tokens."""
        ...


def load_harness_group(name: str, *, own: Path | None) -> HarnessGroup:
    """Load a task or group of lm-eval with its data.

    Args:
        name: `lm-eval/NAME`.
        own: folder with YAML tasks of the user's, looked at first.

    Raises:
        ConfigError: if `own` is no folder.
        DataError: if lm-eval knows no such task (names the nearest one), or one of its tasks runs code that
            the model wrote, or shows images.
    """
    bare = name.removeprefix(HARNESS_PREFIX)
    manager = _manager_with(bare, own)
    tasks: dict[str, HarnessTask] = {}
    skipped: list[SkippedTask] = []
    for leaf, spec in _leaves(bare, bare, manager):
        try:
            loaded = manager.load([spec])["tasks"]
        except _NO_DATA as error:
            reason = f"lm-eval cannot load its data: {str(error).rstrip('.')}."
            skipped.append(SkippedTask(task=HARNESS_PREFIX + leaf, reason=reason, group=name))
            continue
        for found, task in loaded.items():
            _check_runnable(found, task)
            tasks[HARNESS_PREFIX + found] = task
    return HarnessGroup(name, tasks, tuple(skipped))


def harness_knows(name: str) -> bool:
    """Say whether lm-eval ships a task, group or tag of this name, without reading all of its files as YAML."""
    quoted = re.escape(name.encode())
    declared = re.compile(
        rb"^\s*(?:-\s+)?(?:task|group|tag)?:?\s*[\"']?" + quoted + rb"[\"']?\s*$", re.MULTILINE
    )
    folder = Path(lm_eval.__file__).parent / "tasks"
    return any(declared.search(file.read_bytes()) for file in folder.rglob("*.yaml"))


def run_harness(
    lm: Any, tasks: Mapping[str, HarnessTask], rows: Mapping[str, Sequence[int]]
) -> tuple[list[ExampleRecord], dict[str, dict[str, float]]]:
    """Let lm-eval evaluate some questions of its own tasks.

    Args:
        lm: one of our language models.
        tasks: by name.
        rows: for each task the questions, ascending.

    Returns:
        a record of every question, task by task; and for each task every metric as lm-eval aggregates it.

    Raises:
        ModelError: if a log-likelihood is not a number.
    """
    found: Any = evaluate(
        lm=lm,
        task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
        samples={name: list(rows[name]) for name in tasks},
        bootstrap_iters=0,
        log_samples=True,
    )
    records = [
        record for name in tasks for record in _records(name, tasks[name], found["samples"], lm)
    ]
    metrics = {
        name: {
            metric: float(value)
            for metric, value in found["results"][name].items()
            if isinstance(value, int | float) and "_stderr" not in metric
        }
        for name in tasks
    }
    return records, metrics


def _manager_with(name: str, own: Path | None) -> TaskManager:
    if own is not None:
        if not own.is_dir():
            raise ConfigError(
                f"`--lm-eval-tasks` must name a folder with YAML tasks, but {own} is no folder. Check the path."
            )
        manager = _manager(own, shipped=False)
        if name in manager.all_tasks:
            return manager
    manager = _manager(own, shipped=True)
    if name not in manager.all_tasks:
        raise DataError(
            f"lm-eval knows no task `{name}`.{nearest_name_hint(name, manager.all_tasks)} "
            "`lm-eval ls tasks` lists them; your own are found with `--lm-eval-tasks DIR`."
        )
    return manager


@cache
def _manager(own: Path | None, *, shipped: bool) -> TaskManager:
    if shipped:
        say("Reading the list of lm-eval's tasks; this takes some seconds.")
    include = None if own is None else str(own)
    return TaskManager(include_path=include, include_defaults=shipped)


def _leaves(name: str, spec: Any, manager: TaskManager) -> Iterator[tuple[str, Any]]:
    """Yield the tasks that a name stands for, each with what loads it alone."""
    entry = manager.task_index.get(name)
    if entry is None:
        yield name, spec
        return
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _leaves(member, member, manager)
        return
    members = (entry.cfg or {}).get("task")
    if entry.kind.name != "GROUP" or not isinstance(members, list):
        yield name, spec
        return
    for member in members:
        if isinstance(member, str):
            yield from _leaves(member, member, manager)
        else:
            called = str(member.get("task") or member.get("group"))
            overridden = set(member) - {"task", "group"}
            # With settings of its own a member is loaded as it stands.
            yield from [(called, member)] if overridden else _leaves(called, called, manager)


def _check_runnable(name: str, task: HarnessTask) -> None:
    for flag, what in (
        ("UNSAFE_CODE", "runs code that the model wrote"),
        ("MULTIMODAL", "shows images"),
    ):
        if getattr(task, flag, False):
            raise DataError(
                f"The task `{HARNESS_PREFIX}{name}` {what}, which `flanmoe eval` does not do. Take it out, or "
                "run it with lm-eval itself."
            )


def _records(
    name: str, task: HarnessTask, samples: Mapping[str, Any], lm: Harnessed
) -> list[ExampleRecord]:
    own = samples[name]
    # A task with several filters lists every question once for each; the first is its main one.
    main = [sample for sample in own if sample["filter"] == own[0]["filter"]]
    metric = _main_metric(main)
    right_or_wrong = metric is not None and all(sample[metric] in (0, 1) for sample in main)
    return [
        _record(name, task, sample, lm).model_copy(
            update={
                "score": None if metric is None else float(sample[metric]),
                "correct": bool(sample[metric]) if metric and right_or_wrong else None,
            }
        )
        for sample in main
    ]


def _main_metric(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The first metric that is a number between 0 and 1 for every question; None where there is none."""
    for metric in samples[0]["metrics"]:
        values = [sample.get(metric) for sample in samples]
        if all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
            return str(metric)
    return None


def _record(
    name: str, task: HarnessTask, sample: Mapping[str, Any], lm: Harnessed
) -> ExampleRecord:
    """Return everything but the score."""
    answers = [one[0] if isinstance(one, list) else one for one in sample["filtered_resps"]]
    likelihoods = [float(one[0]) for one in answers if isinstance(one, tuple | list)]
    if not all(math.isfinite(value) for value in likelihoods):
        raise ModelError(
            f"A log-likelihood must be a finite number, but those of example `{sample['doc_id']}` of task "
            f"`{name}` are {likelihoods}. The model's weights are damaged, or training diverged."
        )
    written = sample["resps"][0][0]
    picked = task.OUTPUT_TYPE == "multiple_choice" and "acc_mutual_info" not in sample["metrics"]
    return ExampleRecord(
        task=name,
        key=str(sample["doc_id"]),
        content_hash=sample["doc_hash"],
        prompt_hash=sample["prompt_hash"],
        choice_scores=tuple(likelihoods) if picked and len(likelihoods) > 1 else (),
        output=written if isinstance(written, str) else None,
        extracted=answers[0] if isinstance(answers[0], str) else None,
        truncated=any(_is_cut(arguments, lm) for arguments in sample["arguments"]),
    )


def _is_cut(arguments: Sequence[Any], lm: Harnessed) -> bool:
    if len(arguments) < 2:
        return False
    context, rest = str(arguments[0]), arguments[1]
    if isinstance(rest, str):
        return lm.encode(context, rest).truncated
    return lm.truncates(context, int(rest.get("max_gen_toks", 256)))
