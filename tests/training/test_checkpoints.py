"""A checkpoint counts when it is complete, and only then."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from flanmoe.core import files
from flanmoe.core.errors import DiskError, RunError
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.checkpoints import (
    MARKER,
    RunState,
    checkpoint_step,
    latest_checkpoint,
    load_weights,
    read_run_state,
    remove_checkpoints,
    remove_older,
    write_run_state,
    writing,
)


def write(run: Path, step: int) -> Path:
    with writing(run / "checkpoints", step=step) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").write_text(f"weights of {step}")
    return run / "checkpoints" / f"checkpoint-{step}"


def fail(run: Path, error: Exception) -> None:
    """Break off in the middle of writing the checkpoint of step 4."""
    with writing(run / "checkpoints", step=4) as partial:
        (partial / "weights").write_text("half")
        raise error


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_complete_one_by_number(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (8, 9, 10):
        write(tmp_path, step)
    latest = latest_checkpoint(tmp_path)
    assert latest == tmp_path / "checkpoints" / "checkpoint-10"
    assert checkpoint_step(latest) == 10
    assert (latest / "sub" / "weights").read_text() == "weights of 10"


def test_the_marker_is_written_last_and_names_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    flush, write_json = files.flush, files.write_json

    def flushing(path: Path) -> None:
        order.append(f"flush {path.name}")
        flush(path)

    def marking(path: Path, value: Any) -> None:
        order.append(f"write {path.name}")
        write_json(path, value)

    monkeypatch.setattr(files, "flush", flushing)
    monkeypatch.setattr(files, "write_json", marking)
    checkpoint = write(tmp_path, 3)
    marker = json.loads((checkpoint / MARKER).read_text())
    assert marker == {"step": 3, "files": {"sub/weights": len("weights of 3")}}
    assert order == [
        "flush weights",
        f"write {MARKER}",
        "flush checkpoint-3.partial",
        "flush checkpoints",
    ]


def test_what_was_not_finished_is_ignored_and_removed(tmp_path: Path) -> None:
    write(tmp_path, 4)
    torn = tmp_path / "checkpoints" / "checkpoint-6"
    torn.mkdir()
    (torn / "model.safetensors").write_text("half")
    partial = tmp_path / "checkpoints" / "checkpoint-8.partial"
    partial.mkdir()
    (partial / MARKER).write_text("{}")
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-4"
    assert names(tmp_path) == ["checkpoint-4", "notes"]


def test_older_ones_go(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        write(tmp_path, step)
    remove_older(tmp_path / "checkpoints", keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-4"]
    remove_checkpoints(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    remove_checkpoints(tmp_path)


def test_what_was_not_finished_does_not_push_out_what_was(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "checkpoints" / "checkpoint-6").mkdir()
    remove_older(tmp_path / "checkpoints", keep=1)
    assert "checkpoint-4" in names(tmp_path)


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    first = write(tmp_path, 2)
    (first / "sub" / "weights").write_text("other")
    write(tmp_path, 2)
    assert (first / "sub" / "weights").read_text() == "weights of 2"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_writing(tmp_path: Path, number: int) -> None:
    write(tmp_path, 2)
    with pytest.raises(DiskError) as caught:
        fail(tmp_path, OSError(number, os.strerror(number)))
    failed = tmp_path / "checkpoints" / "checkpoint-4"
    assert str(caught.value).startswith(
        f"Writing {failed} failed: [Errno {number}] {os.strerror(number)}. "
    )
    assert str(caught.value).endswith("`--resume` goes on from it.")
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_full_disk_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError):
        write(tmp_path, 2)
    assert names(tmp_path) == []


def test_other_errors_pass_through_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail(tmp_path, KeyError("unrelated"))
    assert names(tmp_path) == []


def test_run_state_survives(tmp_path: Path) -> None:
    state = RunState(
        rows_trained=7,
        stream={"window": 3},
        scope={"counts": [[1, 2]]},
        callbacks={"ledger": {"steps": 1}},
    )
    write_run_state(tmp_path, state)
    assert read_run_state(tmp_path) == state


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_come_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(name, seed=1).to(dtype)
    model.save_pretrained(tmp_path)
    other = tiny_model(name, seed=2).to(dtype)
    load_weights(other, tmp_path)
    loaded = other.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize(
    ("name", "settings"), [("llama", {}), ("mixtral", {"num_local_experts": 4})]
)
def test_weights_of_another_model_are_refused(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_model(name, num_hidden_layers=3, **settings).save_pretrained(tmp_path)
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RunError, match=r"must hold the model that is to be trained, but \d+ tens"):
        load_weights(model, tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value)
