"""Peak memory of this process, resettable, so that each stage can be measured by itself."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak_memory() -> bool:
    """Start a new peak measurement; returns False where the system cannot (anything but Linux)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """Return the peak resident set size in bytes since the last reset (or since process start)."""
    if _STATUS.exists():
        return _status_peak_bytes()
    return _used_bytes(resource.RUSAGE_SELF)


def peak_memory_of_children_bytes() -> int:
    """Return the largest peak of the child processes that have ended, each since its own last reset."""
    return _used_bytes(resource.RUSAGE_CHILDREN)


def _used_bytes(who: int) -> int:
    usage = resource.getrusage(who).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return usage if sys.platform == "darwin" else usage * 1024


def _status_peak_bytes() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"The field VmHWM is missing from {_STATUS}.")
