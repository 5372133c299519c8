"""A check: one figure that is measured, what it should be, what it means for a run, the way out.

Nothing here knows what an installed version does: a probe measures, and its figure decides.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flanmoe.stages.doctor.installed import is_installed, version_of
from flanmoe.stages.doctor.quiet import quiet

Status = Literal["ok", "defect", "note", "skipped", "error"]


class CheckSkipped(Exception):
    """Raised by a probe that has nothing to measure; the message says why."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a probe found.

    Attributes:
        figure: the measured value, in the unit that the check's `measures` names.
        detail: further values, in one sentence; may be empty.
        expected: what the figure should have been, where that depends on what was found; None takes
            the check's own value.
        is_note: a figure other than the expected one is worth knowing, and is nobody's mistake.
    """

    figure: float
    detail: str = ""
    expected: float | None = None
    is_note: bool = False


Probe = Callable[[], Measured]


@dataclass(frozen=True, slots=True)
class Check:
    """One question to the installed stack or to a model.

    Attributes:
        name: what `--check` and `checks[].name` call it.
        library: distribution that is asked, or `model`.
        measures: what the figure is, with its unit.
        expected: the figure where nothing is amiss.
        meaning: what another figure does to a run.
        way_out: what to do about it.
        probe: measures; raises `CheckSkipped` where there is nothing to measure.
        tolerance: how far the figure may lie from `expected`.
        begin: starts a probe in processes of its own, so that others can run meanwhile, and ends them
            when its context is left; None where there are none.
    """

    name: str
    library: str
    measures: str
    expected: float
    meaning: str
    way_out: str
    probe: Probe
    tolerance: float = 0.01
    begin: Callable[[], AbstractContextManager[Probe]] | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a check; `figure` is None where nothing was measured.

    Attributes:
        version: installed version of the library, None where there is none.
        detail: further values; why it was skipped; the sentence of an error.
        seconds: wall time of the probe in this process.
    """

    name: str
    library: str
    version: str | None
    status: Status
    measures: str
    figure: float | None
    expected: float | None
    detail: str
    meaning: str
    way_out: str
    seconds: float

    def to_mapping(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self)


def run_check(check: Check, probe: Probe | None = None) -> Finding:
    """Run one check and keep what libraries print meanwhile away from the terminal.

    Whatever its probe raises becomes the status `error` and the sentence of it; the checks after this one
    still run.

    Args:
        check: the check.
        probe: what measures in place of `check.probe`: one that was begun before.
    """
    if check.library != "model" and not is_installed(check.library):
        return _finding(check, "skipped", f"{check.library} is not installed.")
    start = time.perf_counter()
    try:
        with quiet():
            measured = (probe or check.probe)()
    except CheckSkipped as reason:
        return _finding(check, "skipped", str(reason), seconds=time.perf_counter() - start)
    except Exception as error:
        return _finding(check, "error", _sentence(error), seconds=time.perf_counter() - start)
    return _judged(check, measured, time.perf_counter() - start)


def _judged(check: Check, measured: Measured, seconds: float) -> Finding:
    if not math.isfinite(measured.figure):
        sentence = f"The probe measured {measured.figure}, which is no figure. {measured.detail}"
        return _finding(check, "error", sentence.strip(), seconds=seconds)
    expected = check.expected if measured.expected is None else measured.expected
    as_expected = abs(measured.figure - expected) <= check.tolerance
    other: Status = "note" if measured.is_note else "defect"
    return _finding(
        check,
        "ok" if as_expected else other,
        measured.detail,
        figure=measured.figure,
        expected=expected,
        seconds=seconds,
    )


def _finding(
    check: Check,
    status: Status,
    detail: str,
    *,
    figure: float | None = None,
    expected: float | None = None,
    seconds: float = 0.0,
) -> Finding:
    return Finding(
        name=check.name,
        library=check.library,
        version=version_of(check.library),
        status=status,
        measures=check.measures,
        figure=figure,
        expected=check.expected if expected is None else expected,
        detail=detail,
        meaning=check.meaning,
        way_out=check.way_out,
        seconds=round(seconds, 3),
    )


def _sentence(error: Exception) -> str:
    first = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}." if first else f"{type(error).__name__}."
