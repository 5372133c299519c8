"""`flanmoe run` and `flanmoe quickstart` before the first job: read the study, plan it, make its folder.

`launch` is the process that sends for it.
"""

from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import yaml

from flanmoe.core.console import show_table
from flanmoe.core.errors import UserError
from flanmoe.data.tasks import TaskConfig, expand
from flanmoe.study.folder import open_study
from flanmoe.study.graph import build_graph
from flanmoe.study.nodes import GRAPH_FILE, StageGraph
from flanmoe.study.plan import plan_graph, plan_tables
from flanmoe.study.study import Study
from flanmoe.study.study_file import as_written, load_study, study_from_mapping
from flanmoe.study.written import WRITTEN_FILE, WrittenStudy

_DEFAULT_MINUTES = 15.0


def quickstart_study(*, minutes: float, overrides: Sequence[str]) -> Study:
    """Return the quickstart's study with tuning and evaluation scaled to a budget.

    Tokens are a function of `minutes` alone and not of the machine's speed, so that a run can be repeated.
    """
    resource = package_files("flanmoe.study").joinpath("quickstart.yaml")
    values = yaml.safe_load(resource.read_text(encoding="utf-8"))
    share = minutes / _DEFAULT_MINUTES
    steps = max(1, round(values["defaults"]["tune"]["train"]["steps"] * share))
    limit = values["defaults"]["evaluate"]["limit"]
    # A limited suite needs one example of each task.
    fewest = len(
        expand([TaskConfig.parse(task) for task in values["defaults"]["evaluate"]["tasks"]])
    )
    scaled = [
        f"defaults.tune.train.steps={steps}",
        # The first of n warm-up steps has rate 0: with no step beside them nothing would train.
        f"defaults.tune.train.warmup_steps={min(2, steps - 1)}",
        f"defaults.evaluate.limit={max(fewest, min(limit, round(limit * share)))}",
    ]
    changes = [] if share == 1 else scaled
    return study_from_mapping(values, overrides=[*changes, *overrides], origin="quickstart.yaml")


def prepare(
    *,
    file: str,
    overrides: Sequence[str],
    profile: str | None,
    folder: str | None,
    data_dir: str | None,
    resume: bool,
    workers: int,
) -> dict[str, Any]:
    """Read a recipe or a study, plan it and make its folder; see `launch.run_file` for the arguments.

    Returns:
        `folder`, the study's.

    Raises:
        UserError: if an arm does not fit this machine, or something asked for cannot be done.
    """
    study = load_study(Path(file), overrides=overrides, profile=profile)
    written = as_written(Path(file), profile=profile, overrides=overrides)
    return _prepare(study, written, folder, data_dir=data_dir, resume=resume, workers=workers)


def prepare_quickstart(
    *, minutes: float, overrides: Sequence[str], folder: str | None, resume: bool, workers: int
) -> dict[str, Any]:
    """Plan the quickstart's study and make its folder; see `prepare`."""
    study = quickstart_study(minutes=minutes, overrides=overrides)
    # Its steps follow from the minutes, so the resolved recipe says more than the file.
    written = WrittenStudy(files={"recipe.yaml": study.to_yaml()}, overrides=tuple(overrides))
    return _prepare(study, written, folder, data_dir=None, resume=resume, workers=workers)


def _prepare(
    study: Study,
    written: WrittenStudy,
    folder: str | None,
    *,
    data_dir: str | None,
    resume: bool,
    workers: int,
) -> dict[str, Any]:
    path = Path(folder) if folder else Path("runs") / study.name
    data = Path(data_dir) if data_dir else None
    graph = build_graph(study, data)
    graph = _planned_before(graph, path) or _planned(study, graph, data, path, workers)
    run = open_study(path, study, graph, resume=resume)
    run.write_json(WRITTEN_FILE, written.to_mapping())
    return {"folder": str(run.path)}


def _planned_before(graph: StageGraph, path: Path) -> StageGraph | None:
    """Return the graph with what its stages were planned to take; None if one has not been planned yet."""
    if not (path / GRAPH_FILE).is_file():
        return None
    known = {key: node for key, node in StageGraph.read(path).nodes.items() if node.memory_bytes}
    if not graph.nodes.keys() <= known.keys():
        return None
    return StageGraph({key: known[key] for key in graph.nodes}, graph.branches)


def _planned(
    study: Study, graph: StageGraph, data_dir: Path | None, folder: Path, workers: int
) -> StageGraph:
    planned, graph = plan_graph(study, graph, data_dir, folder=folder, workers=workers)
    for table in plan_tables(planned):
        show_table(table)
    if planned.refusal:
        raise UserError(planned.refusal)
    return graph
