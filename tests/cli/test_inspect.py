"""`flanmoe inspect` on the command line: its JSON, its help, and the sentences of its refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.cli.main import invoke

ObjectOf = Callable[[list[str]], dict[str, Any]]
TASK = "exemplars/gsm8k_cot"
OTHER = "exemplars/mmlu_cot/anatomy"


def test_inspect_counts_every_token_of_every_task(sparse: Path, object_of: ObjectOf) -> None:
    said = object_of(["inspect", str(sparse), "--task", TASK, "--limit", "100"])
    (side,) = said["sides"]
    assert side["routing"]["num_experts"] == [8, 8]
    assert side["routing"]["top_k"] == [2, 2]
    shown = object_of(["data", "preview", TASK, "--model", str(sparse), "-n", "100"])
    tokens = sum(example["tokens"] for example in shown["tasks"][TASK]["examples"])
    (row,) = side["routing"]["tasks"]["rows"]
    assert row["tokens"] == tokens
    assert [sum(layer["counts"]) for layer in row["layers"]] == [2 * tokens, 2 * tokens]
    # A task alone has no distance, and what it needs is all its own.
    assert side["routing"]["tasks"]["distances"]["layer_means"] == []
    assert side["needs"]["alone"] == [1.0]
    assert said["parameters"]["total"] > said["parameters"]["active"]


def test_tables_and_files_without_json(
    sparse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "looks"
    tasks = ["--task", TASK, "--task", OTHER, "--limit", "2"]
    assert invoke(["inspect", str(sparse), *tasks, "--out", str(out), "--coactivation"]) == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert f"{TASK}: % of assignments by expert" in printed.err
    assert "Pairs of experts that serve tokens together" in printed.err
    assert f"Written to {out}: routing.svg, layers.svg, needs.svg, coactivation.svg" in printed.err
    assert (out / "inspect.json").exists()
    assert invoke(["inspect", str(sparse), *tasks]) == 0
    assert "For pictures, all layers as JSON and the statistics add `--out DIR`." in (
        capfd.readouterr().err
    )


def test_the_help_teaches_with_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke(["inspect", "--help"]) == 0
    printed = capfd.readouterr().out
    assert "Example: flanmoe inspect models/smol-moe" in printed
    for option in ("--task", "--limit", "--length", "--share", "--coactivation", "--out", "--json"):
        assert option in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--share", "1.5"], "share: Input should be less than or equal to 1"),
        (["--share", "0"], "share: Input should be greater than 0"),
        (["--task", TASK, "--task", TASK], f"but `{TASK}` is named several times."),
        (["--task", "exemplars/gsm8k_cott"], f"Did you mean `{TASK}`?"),
    ],
)
def test_mistakes_are_said_in_one_sentence(
    arguments: list[str], words: str, sparse: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["inspect", str(sparse), *arguments]) == 2
    printed = capfd.readouterr().err
    assert words in printed
    assert "Traceback" not in printed


def test_inspect_refuses_a_dense_model(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["inspect", str(base), "--task", TASK]) == 2
    assert "has no module with a router and experts" in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_refused(
    sparse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert invoke(["inspect", str(sparse), "--out", str(file)]) == 2
    assert f"The output folder {file} must be a folder, but is a file." in capfd.readouterr().err
