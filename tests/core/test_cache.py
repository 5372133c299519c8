"""The cache makes an entry once and whole."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from flanmoe.core.cache import cache_root, cached_folder, fingerprint
from flanmoe.core.errors import DiskError


def _build_slowly(root: str, log: str) -> None:
    def build(folder: Path) -> None:
        with open(log, "a") as stream:
            stream.write(f"{os.getpid()}\n")
        (folder / "half").write_text("1")
        time.sleep(0.5)
        (folder / "whole").write_text("2")

    entry = cached_folder("models/tiny", build, root=Path(root))
    assert (entry / "whole").read_text() == "2"


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "builders"
    workers = [
        context.Process(target=_build_slowly, args=(str(tmp_path / "cache"), str(log)))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_an_entry_is_not_built_again(tmp_path: Path) -> None:
    calls: list[Path] = []
    first = cached_folder("x", calls.append, root=tmp_path)
    second = cached_folder("x", calls.append, root=tmp_path)
    assert first == second == tmp_path / "x"
    assert len(calls) == 1


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise failure

    with pytest.raises(type(failure)):
        cached_folder("x", fail, root=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    entry = cached_folder("x", lambda folder: (folder / "whole").touch(), root=tmp_path)
    assert os.listdir(entry) == ["whole"]


def test_what_a_killed_build_left_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "half").touch()
    entry = cached_folder("x", lambda folder: (folder / "whole").touch(), root=tmp_path)
    assert os.listdir(entry) == ["whole"]


def test_a_full_disk_while_building_is_one_sentence(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match=r"Writing .*x failed: .*No space left"):
        cached_folder("x", fill, root=tmp_path)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLANMOE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("FLANMOE_CACHE")
    assert cache_root() == tmp_path / "xdg" / "flanmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "flanmoe"


def test_fingerprints_ignore_the_order_of_keys_only() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})
    assert fingerprint({"rate": 1e-4}) != fingerprint({"rate": "1e-4"})
    # Pinned: run folders and cache entries of earlier versions stay recognisable.
    assert fingerprint({"a": 1}) == "ec4644dfa7b63e651a5463fb"
