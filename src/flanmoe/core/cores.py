"""The cores that this process may use, asked in one way on every system."""

import os

import psutil


def usable_cores() -> int:
    """Return how many cores this process may run on.

    Raises:
        OSError: if the system does not say how many cores there are.
    """
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:
        # macOS binds no process to cores, and psutil lacks the method there: all may be used.
        cores = os.cpu_count()
    if cores is None:
        raise OSError("The number of cores is needed, but this system does not say it.")
    return cores
