"""Runs that are killed, interrupted or run out of disk, and what going on from there gives.

Every bad end is a real one, in a process of its own; all of them share one start of Python.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flanmoe.core.rundir import RunDir
from flanmoe.training.checkpoints import latest_checkpoint
from flanmoe.training.tune import TuneResult

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "runs_that_end_badly.py"
STEPS = 7

# name: how it ends, after which step, model, and the checkpoint that is left to go on from.
KILLED = {
    "dense, between checkpoints": ("kill", 5, "llama", {}, 4),
    "dense, while writing": ("kill_in_checkpoint", 4, "llama", {}, 2),
    "dense, before the first": ("kill", 1, "llama", {}, None),
    "sparse lagged, between": ("kill", 5, "mixtral", {"scope": "lagged"}, 4),
    "sparse lagged, while writing": ("kill_in_checkpoint", 6, "mixtral", {"scope": "lagged"}, 4),
    "sparse lagged, before removal": ("kill_before_removal", 4, "mixtral", {"scope": "lagged"}, 4),
    "sparse global, between": ("kill", 3, "mixtral", {"scope": "global"}, 2),
    "sparse bfloat16, while writing": (
        "kill_in_checkpoint",
        4,
        "mixtral",
        {"scope": "lagged", "precision": "bfloat16"},
        2,
    ),
    "dense, after the last": ("kill_before_removal", 7, "llama", {}, 7),
    "frozen gate, expert dropout": (
        "kill",
        5,
        "mixtral",
        {"scope": "lagged", "freeze": ["gate", "attention"], "expert_dropout": 0.3},
        4,
    ),
    "frozen non-MoE, while writing": (
        "kill_in_checkpoint",
        4,
        "mixtral",
        {"scope": "global", "freeze": ["non_moe"], "expert_dropout": 0.3},
        2,
    ),
}


@dataclass(frozen=True)
class Badly:
    """The cases after they have been run."""

    cases: dict[str, dict[str, Any]]
    script: ModuleType

    def folder(self, name: str) -> Path:
        return Path(self.cases[name]["folder"])

    def note(self, name: str, what: str) -> dict[str, Any]:
        return json.loads((self.folder(name).parent / what).read_text())

    def run(self, name: str, folder: Path) -> tuple[Any, TuneResult]:
        return self.script.run_case(self.cases[name], folder=folder)


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runs_that_end_badly", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_data(path: Path) -> None:
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def badly(tmp_path_factory: pytest.TempPathFactory) -> Badly:
    root = tmp_path_factory.mktemp("badly")
    write_data(root / "sums.jsonl")
    cases: dict[str, dict[str, Any]] = {
        name: {"end": end, "at": at, "model": model, "steps": STEPS, **settings}
        for name, (end, at, model, settings, _) in KILLED.items()
    }
    sparse = {"model": "mixtral", "scope": "lagged"}
    cases["interrupt"] = {"end": "interrupt", "at": 3, "steps": 30, **sparse}
    # So that the checkpoint found afterwards is the one that Ctrl-C made.
    cases["interrupt"]["checkpoint_every_steps"] = 1000
    cases["interrupt_twice"] = {"end": "interrupt_twice", "at": 3, "steps": STEPS, **sparse}
    for size in (100, 500, 2000):
        full = {"end": "full_disk", "at": 0, "steps": STEPS, "kibibytes": size}
        cases[f"full_disk {size}"] = {**full, "model": "mixtral"}
    for number, case in enumerate(cases.values()):
        case["data"] = str(root / "sums.jsonl")
        case["folder"] = str(root / str(number) / "run")
        (root / str(number)).mkdir()
    (root / "cases.json").write_text(json.dumps(list(cases.values())))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), str(root / "cases.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert done.stdout == ""
    return Badly(cases=cases, script=load_script())


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    others = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, others[name]), name


def metrics(folder: Path) -> list[dict[str, Any]]:
    return RunDir(folder).rows("metrics.jsonl")


def without_measurements(result: TuneResult) -> dict[str, Any]:
    """A result without what no two runs share: seconds and memory."""
    values = result.to_mapping()
    del values["counting_pass_seconds"]
    del values["ledger"]["seconds"]
    del values["ledger"]["peak_memory_bytes"]
    return values


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_equals_uninterrupted(name: str, badly: Badly, tmp_path: Path) -> None:
    folder = badly.folder(name)
    assert badly.note(name, "ending.json")["signal"] == 9
    checkpoint = latest_checkpoint(folder)
    expected = KILLED[name][4]
    assert (checkpoint.name if checkpoint else None) == (
        f"checkpoint-{expected}" if expected else None
    )
    uninterrupted, whole = badly.run(name, tmp_path / "whole")
    resumed, result = badly.run(name, folder)
    assert_same_weights(resumed, uninterrupted)
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert without_measurements(result) == without_measurements(whole)
    assert RunDir(folder).rows("routing.jsonl") == RunDir(tmp_path / "whole").rows("routing.jsonl")


def test_dropout_was_part_of_it(badly: Badly, tmp_path: Path) -> None:
    # Otherwise the random state would not have been tested.
    name = "dense, between checkpoints"
    trained, _ = badly.run(name, tmp_path / "one")
    badly.cases["less"] = {**badly.cases[name], "steps": 1}
    model, _ = badly.run("less", tmp_path / "two")
    assert model.config.attention_dropout > 0
    assert not torch.equal(model.lm_head.weight, trained.lm_head.weight)


def test_ctrl_c_saves_and_going_on_equals_uninterrupted(badly: Badly, tmp_path: Path) -> None:
    outcome = badly.note("interrupt", "outcome.json")
    folder = badly.folder("interrupt")
    step = len(metrics(folder))
    assert 3 <= step < 30
    assert outcome == {
        "type": "Interrupted",
        "text": f"Tuning was interrupted after step {step} of 30. A checkpoint has been saved; "
        "`--resume` goes on from it.",
        "exit_code": 130,
        "left": [f"checkpoint-{step}"],
    }
    resumed, _ = badly.run("interrupt", folder)
    uninterrupted, _ = badly.run("interrupt", tmp_path)
    assert_same_weights(resumed, uninterrupted)
    assert [row["step"] for row in metrics(folder)] == list(range(1, 31))


def test_a_second_ctrl_c_stops_at_once(badly: Badly) -> None:
    assert badly.note("interrupt_twice", "outcome.json")["type"] == "KeyboardInterrupt"
    assert badly.note("interrupt_twice", "ending.json")["seconds_to_end"] < 10


@pytest.mark.parametrize("kibibytes", [100, 500, 2000])
def test_a_full_disk_is_one_sentence(kibibytes: int, badly: Badly) -> None:
    name = f"full_disk {kibibytes}"
    outcome = badly.note(name, "outcome.json")
    if outcome["type"] == "PermissionError":
        pytest.skip(outcome["text"])
    assert outcome["type"] == "DiskError"
    assert outcome["exit_code"] == 1
    # The largest disk holds one checkpoint, and keeps it; nothing half-written stays.
    kept = ["checkpoint-2"] if kibibytes == 2000 else []
    assert outcome["left"] == kept
    failed = badly.folder(name) / "checkpoints" / f"checkpoint-{4 if kept else 2}"
    assert outcome["text"].startswith(f"Writing {failed} failed: ")
    assert "No space left on device" in outcome["text"]
    assert outcome["text"].endswith("`--resume` goes on from it.")
