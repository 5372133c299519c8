"""What becomes of a probe's figure, of what it raises, and of what libraries print meanwhile."""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from flanmoe.stages.doctor.check import Check, CheckSkipped, Measured, run_check


def check(probe: Callable[[], Measured], **values: Any) -> Check:
    given = {
        "name": "one",
        "library": "transformers",
        "measures": "a ratio",
        "expected": 1.0,
        "meaning": "It is too large.",
        "way_out": "Halve it.",
        **values,
    }
    return Check(probe=probe, **given)


@pytest.mark.parametrize(
    ("figure", "is_note", "status"),
    [
        (1.0, False, "ok"),
        (1.009, False, "ok"),
        (1.02, False, "defect"),
        (0.98, False, "defect"),
        (4.0, True, "note"),
        (1.0, True, "ok"),
    ],
)
def test_the_figure_decides(figure: float, is_note: bool, status: str) -> None:
    found = run_check(check(lambda: Measured(figure, is_note=is_note)))
    assert (found.status, found.figure, found.expected) == (status, figure, 1.0)
    assert found.version == importlib.metadata.version("transformers")


def test_what_is_expected_may_depend_on_what_was_found() -> None:
    found = run_check(check(lambda: Measured(3.0, expected=3.0)))
    assert (found.status, found.expected) == ("ok", 3.0)


def test_an_absent_library_is_skipped_by_name_without_its_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trl" else known(name)
    )
    asked: list[int] = []
    found = run_check(check(lambda: asked.append(1) or Measured(1.0), library="trl"))
    assert (found.status, found.detail, found.version) == ("skipped", "trl is not installed.", None)
    assert (found.figure, asked) == (None, [])


def test_nothing_to_measure_is_skipped_with_the_reason() -> None:
    def probe() -> Measured:
        raise CheckSkipped("There are no blocks.")

    found = run_check(check(probe))
    assert (found.status, found.detail, found.figure) == ("skipped", "There are no blocks.", None)


def test_an_error_is_its_first_sentence() -> None:
    def probe() -> Measured:
        raise ValueError("the call has changed.\nA long story.")

    found = run_check(check(probe))
    assert (found.status, found.figure) == ("error", None)
    assert found.detail == "ValueError: the call has changed."


def test_a_figure_that_is_none_is_an_error() -> None:
    found = run_check(check(lambda: Measured(float("nan"), "0 over 0.")))
    assert (found.status, found.figure) == ("error", None)
    assert found.detail == "The probe measured nan, which is no figure. 0 over 0."


def test_a_probe_that_was_begun_takes_the_place() -> None:
    found = run_check(check(lambda: Measured(9.0)), lambda: Measured(1.0))
    assert found.status == "ok"


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_that_libraries_say_reaches_the_terminal(
    capfd: pytest.CaptureFixture[str], raises: bool
) -> None:
    def probe() -> Measured:
        print("printed")
        print("complained", file=sys.stderr)
        os.write(1, b"written by C\n")
        os.write(2, b"written by C\n")
        warnings.warn("old", FutureWarning, stacklevel=1)
        logging.getLogger("transformers").warning("logged")
        if raises:
            raise ValueError("no")
        return Measured(1.0)

    found = run_check(check(probe))
    print("after")
    os.write(2, b"after\n")
    assert found.status == ("error" if raises else "ok")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("after\n", "after\n")


def test_ctrl_c_is_not_kept() -> None:
    def probe() -> Measured:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check(check(probe))
