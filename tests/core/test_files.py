"""Files are whole or absent, whatever happens while they are written."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core import files
from flanmoe.core.errors import DiskError

_FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not _FULL.exists(), reason="this system has no /dev/full")


class _Killed(BaseException):
    """Stands for a kill: nothing that catches exceptions may swallow it."""


def _kill(*_: Any) -> None:
    raise _Killed


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_kill_between_write_and_rename_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "state.json"
    files.write_json(path, {"step": 1})
    monkeypatch.setattr(os, step, _kill)
    with pytest.raises(_Killed):
        files.write_json(path, {"step": 2})
    assert files.read_json_file(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_real_kill_between_write_and_rename_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    files.write_json(path, {"step": 1})
    program = (
        "import os, signal, sys, pathlib\n"
        "from flanmoe.core import files\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_json(pathlib.Path(sys.argv[1]), {'step': 2})\n"
    )
    status = subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode
    assert status == -9
    assert files.read_json_file(path) == {"step": 1}


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    files.write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    assert files.read_json_file(path) == {"loss": 1.5}


def test_a_new_file_gets_the_permissions_that_the_system_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    previous = os.umask(0o022)
    try:
        files.write_text(path, "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@given(text=st.text(st.characters(codec="utf-8")))
def test_text_is_written_as_it_is(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    files.write_text(path, text)
    assert path.read_bytes().decode("utf-8") == text


_ROWS = [{"step": 1, "note": "größer"}, {"step": 2, "note": "∞"}, {"step": 3, "note": "a\nb"}]


def _log(path: Path) -> bytes:
    for row in _ROWS:
        files.append_json_line(path, row)
    return path.read_bytes()


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    _log(tmp_path / "log.jsonl")
    assert files.read_json_lines(tmp_path / "log.jsonl") == _ROWS
    assert files.read_json_lines(tmp_path / "absent.jsonl") == []


def test_a_line_torn_at_any_byte_is_left_out_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    content = _log(path)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = _ROWS[: content[:length].count(b"\n")]
        assert files.read_json_lines(path) == whole
        files.append_json_line(path, {"resumed": True})
        assert files.read_json_lines(path) == [*whole, {"resumed": True}]


def test_a_long_torn_line_is_removed_to_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b'{"text": "' + b"x" * 200_000)
    files.append_json_line(path, {"a": 2})
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(json.JSONDecodeError):
        files.read_json_lines(path)


@needs_full_device
def test_a_full_disk_is_one_sentence() -> None:
    with pytest.raises(DiskError) as raised:
        files.append_json_line(_FULL, {"step": 1})
    message = str(raised.value)
    assert message.startswith("Writing /dev/full failed: ")
    assert "No space left on device" in message
    assert message.endswith("what was finished before is kept and `--resume` goes on from it.")
    assert "GiB are free there" in message
    assert raised.value.exit_code == 1


@needs_full_device
def test_a_sentence_about_the_disk_is_not_wrapped_into_another(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as raised, files.disk_errors(tmp_path / "model"):
        files.append_json_line(_FULL, {"step": 1})
    assert str(raised.value).count("Writing ") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_disk_troubles_by_number(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(DiskError, match=r"Writing .*new.* failed"),
        files.disk_errors(tmp_path / "new" / "file"),
    ):
        raise OSError(number, os.strerror(number))


def test_a_full_disk_that_a_library_reports_in_its_own_way(tmp_path: Path) -> None:
    with pytest.raises(DiskError), files.disk_errors(tmp_path / "model.safetensors"):
        raise RuntimeError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), files.disk_errors(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "is a directory")
    with pytest.raises(KeyError), files.disk_errors(tmp_path):
        raise KeyError("x")


def _write_model(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (folder / "model.bin").write_text(text)
    (folder / "parts").mkdir()
    (folder / "parts" / "a").write_text(text)


def _fill_the_disk(folder: Path) -> None:
    with files.whole_folder(folder, marker="config.json") as partial:
        _write_model(partial, "half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_whole_folder_replaces_what_stood_there(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    for text in ("old", "new"):
        with files.whole_folder(folder, marker="config.json") as partial:
            _write_model(partial, text)
            (partial / text).touch()
    assert sorted(os.listdir(folder)) == ["config.json", "model.bin", "new", "parts"]
    assert (folder / "parts" / "a").read_text() == (folder / "config.json").read_text() == "new"


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing_of_a_whole_folder(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "model"
    if there:
        folder.mkdir()
    with pytest.raises(DiskError, match=r"Writing .*model failed: .*No space left on device"):
        _fill_the_disk(folder)
    assert folder.exists() == there
    assert not there or os.listdir(folder) == []


def test_a_kill_at_any_rename_leaves_no_marker(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, pathlib\n"
        "from flanmoe.core import files\n"
        "folder, left, real = pathlib.Path(sys.argv[1]), [int(sys.argv[2])], os.replace\n"
        "def replace(*paths):\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1\n"
        "    real(*paths)\n"
        "os.replace = replace\n"
        "with files.whole_folder(folder, marker='config.json') as partial:\n"
        "    for name in ('a', 'config.json', 'z'): (partial / name).touch()\n"
    )
    for renames in range(3):
        folder = tmp_path / str(renames)
        command = [sys.executable, "-c", program, str(folder), str(renames)]
        assert subprocess.run(command, check=False).returncode == -9
        assert not (folder / "config.json").exists()
        with files.whole_folder(folder, marker="config.json") as partial:
            (partial / "config.json").touch()
        assert os.listdir(folder) == ["config.json"]
