"""The checks of the doctor by their names."""

from collections.abc import Callable

import pytest

from flanmoe.stages.doctor.check import Finding, run_check
from flanmoe.stages.doctor.doctor import STACK_CHECKS

Ask = Callable[[str], Finding]


@pytest.fixture
def ask() -> Ask:
    """Runs the check of a name."""

    def run(name: str) -> Finding:
        return run_check(next(check for check in STACK_CHECKS if check.name == name))

    return run
