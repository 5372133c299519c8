"""Bad input through the command line: one clear sentence, exit status 2, nothing written, no traceback."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import T5Config

from flanmoe.cli.main import invoke
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


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


def _unknown_task(folder: Path) -> str:
    return "exemplars/gsm8k_cott"


def _evaluation_only(folder: Path) -> str:
    return "exemplars/bbh/snarks"


@pytest.mark.parametrize(
    ("make", "sentences"),
    [
        (_missing, ["missing.jsonl"]),
        (_empty, ["empty.jsonl", "at least one example"]),
        (_no_target, ["rows.jsonl:2"]),
        (_not_json, ["rows.jsonl:2"]),
        (_torn_gzip, ["rows.jsonl.gz"]),
        (_unknown_task, ["exemplars/gsm8k_cott", "Did you mean `exemplars/gsm8k_cot`?"]),
        (_evaluation_only, ["exemplars/bbh/snarks", "evaluat"]),
    ],
)
def test_bad_data_is_named_before_anything_runs(
    make: Callable[[Path], str],
    sentences: list[str],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = write_study(tmp_path, base, {"name": make(tmp_path)})
    status = invoke(["run", str(study), "--out", str(tmp_path / "out")])
    _assert_one_sentence(status, capsys, sentences)
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_is_named_with_its_path_and_the_nearest_one(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, base, "exemplars/gsm8k_cot", learning_rat=1e-4)
    status = invoke(["plan", str(study)])
    expected = ["stages.0.tune.train.learning_rat", "Did you mean `learning_rate`?"]
    _assert_one_sentence(status, capsys, expected)


def test_a_model_that_is_no_causal_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=32).save_pretrained(
        tmp_path / "t5"
    )
    study = write_study(tmp_path, tmp_path / "t5", "exemplars/gsm8k_cot")
    _assert_one_sentence(invoke(["plan", str(study)]), capsys, ["causal language model", "t5"])


def test_a_text_longer_than_a_row(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "x" * 500, "answer": "y"}) + "\n")
    study = write_study(tmp_path, base, {"name": str(tmp_path / "long.jsonl")})
    status = invoke(["run", str(study), "--out", str(tmp_path / "out")])
    _assert_one_sentence(status, capsys, ["long.jsonl", "64"])


def test_upcycling_into_a_folder_that_holds_files(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    _assert_one_sentence(invoke(["upcycle", str(base), str(tmp_path)]), capsys, ["must be empty"])
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _assert_one_sentence(invoke(["report", str(tmp_path)]), capsys, ["is not a run folder"])


def _assert_one_sentence(
    status: int, capsys: pytest.CaptureFixture[str], sentences: list[str]
) -> None:
    printed = capsys.readouterr()
    message = " ".join(printed.err.split())
    assert status == 2, message
    assert all(sentence in message for sentence in sentences), message
    assert "Traceback" not in message
    assert printed.out == ""
