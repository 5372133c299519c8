"""What is written reads back equal; training hashes; messages for folders that hold neither."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flanmoe.core.errors import DataError
from flanmoe.evaluation.results import (
    ExampleRecord,
    SuiteResult,
    read_result,
    read_training_hashes,
    write_result,
    write_training_hashes,
)

Record = Callable[..., ExampleRecord]
Result = Callable[..., SuiteResult]


def test_a_written_result_reads_back_equal(record: Record, result: Result, tmp_path: Path) -> None:
    records = [
        record("a", "0", 0.1 + 0.2, True, seen=True),
        record("a", "1", 1 / 3, False),
        record("b", "line\u2028break", 2.0),
    ]
    written = result(records)
    path = write_result(written, tmp_path)
    assert read_result(tmp_path) == written
    assert read_result(path) == written
    assert len((tmp_path / "examples.jsonl").read_text(encoding="utf-8").splitlines()) >= 3
    scores = json.loads(path.read_text(encoding="utf-8"))
    assert "examples" not in scores
    assert scores["partial"] is False
    assert scores["tasks"][0]["num_seen"] == 1


def test_the_summary_has_no_examples(record: Record, result: Result) -> None:
    full = result([record("a", "0", 1.0)])
    assert full.summary().examples == ()
    assert full.summary().to_mapping() == full.to_mapping()


def test_a_folder_without_a_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_result(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds no evaluation result: {tmp_path / 'scores.json'} does not exist. "
        "Name a folder that `flanmoe eval --out` or an evaluation stage wrote."
    )


@pytest.mark.parametrize("name", ["scores.json", "examples.jsonl"])
def test_a_damaged_result_is_named(
    record: Record, result: Result, tmp_path: Path, name: str
) -> None:
    write_result(result([record("a", "0", 1.0)]), tmp_path)
    (tmp_path / name).write_text('{"half', encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        read_result(tmp_path)


def test_missing_examples_are_named(record: Record, result: Result, tmp_path: Path) -> None:
    write_result(result([record("a", "0", 1.0)]), tmp_path)
    (tmp_path / "examples.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot be read: .*examples\.jsonl"):
        read_result(tmp_path)


def test_a_loss_that_is_no_number_is_never_written(
    record: Record, result: Result, tmp_path: Path
) -> None:
    broken = result([record("a", "0", 1.0)]).model_copy(
        update={"examples": (record("a", "0", float("nan")),)}
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_hashes_read_back(tmp_path: Path) -> None:
    write_training_hashes(tmp_path, ["b", "a", "b"])
    assert read_training_hashes(tmp_path) == {"a", "b"}
    assert json.loads((tmp_path / "training_hashes.json").read_text()) == {"hashes": ["a", "b"]}


def test_a_model_without_hashes_has_seen_nothing(tmp_path: Path) -> None:
    assert read_training_hashes(tmp_path) == frozenset()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"hashes": "a"}', '{"hashes": [1]}'])
def test_damaged_hashes_are_an_error_not_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "training_hashes.json").write_text(text)
    with pytest.raises(DataError, match=r'training_hashes\.json must hold {"hashes": \[\.\.\.\]}'):
        read_training_hashes(tmp_path)
