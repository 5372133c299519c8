"""`flanmoe run` and `flanmoe quickstart` as the parent process sees them: prepare, run the jobs, report.

Nothing here loads torch: each part runs in a child process. Beside a worker the command itself takes 43 MB at
its peak (Linux, Python 3.11; `pytest tests/study/test_main_job.py -k answers_in_json` holds it below 80 MB).
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flanmoe.core.console import console
from flanmoe.core.errors import Interrupted
from flanmoe.core.rundir import RunDir
from flanmoe.study.child import Errand, ask
from flanmoe.study.display import Display, LiveDisplay, PlainDisplay
from flanmoe.study.executor import Executor, require_one_process
from flanmoe.study.executors.local import LocalExecutor
from flanmoe.study.executors.ray import RayExecutor
from flanmoe.study.schedule import Outcome, StudyError, run_graph

ExecutorName = Literal["local", "ray"]

_MORE_MEMORY = "If the system ran out of memory, free some and start it again."


def run_file(
    file: Path,
    folder: Path | None,
    *,
    overrides: Sequence[str],
    profile: str | None,
    data_dir: Path | None,
    resume: bool,
    executor: ExecutorName = "local",
    workers: int = 1,
) -> dict[str, Any]:
    """Run a recipe or a study to its end and report it; returns what `--json` prints.

    Args:
        file: the recipe or study.
        folder: where to write; None takes `runs/` and the name of the study.
        overrides: `dotted.key=value`.
        profile: a named set of overrides from the file.
        data_dir: data folder, None where none was named.
        resume: go on with what an earlier run left.
        executor: where stages run.
        workers: how many at a time.

    Raises:
        UserError: if an arm does not fit this machine, torchrun started several processes, or something
            asked for cannot be done.
        StudyError: if stages failed; the report covers the arms that are finished, and is in its `told`.
        Interrupted: after Ctrl-C, with the state saved and the command that goes on in the message.
    """
    values = {
        "file": str(file),
        "overrides": list(overrides),
        "profile": profile,
        "data_dir": str(data_dir) if data_dir else None,
    }
    chosen = _Way(folder, resume, executor, workers)
    return _run("prepare", values, chosen, data_dir=data_dir)


def run_quickstart(
    folder: Path, *, minutes: float, overrides: Sequence[str], resume: bool
) -> dict[str, Any]:
    """Run the quickstart's study, scaled to a budget; see `run_file`."""
    values = {"minutes": minutes, "overrides": list(overrides)}
    return _run("prepare_quickstart", values, _Way(folder, resume, "local", 1), data_dir=None)


@dataclass(frozen=True, slots=True)
class _Way:
    """Where and how a study runs."""

    folder: Path | None
    resume: bool
    executor: ExecutorName
    workers: int

    @property
    def prepared_with(self) -> dict[str, Any]:
        """What preparing needs to know of it."""
        folder = str(self.folder) if self.folder else None
        return {"folder": folder, "resume": self.resume, "workers": self.workers}

    def executor_and_display(self) -> tuple[Executor, Display]:
        """Return where stages run, and what shows how far they are."""
        live = LiveDisplay() if console.is_terminal else None
        if self.executor == "ray":
            return RayExecutor(self.workers), live or PlainDisplay()
        return LocalExecutor(self.workers, watch=live), live or PlainDisplay()


def _run(
    task: str, values: Mapping[str, Any], way: _Way, *, data_dir: Path | None
) -> dict[str, Any]:
    require_one_process()
    executor, display = way.executor_and_display()
    prepared = ask(Errand(task, {**values, **way.prepared_with}, "The plan", _MORE_MEMORY))
    run = RunDir(Path(prepared["folder"]))
    way_on = f"--resume --out {shlex.quote(str(run.path))}"
    try:
        outcome = run_graph(run, executor, data_dir=data_dir, display=display)
    except Interrupted as stop:
        raise Interrupted(f"{stop} Same command with: {way_on}") from stop
    return _report(run, outcome, way_on)


def _report(run: RunDir, outcome: Outcome, way_on: str) -> dict[str, Any]:
    errand = Errand("report", {"folder": str(run.path)}, "The report", _MORE_MEMORY)
    way_out = f"The other arms are in the report; go on with {way_on}."
    if outcome.failures and not outcome.finished:
        outcome.raise_if_stopped(f"Go on with {way_on}.")
    told = ask(errand)
    if outcome.failures:
        raise StudyError(list(outcome.failures), way_out, told=told)
    return told
