"""Finished requests on disk: what is kept, what is refused."""

from pathlib import Path

import pytest

from flanmoe.core.errors import RunError
from flanmoe.evaluation.lm.journal import Journal, request_key


def test_what_was_added_is_there_after_opening_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "requests.jsonl"
    exact = 0.1 + 0.2
    with Journal(path, identity={"model": "a"}) as journal:
        journal.add([("one", [exact, True]), ("two", "an answer\n")])
    with Journal(path, identity={"model": "a"}) as journal:
        assert journal.known(["two", "one"]) == ["an answer\n", [exact, True]]
        assert journal.known(["one", "three"]) is None
        assert len(journal) == 2
        journal.add([("three", "")])
    with Journal(path, identity={"model": "a"}) as journal:
        assert journal.known(["three"]) == [""]


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    with Journal(path, identity={}) as journal:
        journal.add([("one", 1), ("two", 2)])
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with Journal(path, identity={}) as journal:
            kept = len(journal)
            journal.add([("last", 3)])
        with Journal(path, identity={}) as journal:
            assert journal.known(["last"]) == [3]
            assert len(journal) == kept + 1


def test_another_evaluation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    Journal(path, identity={"model": "a", "precision": "float32", "limit": 3}).close()
    with pytest.raises(RunError, match="but differ in limit, model"):
        Journal(path, identity={"model": "b", "precision": "float32"})


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("not JSON\n")
    with pytest.raises(RunError, match="one JSON object a line, but cannot be read"):
        Journal(path, identity={})


def test_without_a_file_answers_stay_in_memory() -> None:
    journal = Journal()
    journal.add([("one", 1)])
    assert journal.known(["one"]) == [1]


def test_keys_tell_requests_apart() -> None:
    keys = [
        request_key("score", (1, 2), 1),
        request_key("score", (1, 2), 2),
        request_key("write", (1, 2), 1),
        request_key("score", (12,), 1),
    ]
    assert len(set(keys)) == 4
    assert request_key("score", (1, 2), 1) == keys[0]
