"""Everything that can be wrong with data, planted; and nothing found where nothing is."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flanmoe.study.data_check import check_data
from flanmoe.study.data_findings import DataCheck, Finding, show_check
from flanmoe.study.data_groups import group_of_task, groups_of_file

Rows = Sequence[dict[str, Any]]
WriteRows = Callable[..., str]
PACKING_LENGTH = 256


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write a file of records and return its name."""

    def write(name: str, rows: Rows) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def check(tmp_path: Path, base: Path) -> Callable[..., DataCheck]:
    """Check a study that tunes and scores on some tasks."""

    def run(
        tuned: list[Any],
        evaluated: list[Any],
        *,
        suite: Any = None,
        limit: int | None = None,
        **data: Any,
    ) -> DataCheck:
        tune = {
            "stage": "tune",
            "data": {"tasks": tuned, **data},
            "packing": {"length": PACKING_LENGTH},
            "train": {"length": PACKING_LENGTH},
        }
        stages = [tune, {"stage": "evaluate", "tasks": evaluated, **(suite or {})}]
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps({"name": "s", "model": str(base), "stages": stages}))
        return check_data(groups_of_file(path), limit=limit, data_dir=None)

    return run


def rows_of(*questions: str, answer: str = "yes") -> list[dict[str, str]]:
    """Records that ask these questions."""
    return [{"id": question, "question": question, "answer": answer} for question in questions]


def numbered(first: int, number: int = 13) -> str:
    """So many words, none of them twice."""
    return " ".join(f"word{at}" for at in range(first, first + number))


def findings(check: DataCheck) -> dict[str, Finding]:
    """The findings by their kind, of which there is one each."""
    found = {finding.kind: finding for finding in check.findings}
    assert len(found) == len(check.findings)
    return {str(kind): finding for kind, finding in found.items()}


def test_clean_data_is_said_to_be_clean(
    write_rows: WriteRows, check: Callable[..., DataCheck], capfd: pytest.CaptureFixture[str]
) -> None:
    tuned, asked = write_rows("tuned", rows_of("a?", "b?")), write_rows("asked", rows_of("c?"))
    found = check([tuned], [asked])
    assert found.findings == []
    assert found.summary is None
    assert found.examples == {tuned: 2, asked: 1}
    assert found.overlap is not None
    assert found.overlap.pairs == ()
    assert found.to_mapping()["clean"]
    assert not any(found.counts.values())
    show_check(found)
    assert capfd.readouterr().err.endswith("3 examples of 2 tasks were checked: nothing is wrong\n")


def test_everything_is_found_in_one_go(
    write_rows: WriteRows, check: Callable[..., DataCheck], tmp_path: Path
) -> None:
    mixed = write_rows("mixed", [*rows_of("a?", "b?", "A?"), {"question": "c?"}, {"color": "red"}])
    long = write_rows("long", rows_of("x" * 300, "short?"))
    empty, hopeless = write_rows("empty", []), write_rows("hopeless", [{"question": "d?"}])
    broken, torn = str(tmp_path / "broken.parquet"), write_rows("torn", rows_of("e?"))
    Path(broken).write_bytes(b"no columns")
    with Path(torn).open("a") as stream:
        stream.write('{"question":\n')
    missing = str(tmp_path / "missing.jsonl")
    asked = write_rows("asked", rows_of("b?"))
    found = check([mixed, long, empty, hopeless, broken, torn, missing], [asked])
    assert found.counts == {
        "missing": 1,
        "unreadable": 1,
        "rejected": 4,
        "empty": 2,
        "duplicates": 1,
        "too_long": 1,
        "not_rendered": 0,
        "settings": 0,
        "tuned_and_evaluated": 0,
        "overlap": 1,
    }
    assert found.examples == {mixed: 3, long: 2, empty: 0, hopeless: 0, torn: 1, asked: 1}
    by_task = {(finding.kind, finding.task): finding for finding in found.findings}
    rejected = by_task["rejected", mixed].details
    assert [reason.split(": ")[0] for reason in rejected] == [f"{mixed}:4", f"{mixed}:5"]
    assert by_task["duplicates", mixed].details == ("`A?` asks and answers the same as `a?`",)
    (longer,) = by_task["too_long", long].details
    assert longer.startswith(f"`{'x' * 300}`: ")
    assert longer.endswith("tokens, a row 256")
    assert by_task["empty", empty].details[0].endswith("but it has 0 records.")
    assert by_task["empty", hopeless].details[0].endswith("but all of its 1 records are rejected.")
    assert broken in by_task["unreadable", broken].details[0]
    assert f"{torn}:2: the line is not valid JSON" in by_task["rejected", torn].details[0]
    assert by_task["missing", missing].details == (
        f"The file {missing} does not exist. Check the path.",
    )
    assert by_task["overlap", mixed].details == (
        f"1 of {mixed} with 1 of {asked}: 1 exact, 0 whole, 0 by 13 words in a row",
        "`b?` and `b?` (exact): b yes",
    )
    assert found.summary == (
        "The data must be clean, but has 1 task that cannot be found, 1 file that cannot be read, "
        "4 records that cannot be used, 2 tasks without an example, 1 example that repeats one of its task, "
        "1 example longer than a row and 1 tuned example that overlaps with an evaluated one. Each is listed "
        "above; `--json` lists it too."
    )


def test_a_task_tuned_on_and_scored_on_is_named_however_it_is_rendered(
    write_rows: WriteRows, check: Callable[..., DataCheck]
) -> None:
    rows = write_rows("rows", rows_of("a?", "b?"))
    found = findings(check([{"name": rows, "renderer": "direct"}], [rows]))
    assert set(found) == {"tuned_and_evaluated", "overlap"}
    assert found["tuned_and_evaluated"].task == f"{rows}@direct"
    assert found["tuned_and_evaluated"].details == (f"it is scored on as {rows}",)
    assert found["overlap"].number == 2


def test_the_same_name_with_another_split_is_no_mistake(
    check: Callable[..., DataCheck], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, question in (("train", "a?"), ("test", "b?")):
        (tmp_path / "data" / "sums").mkdir(parents=True, exist_ok=True)
        path = tmp_path / "data" / "sums" / f"{split}.jsonl"
        path.write_text(json.dumps(rows_of(question)[0]) + "\n")
    monkeypatch.setenv("FLANMOE_DATA", str(tmp_path / "data"))
    assert check(["sums"], [{"name": "sums", "split": "test"}]).findings == []


def test_thirteen_words_in_a_row_are_an_overlap(
    write_rows: WriteRows, check: Callable[..., DataCheck]
) -> None:
    tuned = write_rows("tuned", rows_of(f"{numbered(0)} so", numbered(50), f"{numbered(80, 12)}"))
    asked = write_rows(
        "asked", rows_of(f"And {numbered(0).upper()}?", numbered(80, 12), answer="no")
    )
    found = findings(check([tuned], [asked]))
    assert set(found) == {"overlap"}
    assert found["overlap"].number == 1
    assert found["overlap"].details[1].endswith(f"(ngram): {numbered(0)}")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"maximum_per_task": 3}, "have no effect in a mixture with rates"),
        ({"held_out": ["nowhere"]}, "`held_out` must name clusters or tasks of the mixture"),
    ],
)
def test_a_mixture_that_would_be_refused_is_found(
    data: dict[str, Any], sentence: str, write_rows: WriteRows, check: Callable[..., DataCheck]
) -> None:
    tuned = write_rows("tuned", rows_of("a?"))
    found = findings(
        check([{"name": tuned, "rate": 1}], [write_rows("asked", rows_of("b?"))], **data)
    )
    assert set(found) == {"settings"}
    assert found["settings"].task == "s/tune"
    assert sentence in found["settings"].details[0]


def test_what_may_only_be_scored_on_is_found_in_a_mixture(
    write_rows: WriteRows, check: Callable[..., DataCheck]
) -> None:
    found = check(["exemplars/bbh/snarks"], [write_rows("asked", rows_of("b?"))])
    assert found.counts["settings"] == 1
    assert any(
        "is for evaluation only" in finding.details[0]
        for finding in found.findings
        if finding.kind == "settings"
    )


def test_a_limit_below_the_number_of_tasks_is_found(
    write_rows: WriteRows, check: Callable[..., DataCheck]
) -> None:
    asked = [write_rows("asked", rows_of("b?")), write_rows("more", rows_of("c?"))]
    tuned = write_rows("tuned", rows_of("a?"))
    found = findings(check([tuned], asked, suite={"limit": 1}))
    assert set(found) == {"settings"}
    assert found["settings"].task == "s/evaluate"
    assert "for each of the 2 tasks, but is 1" in found["settings"].details[0]


def test_an_optional_task_that_is_not_there_is_a_note(
    write_rows: WriteRows, check: Callable[..., DataCheck], tmp_path: Path
) -> None:
    asked = [
        write_rows("asked", rows_of("b?")),
        {"name": str(tmp_path / "x.jsonl"), "optional": True},
    ]
    found = check([write_rows("tuned", rows_of("a?"))], asked)
    assert found.findings == []
    (note,) = found.notes
    assert "is optional and left out. The file " in note


def test_a_task_that_cannot_be_rendered_is_found(
    write_rows: WriteRows, check: Callable[..., DataCheck]
) -> None:
    task = {"name": write_rows("tuned", rows_of("a?", "b?")), "template": {"family": "entailment"}}
    found = findings(check([task], [write_rows("asked", rows_of("c?"))]))
    assert set(found) == {"not_rendered"}
    assert found["not_rendered"].number == 2
    assert found["not_rendered"].details[0].startswith("`a?`: ")


def test_a_family_of_templates_that_is_not_there_is_found_once(
    write_rows: WriteRows, check: Callable[..., DataCheck]
) -> None:
    task = {"name": write_rows("tuned", rows_of("a?", "b?")), "template": {"family": "nowhere"}}
    found = findings(check([task], [write_rows("asked", rows_of("c?"))]))
    assert set(found) == {"settings"}
    assert found["settings"].number == 1
    assert "`nowhere`" in found["settings"].details[0]


def test_lengths_of_a_sample_are_said_to_be_of_one(
    write_rows: WriteRows, check: Callable[..., DataCheck]
) -> None:
    questions = [f"question {at}" for at in range(20)]
    tuned = write_rows("tuned", rows_of(*questions, *("y" * (300 + at) for at in range(20))))
    every = check([tuned], [write_rows("asked", rows_of("b?"))])
    some = check([tuned], [write_rows("asked", rows_of("b?"))], limit=30)
    assert every.counts["too_long"] == 20
    assert len(findings(every)["too_long"].details) == 5
    assert every.notes == []
    # Half of 40 are too long, so between 10 and 20 of any 30.
    assert 10 <= some.counts["too_long"] <= 20
    assert some.notes == [f"{tuned}: the length of 30 of 40 was checked."]


def test_every_rejected_record_is_listed(
    write_rows: WriteRows, base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows("rows", [*rows_of("a?"), *[{"question": "b?"}] * 25])
    group = group_of_task(rows, split=None, model=str(base), packing_length=PACKING_LENGTH)
    found = check_data([group], limit=None, data_dir=None)
    assert found.overlap is None
    assert len(findings(found)["rejected"].details) == 25
    show_check(found)
    said = capfd.readouterr().err
    assert [f"  {rows}:{line}: the record has no target" in said for line in range(2, 27)] == [
        True
    ] * 25


def test_of_many_repeats_the_first_are_shown(
    write_rows: WriteRows, base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows("rows", rows_of(*["a?"] * 9))
    group = group_of_task(rows, split=None, model=str(base), packing_length=PACKING_LENGTH)
    found = check_data([group], limit=None, data_dir=None)
    assert found.counts["duplicates"] == 8
    show_check(found)
    said = capfd.readouterr().err
    assert f"{rows}: 8 examples that repeat one of their task\n" in said
    assert said.count("asks and answers the same as") == 5
    assert "  and 3 more\n" in said
