"""Names to sources, and the message for every name that leads nowhere."""

import gzip
import json
from pathlib import Path

import pytest

from flanmoe.core.errors import DataError
from flanmoe.data.sources.exemplars import Exemplars
from flanmoe.data.sources.finding import (
    DATA_VARIABLE,
    find_source,
    known_names,
    resolve_data_dir,
    splits_of,
)
from flanmoe.data.sources.hub import HubDataset
from flanmoe.data.sources.json_lines import JsonLines
from flanmoe.data.sources.parquet import Parquet


@pytest.fixture(autouse=True)
def _no_folder_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    line = json.dumps({"question": "q", "answer": "a"}) + "\n"
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "alpaca/train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(line)
    (tmp_path / "gsm8k" / "extra.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "gsm8k" / "table.parquet").write_bytes(b"")
    (tmp_path / "README.md").write_text("not a task")
    return tmp_path


def message(name: str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        find_source(name, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_what_each_kind_of_name_leads_to(folder: Path) -> None:
    assert find_source("gsm8k", data_dir=folder) == JsonLines(folder / "gsm8k" / "train.jsonl")
    assert find_source("gsm8k", split="extra", data_dir=folder) == JsonLines(
        folder / "gsm8k" / "extra.jsonl.gz"
    )
    assert find_source("gsm8k", split="table", data_dir=folder) == Parquet(
        folder / "gsm8k" / "table.parquet"
    )
    file = folder / "alpaca" / "train.jsonl"
    assert find_source(str(file)) == JsonLines(file)
    assert isinstance(find_source("exemplars/gsm8k_cot"), Exemplars)
    assert find_source("owner/name", split="test", subset="main") == HubDataset(
        "owner/name", "test", "main"
    )


def test_the_folder_comes_from_the_argument_then_from_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_data_dir(None) is None
    monkeypatch.setenv(DATA_VARIABLE, str(folder))
    assert resolve_data_dir(None) == folder
    assert resolve_data_dir(folder / "gsm8k") == folder / "gsm8k"
    assert find_source("alpaca") == JsonLines(folder / "alpaca" / "train.jsonl")
    monkeypatch.setenv(DATA_VARIABLE, "")
    assert resolve_data_dir(None) is None


def test_a_data_folder_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message("gsm8k", data_dir=folder / "x") == (
        f"The data folder must exist, but {folder}/x (from `--data-dir`) is no folder. Check the path."
    )
    monkeypatch.setenv(DATA_VARIABLE, "/no/such/place")
    assert message("gsm8k") == (
        "The data folder must exist, but /no/such/place (from the environment variable FLANMOE_DATA) "
        "is no folder. Check the path."
    )


def test_an_unknown_task_gets_the_nearest_name(folder: Path) -> None:
    assert message("gsm8", data_dir=folder) == (
        f"The task `gsm8` is not known. Did you mean `gsm8k`? The data folder {folder} has no folder "
        "of that name, and it is no exemplar task, file, or data set on the hub (`owner/name`)."
    )
    assert message("exemplars_gsm8k_cot") == (
        "The task `exemplars_gsm8k_cot` is not known. Did you mean `exemplars/gsm8k_cot`? No data "
        "folder is set: give one with `--data-dir` or FLANMOE_DATA, or name an exemplar task, a file, "
        "or a data set on the hub (`owner/name`)."
    )


def test_an_unknown_split_gets_the_nearest_name(folder: Path) -> None:
    assert message("gsm8k", split="tets", data_dir=folder) == (
        f"`gsm8k` has no split `tets`. Did you mean `test`? Its folder {folder}/gsm8k holds `extra`, "
        "`table`, `test`, `train`."
    )
    (folder / "empty").mkdir()
    assert message("empty", data_dir=folder) == (
        f"`empty` has no split `train`. Its folder {folder}/empty holds no .jsonl, .jsonl.gz or "
        ".parquet file."
    )


def test_a_split_that_stands_twice(folder: Path) -> None:
    (folder / "alpaca" / "train.parquet").write_bytes(b"")
    assert message("alpaca", data_dir=folder) == (
        "The split `train` of `alpaca` must be one file, but there are `train.jsonl`, "
        "`train.parquet`. Remove all but one."
    )


def test_a_file_that_does_not_exist() -> None:
    assert message("mine/rows.jsonl") == "The file mine/rows.jsonl does not exist. Check the path."


def test_options_without_effect_are_errors(folder: Path) -> None:
    assert message("exemplars/gsm8k_cot", split="test") == (
        "`exemplars/gsm8k_cot` is an exemplar task and has no splits, but `split` is `test`. Leave "
        "`split` out."
    )
    file = str(folder / "alpaca" / "train.jsonl")
    assert message(file, subset="main") == (
        f"`{file}` is a file and has no subsets, but `subset` is `main`. Leave `subset` out."
    )
    assert "is a folder of the data folder and has no subsets" in message(
        "gsm8k", subset="main", data_dir=folder
    )


def test_known_names_and_splits(folder: Path) -> None:
    names = known_names(folder)
    assert names[:2] == ["alpaca", "gsm8k"]
    assert "exemplars/mmlu_cot/anatomy" in names
    assert list(splits_of(folder / "gsm8k")) == ["extra", "table", "test", "train"]
