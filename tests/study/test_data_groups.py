"""What a recipe or a study tunes and scores on, each set of tasks once."""

import json
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core.errors import DataError
from flanmoe.study.data_groups import group_of_task, groups_of_file


def _tune(label: str, *tasks: Any, length: int = 64, **data: Any) -> dict[str, Any]:
    return {
        "stage": "tune",
        "label": label,
        "data": {"tasks": tasks, **data},
        "packing": {"length": length},
        "train": {"length": length},
    }


def _evaluate(label: str, *tasks: Any, **settings: Any) -> dict[str, Any]:
    return {"stage": "evaluate", "label": label, "tasks": tasks, **settings}


def _study(folder: Path, **arms: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(json.dumps({"name": "several", "model": "m", "arms": arms}))
    return path


def test_stages_that_share_their_data_are_one_group(tmp_path: Path) -> None:
    study = _study(
        tmp_path,
        one={"stages": [_evaluate("before", "x"), _tune("a", "y"), _evaluate("after", "x")]},
        two={"stages": [_tune("a", "y"), _tune("b", {"name": "y", "cap": 3}), _evaluate("c", "x")]},
        other={"model": "n", "stages": [_tune("a", "y"), _tune("b", "y", length=32)]},
    )
    groups = groups_of_file(study)
    assert [(group.use, group.model, group.packing_length, group.where) for group in groups] == [
        ("tuned", "m", 64, ("one/a", "two/a")),
        ("tuned", "m", 64, ("two/b",)),
        ("tuned", "n", 64, ("other/a",)),
        ("tuned", "n", 32, ("other/b",)),
        ("evaluated", "m", None, ("one/before", "one/after", "two/c")),
    ]


def test_bad_records_never_stop_whoever_looks(tmp_path: Path) -> None:
    study = _study(tmp_path, one={"stages": [_tune("a", "y"), _evaluate("b", "x")]})
    groups = (*groups_of_file(study), group_of_task("x", split=None, model="m"))
    assert [task.on_bad_record for group in groups for task in group.configs] == ["skip"] * 3


def test_a_task_alone_has_no_use(tmp_path: Path) -> None:
    group = group_of_task("x", split="test", model="m", packing_length=8)
    assert (group.use, group.where, group.packing_length) == ("named", (), 8)
    assert [task.split for task in group.configs] == ["test"]


def test_a_file_without_data_is_refused(tmp_path: Path) -> None:
    study = _study(tmp_path, one={"stages": [{"stage": "upcycle"}]})
    with pytest.raises(DataError, match="needs a `tune` or an `evaluate` stage to have data"):
        groups_of_file(study)
