"""The main job on a tiny model, through the command line: run, kill, resume, report, and what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flanmoe.core.errors import ConfigError, RunError
from flanmoe.core.rundir import RunDir
from flanmoe.data.example import Packed
from flanmoe.data.stream import PackedStream
from flanmoe.study import launch
from flanmoe.study.executor import Leg
from flanmoe.study.runner import run_study
from flanmoe.study.study_file import load_study, study_from_mapping

STEPS = 6
_LABELS = ("before", "upcycle", "tune", "after")


@pytest.fixture(scope="module")
def values(base: Path, sums_file: Path) -> dict[str, Any]:
    """A study of two arms that takes a few seconds."""
    return {
        "name": "tiny",
        "model": str(base),
        "defaults": {
            "upcycle": {"num_experts": 4, "top_k": 2, "mode": "granular", "granularity": 2},
            "tune": {
                "data": {"tasks": [{"name": str(sums_file)}]},
                "packing": {"length": 64, "window": 8},
                "train": {
                    "length": 64,
                    "steps": STEPS,
                    "rows_per_step": 2,
                    "learning_rate": 1e-3,
                    "checkpoint_every_steps": 2,
                    "router": {"scope": "lagged"},
                },
            },
            "evaluate": {
                "tasks": ["exemplars/bbh/snarks", "exemplars/mmlu_cot/anatomy"],
                "limit": 4,
            },
        },
        "arms": {
            "dense": {
                "stages": [
                    {"stage": "evaluate", "label": "before"},
                    {"stage": "tune"},
                    {"stage": "evaluate", "label": "after"},
                ]
            },
            "sparse": {
                "stages": [
                    {"stage": "upcycle"},
                    {"stage": "evaluate", "label": "before"},
                    {"stage": "tune"},
                    {"stage": "evaluate", "label": "after"},
                ]
            },
        },
    }


@pytest.fixture(scope="module")
def study_file(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study as a file."""
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def whole(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of one uninterrupted run through the command line, and what it answered."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = flanmoe("run", study_file, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    return out, json.loads(result.stdout)


def flanmoe(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the command and wait for it."""
    command = [sys.executable, "-m", "flanmoe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def weights(folder: Path, arm: str) -> dict[str, torch.Tensor]:
    """Read the tensors of an arm's last model."""
    (path,) = folder.glob(f"arms/{arm}/seed-0/*-tune/model/model.safetensors")
    return load_file(path)


def assert_same_weights(first: Path, second: Path) -> None:
    """Compare every tensor of both arms to the bit."""
    for arm in ("dense", "sparse"):
        one, other = weights(first, arm), weights(second, arm)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_study_runs_reports_and_answers_in_json(
    whole: tuple[Path, Any], study_file: Path
) -> None:
    out, answer = whole
    assert answer["step0_max_abs_diff"] < 1e-3
    for arm in ("dense", "sparse"):
        # Tuned on sums, scored on prose: the scores must move, in whichever direction.
        assert answer["arms"][arm]["before"]["loss"] != answer["arms"][arm]["after"]["loss"]
    # Before tuning both arms are the same function.
    before = [answer["arms"][arm]["before"]["loss"] for arm in ("dense", "sparse")]
    assert before[0] == pytest.approx(before[1], abs=1e-4)
    assert answer["arms"]["dense"]["tokens"] == answer["arms"]["sparse"]["tokens"] > 0
    assert [sum(row) for row in answer["expert_load"]] == pytest.approx([1.0, 1.0])
    assert answer["parameters"]["sparse"]["total"] > answer["parameters"]["dense"]["total"]
    for name in ("report.html", "report.md", "report.json", "recipe.yaml", "versions.json"):
        assert (out / name).stat().st_size > 0
    _check_peak_memory(out, answer)

    planned = json.loads(flanmoe("plan", study_file, "--json").stdout)
    for arm in ("dense", "sparse"):
        assert planned["arms"][arm]["parameters"] == answer["parameters"][arm]

    again = flanmoe("report", out, "--json")
    assert json.loads(again.stdout)["arms"] == answer["arms"]


def _check_peak_memory(out: Path, answer: Any) -> None:
    """The peak is that of the largest child and of the parent beside it, which holds no torch."""
    (row,) = [json.loads(line) for line in (out / "seconds.jsonl").read_text().splitlines()]
    results = [json.loads(path.read_text()) for path in out.glob("stages/*/result.json")]
    assert len(results) == 7
    largest = max(result["peak_memory_bytes"] for result in results)
    assert answer["peak_memory_bytes"] >= largest + row["peak_memory_bytes"]
    assert 10e6 < row["peak_memory_bytes"] < 80e6 < largest


@pytest.mark.slow
def test_both_arms_are_tuned_on_the_same_rows(
    values: dict[str, Any], same_process: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[tuple[str, int]] = []
    rows: dict[tuple[str, int], list[Any]] = {}
    read = PackedStream.__next__

    class Noting(same_process):
        """Notes which arm runs in this process."""

        def start(self, leg: Leg) -> Any:
            running.append((leg.branch.arm, leg.branch.seed))
            return super().start(leg)

    def noted(stream: PackedStream) -> Packed:
        row = read(stream)
        tokens = [row.input_ids.tolist(), row.labels.tolist(), row.segment_ids.tolist()]
        rows.setdefault(running[-1], []).append(tokens)
        return row

    monkeypatch.setattr(PackedStream, "__next__", noted)
    arms = {
        "dense": {"stages": [{"stage": "tune"}]},
        "sparse": {"stages": [{"stage": "upcycle"}, {"stage": "tune"}]},
    }
    defaults = {kind: values["defaults"][kind] for kind in ("upcycle", "tune")}
    study = study_from_mapping({**values, "seeds": [0, 1], "arms": arms, "defaults": defaults})
    run_study(study, tmp_path / "out", executor=Noting(), data_dir=None, resume=False)
    for seed in study.seeds:
        assert rows["dense", seed] == rows["sparse", seed]
        assert len(rows["dense", seed]) >= 2 * STEPS
        assert len({str(row) for row in rows["dense", seed]}) > 1
    assert rows["dense", 0] != rows["dense", 1]
    # The first step's loss is taken before any update, where both arms are the same function.
    logs = sorted((tmp_path / "out").glob("arms/*/seed-0/*-tune/metrics.jsonl"))
    first = [json.loads(path.read_text().splitlines()[0])["loss/cross_entropy"] for path in logs]
    assert first[0] == pytest.approx(first[1], abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_stopped_and_resumed_equals_uninterrupted(
    how: signal.Signals, whole: tuple[Path, Any], study_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "flanmoe", "run", str(study_file), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        _wait_for(out / "arms/sparse/seed-0/02-tune/metrics.jsonl", process)
        os.kill(process.pid, how)
        process.wait(timeout=120)
    if how == signal.SIGINT:
        assert process.returncode == 130
    _wait_until_quiet(out)
    resumed = flanmoe("run", study_file, "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "Arm dense, seed 0: finished before." in resumed.stderr
    # Nothing but what was not finished: the tuning that was stopped, and what follows it.
    started = [line.strip() for line in resumed.stderr.splitlines() if line.startswith("  ")]
    assert [line for line in started if line in _LABELS] == ["tune", "after"]
    assert_same_weights(whole[0], out)


def _wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _wait_until_quiet(folder: Path) -> None:
    """Wait until the worker, which notices that its parent is gone, has stopped writing."""
    while True:
        before = [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
        time.sleep(4)
        if before == [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]:
            return


@pytest.mark.parametrize(
    ("content", "state"),
    [
        (None, "is no run folder. Leave `--resume` out to start there."),
        ('{"id": "abc"}', "is another program's: it has no `identity`. Choose another folder"),
        ('{"kind": "Study", "iden', "cannot be read as JSON: Unterminated string"),
    ],
    ids=["empty", "foreign", "torn"],
)
def test_resume_is_refused_where_no_run_was_started(
    content: str | None, state: str, study_file: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    result = flanmoe("run", study_file, "--out", tmp_path, "--resume")
    assert result.returncode == 2
    assert "`--resume` needs a folder that an earlier run wrote, but" in result.stderr
    assert str(tmp_path) in result.stderr
    assert state in result.stderr
    assert "Traceback" not in result.stderr
    assert "unexpected" not in result.stderr
    # What is not ours stays as it is.
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_of_another_study_is_foreign(
    values: dict[str, Any], run_here: Callable[..., RunDir], tmp_path: Path
) -> None:
    study = study_from_mapping(values)
    run_here(study.model_copy(update={"seeds": ()}), tmp_path / "out")
    other = study.model_copy(update={"name": "other"})
    with pytest.raises(RunError) as caught:
        run_here(other, tmp_path / "out", resume=True)
    assert str(caught.value) == (
        f"`--resume` needs the folder of the study `other`, but {tmp_path / 'out'} holds `tiny`. Choose "
        "another folder with `--out`."
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("model=no/such/folder", "does not exist"),
        ("defaults.tune.data.tasks=[no_such_task]", "no_such_task"),
        ("defaults.tune.packing.length=128", "must be equal, but found 128 and 64"),
        ("arms.sparse.stages.0.num_experts=5", "must be a multiple of"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(
    change: str, sentence: str, study_file: Path, tmp_path: Path
) -> None:
    result = flanmoe("run", study_file, "--out", tmp_path / "out", "--set", change)
    assert result.returncode == 2, result.stderr
    assert sentence in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("entry", ["command", "function"])
def test_a_study_is_not_run_by_several_processes(
    entry: str,
    study_file: Path,
    run_here: Callable[..., RunDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Refused before a child process is sent for anything.
    monkeypatch.setattr(launch, "ask", lambda errand: pytest.fail(f"sent for {errand.task}"))
    entries = {
        "command": lambda: launch.run_file(
            study_file, tmp_path, overrides=[], profile=None, data_dir=None, resume=False
        ),
        "function": lambda: run_here(load_study(study_file), tmp_path),
    }
    with pytest.raises(ConfigError) as caught:
        entries[entry]()
    assert str(caught.value) == (
        "A study runs in 1 process, but torchrun started 2. Run it without torchrun, or tune in "
        "several processes from Python (`docs/guide/distributed.md`)."
    )
    assert not list(tmp_path.iterdir())
