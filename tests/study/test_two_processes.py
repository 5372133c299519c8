"""Several commands and several workers on one study: every stage runs once, and the numbers are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flanmoe.core.errors import ConfigError
from flanmoe.study.executor import Leg
from flanmoe.study.executors import ray
from flanmoe.study.nodes import Branch

LABELS = ("upcycle", "tune", "before", "after")
_WITHOUT_RAY = find_spec("ray") is None


@pytest.fixture(scope="module")
def study_file(base: Path, sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of two seeds that are upcycled, tuned and scored; some seconds of work."""
    score = {"stage": "evaluate", "tasks": ["exemplars/bbh/navigate"], "limit": 2}
    tune = {
        "stage": "tune",
        "data": {"tasks": [{"name": str(sums_file)}]},
        "packing": {"length": 64, "window": 8},
        "train": {
            "length": 64,
            "steps": 3,
            "rows_per_step": 2,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 1,
        },
    }
    after = {**score, "label": "after"}
    arms = {
        "dense": {"stages": [{**score, "label": "before"}, tune, after]},
        "sparse": {"stages": [{"stage": "upcycle", "num_experts": 4}, tune, after]},
    }
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    values = {"name": "tiny", "model": str(base), "seeds": [0, 1], "arms": arms}
    path.write_text(yaml.safe_dump(values))
    return path


def command(study_file: Path, out: Path, *options: str) -> list[str]:
    """The command line of a run."""
    start = [sys.executable, "-m", "flanmoe", "run", str(study_file), "--out", str(out), "--json"]
    return [*start, *options]


def run(study_file: Path, out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the command and wait for it."""
    result = subprocess.run(
        command(study_file, out, *options), capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    return result


def ran(*said: str) -> list[str]:
    """The stages that processes said they run."""
    lines = [line.strip() for text in said for line in text.splitlines() if line.startswith("  ")]
    return sorted(line for line in lines if line in LABELS)


# One score of the model that all begin with; the rest for each seed.
EVERY_STAGE = sorted(["before", *["tune", "after", "upcycle", "tune", "after"] * 2])


@pytest.fixture(scope="module")
def whole(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of one uninterrupted run with one worker, and what it answered."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = run(study_file, out)
    assert ran(result.stderr) == EVERY_STAGE
    return out, json.loads(result.stdout)


def assert_same(one: Path, other: Path) -> None:
    """Every stage has the same folder, and every model that stayed the same tensors."""
    folders = [sorted(path.name for path in (out / "stages").iterdir()) for out in (one, other)]
    assert folders[0] == folders[1]
    models = sorted(one.glob("stages/*/model/model.safetensors"))
    assert len(models) == 4
    for path in models:
        first, second = load_file(path), load_file(other / path.relative_to(one))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_commands_on_one_folder_share_the_stages(
    whole: tuple[Path, Any], study_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(study_file, out), **pipes) as first:
        deadline = time.monotonic() + 200
        while not (out / "graph.json").exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with subprocess.Popen(command(study_file, out, "--resume"), **pipes) as second:
            said = [process.communicate(timeout=500) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert ran(said[0][1], said[1][1]) == EVERY_STAGE
    # Both did some of it, and both report all of it.
    assert ran(said[0][1])
    assert ran(said[1][1])
    for answer, _ in said:
        assert json.loads(answer)["arms"].keys() == whole[1]["arms"].keys()
    assert_same(whole[0], out)


@pytest.mark.slow
def test_two_workers_give_the_numbers_of_one_and_a_kill_repeats_nothing(
    whole: tuple[Path, Any], study_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        command(study_file, out, "--workers", "2"), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 300
        while len(list(out.glob("stages/*/result.json"))) < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finished = {path: path.stat().st_mtime_ns for path in out.glob("stages/*/result.json")}
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    # At once: the stages that were cut off are locked until their processes have noticed.
    resumed = run(study_file, out, "--workers", "2", "--resume")
    assert len(ran(resumed.stderr)) <= len(EVERY_STAGE) - len(finished)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    answer = json.loads(resumed.stdout)
    for arm, numbers in whole[1]["arms"].items():
        assert answer["arms"][arm]["after"] == numbers["after"]
    assert_same(whole[0], out)


@pytest.mark.slow
@pytest.mark.skipif(_WITHOUT_RAY, reason="needs the package `ray` (pip install 'flanmoe[ray]')")
def test_ray_gives_the_numbers_of_this_machine(
    whole: tuple[Path, Any], study_file: Path, tmp_path: Path
) -> None:
    result = run(study_file, tmp_path / "out", "--executor", "ray", "--workers", "2")
    answer = json.loads(result.stdout)
    for arm, numbers in whole[1]["arms"].items():
        assert answer["arms"][arm]["after"] == numbers["after"]
    assert_same(whole[0], tmp_path / "out")


def test_a_leg_that_no_node_of_ray_has_the_memory_for_is_refused() -> None:
    leg = Leg(Path("out"), ("stage",), (), None, Branch("large", 0, ()), 3 * 2**30, {})
    nodes = [{"Resources": {"memory": 2.0 * 2**30}}, {"Resources": {"CPU": 1.0}}]
    assert str(ray._refusal(leg, nodes)) == (
        "Arm `large` (seed 0) needs about 3.00 GiB of memory, but the largest node of Ray has 2.00 GiB for "
        "tasks. Lower `length`, or add a larger node."
    )
    assert ray._refusal(replace(leg, memory_bytes=2**31), nodes) is None


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        ray.RayExecutor()
    assert str(caught.value) == (
        "`--executor ray` needs the package `ray`, but it is not installed. Run `pip install 'flanmoe[ray]'`, "
        "or leave the option out."
    )
