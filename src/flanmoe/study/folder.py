"""The folder of a study: a new one, one to go on with, or one to go on with after the study has changed.

What a change replaces (`recipe.yaml`, `versions.json`, `graph.json`) is kept in `history/`, one folder a
change, with the reasons in `changes.json`.
"""

import shutil
from pathlib import Path
from typing import Any

import yaml

from flanmoe.core import files
from flanmoe.core.console import say
from flanmoe.core.errors import RunError
from flanmoe.core.rundir import RunDir, versions
from flanmoe.study.graph import changes
from flanmoe.study.leg import is_taken
from flanmoe.study.nodes import GRAPH_FILE, StageGraph, is_finished, stage_folder
from flanmoe.study.study import Study

RECIPE_FILE = "recipe.yaml"
VERSIONS_FILE = "versions.json"
HISTORY_FOLDER = "history"
CHANGES_FILE = "changes.json"


def open_study(path: Path, study: Study, graph: StageGraph, *, resume: bool) -> RunDir:
    """Create the folder of a study with its graph, or open it again to go on.

    A study that has changed goes on too: stages that are the same stand, the others run, and why is printed.

    Raises:
        RunError: if the folder holds something else, another study, or a study that another process runs as it
            was; or if `resume` finds nothing to resume.
    """
    if not resume:
        run = RunDir.open(path, study, resume=False)
        graph.write(path)
        return run
    run = RunDir.resumable(path, kind="Study")
    _check_name(run, study)
    # A folder without a graph was left by a kill before the first stage.
    if not run.has(GRAPH_FILE) or _has_changed(run, study, graph):
        run.describe(study)
    graph.write(path)
    return run


def _check_name(run: RunDir, study: Study) -> None:
    written: Any = yaml.safe_load(run.file(RECIPE_FILE).read_text(encoding="utf-8"))
    if written["name"] != study.name:
        raise RunError(
            f"`--resume` needs the folder of the study `{study.name}`, but {run.path} holds "
            f"`{written['name']}`. Choose another folder with `--out`."
        )


def _has_changed(run: RunDir, study: Study, graph: StageGraph) -> bool:
    """Say whether the study is not what it was; if so, keep what it was and print what that means."""
    before = StageGraph.read(run.path)
    same_recipe = run.file(RECIPE_FILE).read_text(encoding="utf-8") == study.to_yaml()
    if same_recipe and before.nodes.keys() == graph.nodes.keys():
        return False
    _check_nobody_runs(run, before)
    reasons = changes(before, graph)
    _keep(run, {_name(graph, key): why for key, why in reasons.items()})
    _say_what_runs(run, before, graph, reasons)
    return True


def _check_nobody_runs(run: RunDir, graph: StageGraph) -> None:
    for node in graph.nodes.values():
        folder = stage_folder(run.path, node)
        if folder.exists() and is_taken(folder):
            raise RunError(
                f"The study in {run.path} has changed, but another process runs its stage `{node.label}` as it "
                "was. Wait for it or stop it, or choose another folder with `--out`."
            )


def _keep(run: RunDir, reasons: dict[str, str]) -> None:
    number = 1 + sum(1 for _ in run.path.glob(f"{HISTORY_FOLDER}/*"))
    kept = run.path / HISTORY_FOLDER / f"{number:03d}"
    with files.disk_errors(kept):
        kept.mkdir(parents=True)
        for name in (RECIPE_FILE, VERSIONS_FILE, GRAPH_FILE):
            shutil.copyfile(run.path / name, kept / name)
    files.write_json(kept / CHANGES_FILE, {"versions_after": versions(), "stages": reasons})
    place = kept.relative_to(run.path)
    say(f"The study has changed since {run.path} was written; what it was is kept in {place}.")


def _say_what_runs(
    run: RunDir, before: StageGraph, graph: StageGraph, reasons: dict[str, str]
) -> None:
    for key, why in reasons.items():
        # One that was changed back has its result still.
        done = is_finished(graph.folder(run.path, key), model_needed=False)
        say(f"  {_name(graph, key)} {'is finished' if done else 'runs'}: {why}.")
    stand = [
        node
        for key, node in graph.nodes.items()
        if key in before.nodes and is_finished(stage_folder(run.path, node), model_needed=False)
    ]
    say(f"  {len(stand)} finished stage{'s' if len(stand) != 1 else ''} stand.")
    unused = [node for key, node in before.nodes.items() if key not in graph.nodes]
    left = [node.folder_name for node in unused if stage_folder(run.path, node).exists()]
    if left:
        say(
            f"  {len(left)} of the stages before have no part in it any more; their folders stay below stages/ "
            "until you remove them."
        )


def _name(graph: StageGraph, key: str) -> str:
    users = graph.users(key)
    arms = ", ".join(dict.fromkeys(branch.arm for branch in users))
    seeds = sorted({branch.seed for branch in users})
    return f"`{graph.nodes[key].label}` of {arms} (seed {', '.join(map(str, seeds))})"
