"""The number of cores is the process's own where there is such a thing, and the machine's elsewhere."""

import os
import subprocess
import sys

import pytest

from flanmoe.core.cores import usable_cores

_PROGRAM = """
import psutil
from flanmoe.core.cores import usable_cores

process = psutil.Process()
allowed = process.cpu_affinity()
print(usable_cores() == len(allowed))
process.cpu_affinity(allowed[:1])
print(usable_cores())
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS binds no process to cores")
def test_only_cores_that_this_process_may_use_count() -> None:
    # A process of its own: affinity outlives the test.
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
    )
    assert finished.stdout.split() == ["True", "1"]


class _Unbound:
    """A process as psutil shows it on macOS: without an affinity."""


def test_without_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flanmoe.core.cores.psutil.Process", _Unbound)
    assert usable_cores() == os.cpu_count()


def test_a_number_that_nobody_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flanmoe.core.cores.psutil.Process", _Unbound)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    with pytest.raises(OSError, match="number of cores is needed, but this system does not say"):
        usable_cores()
