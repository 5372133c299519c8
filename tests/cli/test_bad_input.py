"""Bad input through the command line: one clear sentence, exit status 2, nothing written, no traceback."""

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BertConfig, T5Config

from flanmoe.cli.main import invoke
from flanmoe.study import plan
from flanmoe.study.machine import Machine

Rows = list[dict[str, Any]]


def write_study(folder: Path, base: Path, task: Any, **train: Any) -> Path:
    """Write a study of one arm that tunes on one task."""
    settings = {"length": 64, "steps": 1, "rows_per_step": 1, **train}
    stage = {
        "stage": "tune",
        "data": {"tasks": [task]},
        "packing": {"length": 64, "window": 4, "on_too_long": "error"},
        "train": settings,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "bad", "model": str(base), "stages": [stage]}))
    return path


def _missing(folder: Path) -> str:
    return str(folder / "missing.jsonl")


def _empty(folder: Path) -> str:
    (folder / "empty.jsonl").write_text("")
    return str(folder / "empty.jsonl")


def _no_target(folder: Path) -> str:
    (folder / "rows.jsonl").write_text(
        '{"question": "1+1?", "answer": "2"}\n{"question": "2+2?"}\n'
    )
    return str(folder / "rows.jsonl")


def _not_json(folder: Path) -> str:
    (folder / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": \n')
    return str(folder / "rows.jsonl")


def _torn_gzip(folder: Path) -> str:
    whole = gzip.compress(json.dumps({"question": "1+1?", "answer": "2"}).encode() * 50)
    (folder / "rows.jsonl.gz").write_bytes(whole[:-12])
    return str(folder / "rows.jsonl.gz")


def _damaged_parquet(folder: Path) -> str:
    (folder / "rows.parquet").write_bytes(b"PAR1" + bytes(64))
    return str(folder / "rows.parquet")


def _binary(folder: Path) -> str:
    (folder / "rows.jsonl").write_bytes(
        b'{"question": "1+1?", "answer": "2"}\n\x89PNG\r\n\x1a\n\xff'
    )
    return str(folder / "rows.jsonl")


def _unknown_task(folder: Path) -> str:
    return "exemplars/gsm8k_cott"


def _evaluation_only(folder: Path) -> str:
    return "exemplars/bbh/snarks"


@pytest.mark.parametrize(
    ("make", "sentences"),
    [
        (_missing, ["The file {folder}/missing.jsonl does not exist. Check the path."]),
        (_empty, ["{folder}/empty.jsonl", "must hold at least one example", "has 0 records"]),
        (_no_target, ["{folder}/rows.jsonl:2: the record has no target"]),
        (
            _not_json,
            ["{folder}/rows.jsonl:2: the line is not valid JSON (Expecting value, column "],
        ),
        (_torn_gzip, ["{folder}/rows.jsonl.gz:1: the gzip stream is broken"]),
        (_damaged_parquet, ["The file {folder}/rows.parquet cannot be read as parquet: "]),
        (_binary, ["{folder}/rows.jsonl:2: the line must be UTF-8 text, but byte 0 of it is not"]),
        (_unknown_task, ["exemplars/gsm8k_cott", "Did you mean `exemplars/gsm8k_cot`?"]),
        (_evaluation_only, ["exemplars/bbh/snarks", "evaluat"]),
    ],
)
def test_bad_data_is_named_before_anything_runs(
    make: Callable[[Path], str],
    sentences: list[str],
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    study = write_study(tmp_path, base, {"name": make(tmp_path)})
    expected = [sentence.format(folder=tmp_path) for sentence in sentences]
    _assert_one_sentence(["plan", str(study)], capfd, expected)


@pytest.mark.slow
def test_a_run_on_bad_data_writes_nothing(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, base, {"name": _no_target(tmp_path)})
    arguments = ["run", str(study), "--out", str(tmp_path / "out")]
    _assert_one_sentence(arguments, capfd, [f"{tmp_path}/rows.jsonl:2: the record has no target"])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
@pytest.mark.parametrize("name", ["rows.jsonl", "sums"])
def test_a_folder_that_may_not_be_read_is_named(
    name: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    task = str(closed / name) if name.endswith(".jsonl") else name
    study = write_study(tmp_path, base, {"name": task})
    closed.chmod(0)
    try:
        _assert_one_sentence(
            ["plan", str(study), "--data-dir", str(closed)],
            capfd,
            [f"{closed}", "cannot be read: Permission denied"],
        )
    finally:
        closed.chmod(0o700)


@pytest.mark.parametrize(
    ("task", "hint"),
    [
        ({"name": "exemplars/bbh/snark"}, "Did you mean `exemplars/bbh/snarks`?"),
        ({"name": "sums", "split": "tset"}, "Did you mean `test`?"),
        ({"name": "sum", "split": "test"}, "Did you mean `sums`?"),
    ],
)
def test_a_mistaken_evaluation_task_is_named_before_anything_runs(
    task: dict[str, str],
    hint: str,
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    study = _write_evaluation(tmp_path, base, ["exemplars/bbh/navigate", task])
    arguments = ["plan", str(study), "--data-dir", str(tmp_path / "data")]
    _assert_one_sentence(arguments, capfd, [task["name"], hint])


@pytest.mark.parametrize("verb", ["plan", pytest.param("run", marks=pytest.mark.slow)])
def test_a_limit_below_the_number_of_tasks_is_named_before_anything_runs(
    verb: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = _write_evaluation(tmp_path, base, ["exemplars/bbh/navigate", "exemplars/bbh/snarks"])
    out = [] if verb == "plan" else ["--out", str(tmp_path / "out")]
    arguments = [verb, str(study), "--set", "stages.0.limit=1", *out]
    sentence = "`limit` must be at least one example for each of the 2 tasks, but is 1."
    _assert_one_sentence(arguments, capfd, [sentence])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_optional_task_without_data_is_warned_of_once(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = ["exemplars/bbh/navigate", {"name": "gone", "optional": True}]
    study = _write_evaluation(tmp_path, base, tasks)
    out = tmp_path / "out"
    arguments = ["run", str(study), "--out", str(out), "--data-dir", str(tmp_path / "data")]
    assert invoke(arguments) == 0
    said = capfd.readouterr().err
    assert said.count("The task `gone` is left out of the averages.") == 1
    (scores,) = out.rglob("scores.json")
    result = json.loads(scores.read_text())
    assert result["partial"]
    assert [skip["task"] for skip in result["skipped"]] == ["gone"]


def _write_evaluation(folder: Path, base: Path, tasks: list[Any]) -> Path:
    """Write a study that only scores, and a data folder with the task `sums`."""
    (folder / "data" / "sums").mkdir(parents=True)
    (folder / "data" / "sums" / "test.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    stages = [{"stage": "evaluate", "tasks": tasks}]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "scores", "model": str(base), "stages": stages}))
    return path


def test_an_unknown_key_is_named_with_its_path_and_the_nearest_one(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, base, "exemplars/gsm8k_cot", learning_rat=1e-4, rows_per_step=-1)
    lines = _assert_listing(["plan", str(study)], capfd)
    assert lines[0].startswith(f"Error: {study} has ")
    unknown = "unknown key `learning_rat`. Did you mean `learning_rate`?"
    problems = [line.split(": ", 1) for line in lines[1:]]
    assert [path.strip() for path, _ in problems] == [
        "stages.0.tune.train.rows_per_step",
        "stages.0.tune.train.learning_rat",
    ]
    assert any(sentence.startswith(unknown) for _, sentence in problems), lines


def test_a_model_that_writes_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "bert"
    )
    study = write_study(tmp_path, tmp_path / "bert", "exemplars/gsm8k_cot")
    _assert_one_sentence(["plan", str(study)], capfd, ["causal language model", "`bert`"])


def test_an_encoder_decoder_without_a_length_of_targets(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=32).save_pretrained(
        tmp_path / "t5"
    )
    study = write_study(tmp_path, tmp_path / "t5", "exemplars/gsm8k_cot")
    _assert_one_sentence(["plan", str(study)], capfd, ["An encoder-decoder needs `target_length`"])


@pytest.mark.slow
def test_a_text_longer_than_a_row(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "x" * 500, "answer": "y"}) + "\n")
    study = write_study(tmp_path, base, {"name": str(tmp_path / "long.jsonl")})
    arguments = ["run", str(study), "--out", str(tmp_path / "out")]
    _assert_one_sentence(arguments, capfd, ["long.jsonl", "64"], after="Arm bad, seed 0")


def test_upcycling_into_a_folder_that_holds_files(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    expected = [
        f"The folder {tmp_path} must be empty or new, but already holds files. Name another one as OUT."
    ]
    _assert_one_sentence(["upcycle", str(base), str(tmp_path)], capfd, expected)
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_evaluating_into_a_folder_that_holds_files(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    arguments = ["eval", str(base), "--suite", "held-out", "--out", str(tmp_path)]
    expected = ["must be empty or new, but already holds files. Name another one with `--out`."]
    _assert_one_sentence(arguments, capfd, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_folder_that_is_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _assert_one_sentence(["report", str(tmp_path)], capfd, ["is not a run folder"])


@pytest.mark.parametrize(
    ("room", "reasons"),
    [
        (
            {"memory_bytes": 3 * 2**20},
            [
                r"Arm `bad` needs about [\d.]+ [MG]iB of memory, but 3\.0 MiB are free; lower `train\.length`"
            ],
        ),
        (
            {"disk_bytes": 2**17},
            [r"The arms need about [\d.]+ MiB of disk, but 0\.1 MiB are free; name a folder"],
        ),
        (
            {"memory_bytes": 0, "disk_bytes": 0},
            [r"of memory, but 0\.0 MiB are free", r"of disk, but 0\.0 MiB are free"],
        ),
    ],
    ids=["memory", "disk", "both"],
)
def test_a_plan_that_does_not_fit_is_refused_with_reasons(
    room: dict[str, int],
    reasons: list[str],
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = {"cores": 1, "memory_bytes": 2**50, "disk_bytes": 2**50, "flops_per_second": 1e9}
    small = Machine(**{**machine, **room})
    monkeypatch.setattr(plan, "this_machine", lambda folder, precision: small)
    study = write_study(tmp_path, base, "exemplars/gsm8k_cot")

    assert invoke(["plan", str(study)]) == 2
    printed = capfd.readouterr()
    sentence = printed.err.splitlines()[-1]
    assert sentence.startswith("Error: This will not fit: ")
    assert all(re.search(reason, sentence) for reason in reasons), sentence
    assert printed.out == ""

    assert invoke(["plan", str(study), "--json"]) == 2
    told = json.loads(capfd.readouterr().out)
    assert len(told["refusals"]) == len(reasons)
    assert told["error"] == sentence.removeprefix("Error: ")
    assert told["exit_status"] == 2
    assert told["arms"]["bad"]["parameters"]["total"] > 0


def test_a_plan_that_fits_names_no_error(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, base, "exemplars/gsm8k_cot")
    assert invoke(["plan", str(study), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["refusals"] == []
    assert not {"error", "exit_status"} & told.keys()


def _refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Run a command that is the user's mistake, and return what it says line by line."""
    capfd.readouterr()
    status = invoke(arguments)
    printed = capfd.readouterr()
    assert status == 2, printed.err
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err.splitlines()


def _assert_one_sentence(
    arguments: list[str],
    capfd: pytest.CaptureFixture[str],
    sentences: list[str],
    *,
    after: str | None = None,
) -> None:
    """Nothing but one line on stderr; where work had begun, `after` is the last line before it."""
    lines = _refused(arguments, capfd)
    if after is not None:
        assert after in lines[:-1]
        lines = lines[-1:]
    (line,) = lines
    assert line.startswith("Error: ")
    assert all(sentence in line for sentence in sentences), line


def _assert_listing(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> list[str]:
    """A configuration with several problems: how many, then one line each with its dotted path."""
    lines = _refused(arguments, capfd)
    counted = re.fullmatch(r"Error: .+ has (\d+) problems?:", lines[0])
    assert counted is not None, lines
    assert len(lines) == 1 + int(counted[1])
    assert all(re.match(r"  [\w.-]+: \S", line) for line in lines[1:]), lines
    return lines
