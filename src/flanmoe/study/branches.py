"""The folders of arms: links to their stages, which arms share, and the result that sums them up.

arms/ARM/seed-N/00-before -> ../../../stages/KEY-before
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flanmoe.core import files
from flanmoe.core.console import say
from flanmoe.core.files import disk_errors
from flanmoe.study.nodes import RESULT_FILE, STAGES_FOLDER, Branch, StageGraph

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP)


def link_branches(study_dir: Path, graph: StageGraph) -> None:
    """Make the folders of all arms with links to their stages, and take away what earlier versions left.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    with disk_errors(study_dir):
        wanted = {branch.folder(study_dir): branch for branch in graph.branches}
        for folder in study_dir.glob("arms/*/seed-*"):
            if folder not in wanted:
                _take_away(folder)
        try:
            for folder, branch in wanted.items():
                _link(folder, branch, graph)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            say(
                f"This disk has no links, so the stages of an arm are named in its {RESULT_FILE} alone."
            )


def _link(folder: Path, branch: Branch, graph: StageGraph) -> None:
    targets = {
        name: Path("..", "..", "..", STAGES_FOLDER, node.folder_name)
        for name, node in graph.stage_places(branch)
    }
    links = [path for path in folder.glob("*") if path.is_symlink()]
    if any(targets.get(path.name) != Path(os.readlink(path)) for path in links):
        _take_away(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in targets.items():
        if not (folder / name).is_symlink():
            _symlink(target, folder / name)


def _symlink(target: Path, place: Path) -> None:
    try:
        place.symlink_to(target, target_is_directory=True)
    except FileExistsError:
        # Another process of the study has just made it.
        if not place.is_symlink():
            raise


def _take_away(folder: Path) -> None:
    """Remove what can be made again: the links and the result. What else lies there stays."""
    (folder / RESULT_FILE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_symlink():
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def write_branch(
    study_dir: Path, graph: StageGraph, branch: Branch, results: Mapping[str, dict[str, Any]]
) -> None:
    """Write the result of an arm and seed whose stages have all finished.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    stages = [results[key] for key in branch.stages]
    files.write_json(
        branch.folder(study_dir) / RESULT_FILE,
        {
            "seconds": sum(stage["seconds"] for stage in stages),
            # Of the model that it ends with.
            "model": stages[-1]["size"],
            "final_model": graph.model_reference(study_dir, branch),
            "nodes": [graph.nodes[key].folder_name for key in branch.stages],
            "stages": stages,
        },
    )
