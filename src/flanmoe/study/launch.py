"""`flanmoe run` and `flanmoe quickstart` as the parent process sees them: prepare, run the jobs, report.

Nothing here loads torch: each part runs in a child process. Beside a worker the command itself takes 43 MB at
its peak (Linux, Python 3.11; `pytest tests/study/test_main_job.py -k answers_in_json` holds it below 80 MB).
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flanmoe.core.errors import Interrupted
from flanmoe.core.rundir import RunDir
from flanmoe.study.child import Errand, ask
from flanmoe.study.executor import Job, LocalExecutor, require_one_process, run_jobs

_MORE_MEMORY = "If the system ran out of memory, free some and start it again."


def run_file(
    file: Path,
    folder: Path | None,
    *,
    overrides: Sequence[str],
    profile: str | None,
    data_dir: Path | None,
    resume: bool,
) -> dict[str, Any]:
    """Run a recipe or a study to its end and report it; returns what `--json` prints.

    Args:
        file: the recipe or study.
        folder: where to write; None takes `runs/` and the name of the study.
        overrides: `dotted.key=value`.
        profile: a named set of overrides from the file.
        data_dir: data folder, None where none was named.
        resume: go on with what an earlier run left.

    Raises:
        UserError: if an arm does not fit this machine, torchrun started several processes, or something
            asked for cannot be done.
        Interrupted: after Ctrl-C, with the state saved and the command that goes on in the message.
    """
    values = {
        "file": str(file),
        "overrides": list(overrides),
        "profile": profile,
        "data_dir": str(data_dir) if data_dir else None,
    }
    return _run("prepare", values, folder, data_dir=data_dir, resume=resume)


def run_quickstart(
    folder: Path, *, minutes: float, overrides: Sequence[str], resume: bool
) -> dict[str, Any]:
    """Run the quickstart's study, scaled to a budget; see `run_file`."""
    values = {"minutes": minutes, "overrides": list(overrides)}
    return _run("prepare_quickstart", values, folder, data_dir=None, resume=resume)


def _run(
    task: str,
    values: Mapping[str, Any],
    folder: Path | None,
    *,
    data_dir: Path | None,
    resume: bool,
) -> dict[str, Any]:
    require_one_process()
    place = {"folder": str(folder) if folder else None, "resume": resume}
    prepared = ask(Errand(task, {**values, **place}, "The plan", _MORE_MEMORY))
    run = RunDir(Path(prepared["folder"]))
    jobs = [Job(run.path, arm, seed, data_dir) for arm, seed in prepared["jobs"]]
    way_on = f"--resume --out {shlex.quote(str(run.path))}"
    try:
        run_jobs(run, jobs, LocalExecutor())
    except Interrupted as stop:
        raise Interrupted(f"{stop} Same command with: {way_on}") from stop
    return ask(Errand("report", {"folder": str(run.path)}, "The report", _MORE_MEMORY))
