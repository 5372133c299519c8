"""Runs the checks in order and says what was found."""

import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from flanmoe.core.console import progress, say
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.stages.doctor import (
    accumulation,
    layer_counts,
    lora_targets,
    nllb,
    packing,
    pooling,
    switch,
    weight_precision,
    world_size,
)
from flanmoe.stages.doctor.check import Check, Finding, run_check
from flanmoe.stages.doctor.installed import STACK, machine, version_of
from flanmoe.stages.doctor.model import ModelInQuestion, model_checks
from flanmoe.stages.doctor.quiet import quiet
from flanmoe.stages.doctor.text import show

# Those that were begun before come last, so that they have had time.
STACK_CHECKS: tuple[Check, ...] = (
    *accumulation.CHECKS,
    *pooling.CHECKS,
    *switch.CHECKS,
    *nllb.CHECKS,
    *layer_counts.CHECKS,
    *weight_precision.CHECKS,
    *packing.CHECKS,
    *lora_targets.CHECKS,
    *world_size.CHECKS,
)


def examine(reference: str | None = None, *, names: Sequence[str] = ()) -> dict[str, Any]:
    """Run the checks of the installed stack, and of a model if one is named; returns what `--json` prints.

    A defect that was found is a result, as is a check that could not be run: neither is an error of this
    function.

    Args:
        reference: a folder or a hub id; None leaves the checks of a model out.
        names: of the checks to run; none of them means all.

    Raises:
        ModelError: if the model cannot be read.
        ConfigError: if a check is not known.
    """
    start = time.perf_counter()
    checks = _chosen([*STACK_CHECKS, *_of_model(reference)], names, reference)
    findings = _run(checks)
    seconds = round(time.perf_counter() - start, 1)
    report: dict[str, Any] = {
        "model": reference,
        "installed": {name: version_of(name) for name in STACK},
        "machine": machine(),
        "checks": [finding.to_mapping() for finding in findings],
        "counts": _counts(findings),
        "seconds": seconds,
    }
    show(findings, report)
    return report


def _of_model(reference: str | None) -> tuple[Check, ...]:
    if reference is None:
        return ()
    say(f"Reading {reference}.")
    with quiet():
        asked = ModelInQuestion.load(reference)
    return model_checks(asked)


def _chosen(checks: list[Check], names: Sequence[str], reference: str | None) -> list[Check]:
    known = {check.name: check for check in checks}
    for name in names:
        if name not in known:
            needs_model = name.startswith("model_") and reference is None
            raise ConfigError(
                f"The check `{name}` needs a model. Name one: `flanmoe doctor MODEL --check {name}`."
                if needs_model
                else f"The check `{name}` is not known.{nearest_name_hint(name, known)} Known: "
                f"{listing(known, limit=len(known))}."
            )
    return [check for check in checks if not names or check.name in names]


def _run(checks: Sequence[Check]) -> list[Finding]:
    findings: list[Finding] = []
    with (
        ExitStack() as stack,
        progress("doctor", total=len(checks), unit="checks") as advance,
    ):
        begun = {
            check.name: stack.enter_context(check.begin())
            for check in checks
            if check.begin is not None
        }
        # Trainers collect garbage after each run. What is imported is none, and most of the objects.
        gc.freeze()
        stack.callback(gc.unfreeze)
        for check in checks:
            findings.append(run_check(check, begun.get(check.name)))
            advance(note=check.name)
    return findings


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    statuses = ("ok", "defect", "note", "skipped", "error")
    return {status: sum(finding.status == status for finding in findings) for status in statuses}
