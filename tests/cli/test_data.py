"""`flanmoe data` through the command line: bad input of every kind is named, and stops nothing else."""

import json
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flanmoe.cli.main import invoke
from flanmoe.core.console import console

ObjectOf = Callable[[list[str]], dict[str, Any]]
Refused = Callable[[list[str]], dict[str, Any]]

SUM = {"id": "sum", "question": "1 + 1?", "answer": "2"}
GOOD = {"id": "good", "question": "Which way is up?", "answer": "That way."}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is read of large files out of the user's cache."""
    monkeypatch.setenv("FLANMOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that finds something wrong, with --json; returns what it tells machines."""

    def run(arguments: list[str]) -> dict[str, Any]:
        capfd.readouterr()
        assert invoke([*arguments, "--json"]) == 2
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        told = json.loads(printed.out)
        assert told["exit_status"] == 2
        assert printed.err.splitlines()[-1] == f"Error: {told['error']}"
        return told

    return run


def write_lines(path: Path, *lines: bytes) -> str:
    """Write lines as they are, and return the file's name."""
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def as_line(row: dict[str, Any]) -> bytes:
    """One record as a line of JSON."""
    return json.dumps(row).encode()


def write_recipe(
    folder: Path, model: Path, tuned: list[Any], evaluated: list[Any], **evaluate: Any
) -> str:
    """Write a recipe that tunes on some tasks and scores on others."""
    stages: list[dict[str, Any]] = [{"stage": "tune", "data": {"tasks": tuned}}]
    if evaluated:
        stages.append({"stage": "evaluate", "tasks": evaluated, **evaluate})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "model": str(model), "stages": stages}))
    return str(path)


def _no_target(folder: Path) -> tuple[str, str, str]:
    rows = write_lines(folder / "rows.jsonl", as_line(SUM), b'{"question": "2 + 2?"}')
    return rows, "rejected", f"{rows}:2: the record has no target"


def _not_json(folder: Path) -> tuple[str, str, str]:
    rows = write_lines(folder / "rows.jsonl", as_line(SUM), b'{"question": ', as_line(GOOD))
    return rows, "rejected", f"{rows}:2: the line is not valid JSON (Expecting value, column "


def _not_utf_8(folder: Path) -> tuple[str, str, str]:
    rows = write_lines(folder / "rows.jsonl", as_line(SUM), b'{"question": "\xff?", "answer": "2"}')
    return rows, "rejected", f"{rows}:2: the line must be UTF-8 text, but byte 14 of it is not"


def _torn_gzip(folder: Path) -> tuple[str, str, str]:
    # Draws are hard to compress; a reader unpacks far less at once than comes before the damage.
    draws = random.Random(0)
    lines = [{"question": str(draws.getrandbits(800)), "answer": "x"} for _ in range(4000)]
    packing = zlib.compressobj(wbits=31)
    packed = b"".join(packing.compress(as_line(row) + b"\n") for row in lines)
    packed += packing.flush(zlib.Z_FULL_FLUSH)
    # The next block is of no known type.
    (folder / "rows.jsonl.gz").write_bytes(packed + b"\xff" * 1000)
    rows = str(folder / "rows.jsonl.gz")
    return rows, "rejected", f"{rows}:LINE: the gzip stream is broken"


def as_pattern(place: str) -> str:
    """The place as a regular expression; LINE in it stands for a line in the file's second half."""
    return re.escape(place).replace("LINE", "(2[0-9]{3}|3[0-9]{3}|4000)")


def assert_says(said: str, place: str) -> None:
    """What is said must begin with the place."""
    assert re.match(as_pattern(place), said), said


BAD_INPUT = [_no_target, _not_json, _not_utf_8, _torn_gzip]


@pytest.mark.parametrize("make", BAD_INPUT)
def test_validate_names_what_is_wrong_and_goes_on_with_the_next_task(
    make: Callable[[Path], tuple[str, str, str]], base: Path, tmp_path: Path, refused: Refused
) -> None:
    rows, kind, place = make(tmp_path)
    next_rows = write_lines(tmp_path / "next.jsonl", as_line(GOOD), as_line(GOOD))
    told = refused(["data", "validate", write_recipe(tmp_path, base, [rows, next_rows], [])])
    found = {(finding["kind"], finding["task"]): finding for finding in told["findings"]}
    assert found.keys() == {(kind, rows), ("duplicates", next_rows)}
    (detail,) = found[kind, rows]["details"]
    assert_says(detail, place)
    assert told["examples"][next_rows] == 2
    assert {name: number for name, number in told["counts"].items() if number} == {
        kind: 1,
        "duplicates": 1,
    }
    assert told["clean"] is False


@pytest.mark.parametrize("make", BAD_INPUT)
@pytest.mark.parametrize("verb", ["stats", "preview"])
def test_looking_at_a_bad_file_names_the_place(
    verb: str,
    make: Callable[[Path], tuple[str, str, str]],
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows, _, place = make(tmp_path)
    assert invoke(["data", verb, rows, "--model", str(base)]) == 0
    said = capfd.readouterr().err
    assert re.search(r"[\d,]+ examples, 1 rejected", said)
    # Previews list them, counts are enough for statistics.
    assert bool(re.search(as_pattern(place), said)) == (verb == "preview")


@pytest.mark.parametrize("verb", ["stats", "preview"])
def test_a_file_that_cannot_be_read_at_all_is_an_error(
    verb: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.parquet"
    rows.write_bytes(b"no columns")
    assert invoke(["data", verb, str(rows), "--model", str(base)]) == 2
    assert str(rows) in capfd.readouterr().err.splitlines()[-1]


def test_validate_of_clean_data_exits_with_0(
    base: Path, tmp_path: Path, object_of: ObjectOf, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", as_line(SUM), as_line(GOOD))
    arguments = ["data", "validate", rows, "--model", str(base)]
    told = object_of(arguments)
    assert (told["clean"], told["findings"], told["examples"]) == (True, [], {rows: 2})
    assert invoke(arguments) == 0
    assert "2 examples of 1 task were checked: nothing is wrong" in capfd.readouterr().err


def test_validate_says_in_one_sentence_what_is_wrong(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", as_line(SUM), as_line(SUM), b'{"question": "3?"}')
    assert invoke(["data", "validate", rows, "--model", str(base), "--length", "8"]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == (
        "Error: The data must be clean, but has 1 record that cannot be used, 1 example that repeats one of "
        "its task and 2 examples longer than a row. Each is listed above; `--json` lists it too."
    )


@pytest.mark.slow
def test_a_record_of_ten_megabytes_is_read_and_called_too_long(
    base: Path, tmp_path: Path, refused: Refused
) -> None:
    size = 10 * 2**20
    large = as_line({"id": "large", "question": "long " * (size // 5), "answer": "yes"})
    rows = write_lines(tmp_path / "rows.jsonl", as_line(SUM), large)
    tracemalloc.start()
    try:
        told = refused(["data", "validate", rows, "--model", str(base)])
        # The text stands in the line, the record, the example and the prompt. Its tokens with their places
        # would take a hundred times as much.
        assert tracemalloc.get_traced_memory()[1] < 24 * size
    finally:
        tracemalloc.stop()
    (finding,) = told["findings"]
    assert (finding["kind"], finding["number"]) == ("too_long", 1)
    tokens = re.match(r"`large`: ([\d,]+) tokens, a row 1,024", finding["details"][0])
    assert tokens is not None
    # One token a character, and a few for the turns.
    assert 0 <= int(tokens[1].replace(",", "")) - size < 200


def test_a_long_record_is_shown_in_part(
    base: Path, tmp_path: Path, object_of: ObjectOf, capfd: pytest.CaptureFixture[str]
) -> None:
    large = as_line({"question": "first " + "long " * 2**17 + "last", "answer": "yes"})
    rows = write_lines(tmp_path / "rows.jsonl", large)
    arguments = ["data", "preview", rows, "--model", str(base)]
    (task,) = object_of(arguments)["tasks"].values()
    assert len(task["examples"][0]["prompt"]) > 5 * 2**17
    assert invoke(arguments) == 0
    said = capfd.readouterr().err
    assert len(said) < 10_000
    assert "first long" in said
    assert "characters are not shown; `--json` has all" in said
    assert "last<|im_end|>" in said


@pytest.mark.parametrize("rate", [0, -0.5])
@pytest.mark.parametrize("verb", ["stats", "validate", "preview"])
def test_a_rate_that_is_not_positive_is_named_with_its_path(
    verb: str, rate: float, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", as_line(SUM))
    recipe = write_recipe(tmp_path, base, [{"name": rows, "rate": rate}], [])
    assert invoke(["data", verb, recipe]) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert first == f"Error: {recipe} has 1 problem:"
    assert second.strip().startswith(
        "stages.0.tune.data.tasks.0.rate: Input should be greater than 0"
    )
    assert f"but is {rate}" in second


def test_a_limit_larger_than_its_sets_asks_every_question_once(
    base: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    tuned = write_lines(tmp_path / "tuned.jsonl", as_line(GOOD))
    asked = write_lines(tmp_path / "asked.jsonl", as_line(SUM), as_line({**SUM, "question": "2?"}))
    recipe = write_recipe(tmp_path, base, [tuned], [asked], limit=1000)
    of_tuning, of_evaluation = object_of(["data", "stats", recipe])["groups"]
    assert (of_tuning["use"], of_tuning["totals"]["asked"]) == ("tuned", None)
    assert of_evaluation["tasks"][asked]["asked"] == 2
    assert object_of(["data", "validate", recipe])["clean"]


def test_a_task_tuned_on_and_evaluated_is_found(
    base: Path, tmp_path: Path, refused: Refused
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", as_line(SUM), as_line(GOOD))
    told = refused(["data", "validate", write_recipe(tmp_path, base, [rows], [rows])])
    found = {finding["kind"]: finding for finding in told["findings"]}
    assert found.keys() == {"tuned_and_evaluated", "overlap"}
    assert found["tuned_and_evaluated"]["details"] == [f"it is scored on as {rows}"]
    assert found["overlap"]["number"] == 2
    (pair,) = told["overlap"]["pairs"]
    assert pair["evaluated"] == {"exact": 2, "whole": 0, "ngram": 0}


def test_stats_answers_with_counts_lengths_and_bins(
    base: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", as_line(SUM), as_line(GOOD), b'{"question": "3?"}')
    (group,) = object_of(["data", "stats", rows, "--model", str(base), "--length", "40"])["groups"]
    assert (group["use"], group["packing_length"], group["where"]) == ("named", 40, [])
    task = group["tasks"][rows]
    shown = object_of(["data", "preview", rows, "--model", str(base)])["tasks"][rows]["examples"]
    tokens = [example["tokens"] for example in shown]
    assert (task["examples"], task["rejected"], task["measured"]) == (2, 1, 2)
    assert task["tokens"]["mean"] == sum(tokens) / 2
    assert task["tokens"]["maximum"] == max(tokens)
    assert task["response_tokens"]["maximum"] == max(example["loss_tokens"] for example in shown)
    assert task["longer"] == sum(number > 40 for number in tokens)
    assert sum(each["number"] for each in task["histogram"]) == 2
    assert (task["share"], task["rate"], task["is_sample"]) == (None, None, False)


def test_a_sample_is_told(base: Path, tmp_path: Path, object_of: ObjectOf) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", *[as_line(SUM)] * 5)
    arguments = ["data", "stats", rows, "--model", str(base), "--limit", "2"]
    (group,) = object_of(arguments)["groups"]
    task = group["tasks"][rows]
    assert (task["examples"], task["measured"], task["is_sample"]) == (5, 2, True)
    assert group["totals"]["is_sample"]


@pytest.mark.parametrize("verb", ["stats", "validate"])
@pytest.mark.parametrize("option", ["--split", "--model", "--length"])
def test_what_a_recipe_says_itself_is_refused_beside_it(
    verb: str, option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    assert invoke(["data", verb, str(file), option, "64"]) == 2
    assert capfd.readouterr().err == (
        f"Error: `{option}` has no effect beside the file {file}, which names its own. Leave it out.\n"
    )


def test_preview_marks_prompt_and_loss_in_plain_text(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(
        tmp_path / "rows.jsonl", *[as_line({**SUM, "id": f"s{at}"}) for at in range(12)]
    )
    assert invoke(["data", "preview", rows, "--model", str(base)]) == 0
    said = capfd.readouterr().err
    assert said.count("--- s") == 10
    assert "[prompt]\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n" in said
    assert "[response, with loss]\n2<|im_end|>\n" in said


def test_preview_frames_and_colours_on_a_terminal(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_color_system", 1)
    rows = write_lines(tmp_path / "rows.jsonl", as_line(SUM))
    assert invoke(["data", "preview", rows, "--model", str(base)]) == 0
    said = capfd.readouterr().err
    assert "╭" in said
    assert "\x1b[1;32m2<|im_end|>" in said
    assert "\x1b[2m1 + 1?<|im_end|>" in said


def test_all_rejected_records_are_shown_when_asked_for(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [b'{"question": "3?"}'] * 14
    rows = write_lines(tmp_path / "rows.jsonl", as_line(SUM), *lines)
    arguments = ["data", "preview", rows, "--model", str(base)]
    assert invoke(arguments) == 0
    said = capfd.readouterr().err
    assert said.count("rejected: ") == 10
    assert "and 4 more; `--json` lists all, `--all-rejected` shows all\n" in said
    assert invoke([*arguments, "--all-rejected"]) == 0
    said = capfd.readouterr().err
    assert said.count("rejected: ") == 14
    assert f"rejected: {rows}:15: the record has no target" in said
    assert "more;" not in said


@pytest.mark.parametrize("verb", ["preview", "stats", "validate"])
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["data", verb, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"Example: flanmoe data {verb}" in said
