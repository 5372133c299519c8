"""Tables of what it cost: parameters, FLOPs, tokens, time, memory."""

from collections.abc import Callable, Iterable

from flanmoe.study.arm_report import ArmReport
from flanmoe.study.number_text import exact, short, signed, size
from flanmoe.study.report_data import ReportData
from flanmoe.study.tables.base import (
    MOST_ARM_COLUMNS,
    Section,
    TextTable,
    peak_text,
    tuned_only,
    turned,
)

_TUNING_COSTS: tuple[tuple[str, Callable[[ArmReport], str]], ...] = (
    ("parameters, trained", lambda arm: exact(arm.parameters.trainable)),
    ("optimizer steps", lambda arm: exact(arm.ledger.steps)),
    ("packed rows", lambda arm: exact(arm.ledger.sequences)),
    ("real tokens", lambda arm: exact(arm.ledger.real_tokens)),
    ("padding tokens", lambda arm: exact(arm.ledger.padding_tokens)),
    ("tokens with loss", lambda arm: exact(arm.ledger.loss_tokens)),
    ("FLOPs of tuning", lambda arm: short(arm.ledger.flops)),
    ("seconds of tuning", lambda arm: f"{arm.ledger.seconds:.1f}"),
    ("peak memory", peak_text),
)


def costs(data: ReportData) -> Section:
    """What each arm cost, in numbers."""
    quantities: list[tuple[str, Callable[[ArmReport], str]]] = [
        ("seeds", lambda arm: ", ".join(str(seed) for seed in arm.seeds)),
        ("parameters, total", lambda arm: exact(arm.parameters.total)),
        ("parameters, active", lambda arm: exact(arm.parameters.active)),
        ("FLOPs per token: body", lambda arm: short(arm.flops.body)),
        ("FLOPs per token: head", lambda arm: short(arm.flops.head)),
        ("FLOPs per token: attention scores", lambda arm: short(arm.flops.attention_scores)),
    ]
    if data.was_tuned:
        quantities += [(name, tuned_only(cell)) for name, cell in _TUNING_COSTS]
    if any(arm.step0_max_abs_diff is not None for arm in data.arms):
        quantities.append(("largest logit difference at step 0", _step0_text))
    note = (
        "FLOPs count two operations per multiply-add; a training step counts three forward passes. "
        "At step 0 a sparse model is compared with the dense one that it was made from."
    )
    return Section("Costs", (_by_arm(data.arms, quantities, note),))


def _by_arm(
    arms: Iterable[ArmReport],
    quantities: list[tuple[str, Callable[[ArmReport], str]]],
    note: str = "",
) -> TextTable:
    arms = tuple(arms)
    table = TextTable(
        ("quantity", *(arm.label for arm in arms)),
        tuple((name, *(cell(arm) for arm in arms)) for name, cell in quantities),
        note,
    )
    return table if len(arms) <= MOST_ARM_COLUMNS else turned(table)


def _step0_text(arm: ArmReport) -> str:
    return "n/a" if arm.step0_max_abs_diff is None else f"{arm.step0_max_abs_diff:.2e}"


def memory(data: ReportData) -> Section:
    """Memory of training: the estimate by its parts, and the measurement."""
    parts = dict.fromkeys(part for arm in data.arms if arm.memory for part in arm.memory.estimate)
    arms = [arm for arm in data.arms if arm.memory]
    quantities: list[tuple[str, Callable[[ArmReport], str]]] = [
        (f"estimate: {part}", lambda arm, part=part: _part_text(arm, part)) for part in parts
    ]
    if arms:
        quantities += [
            ("estimate: total", lambda arm: size(arm.memory.estimate_total) if arm.memory else ""),
            ("measured peak", peak_text),
            ("estimate against measurement", _memory_error_text),
        ]
    return Section("Memory: estimate and measurement", (_by_arm(arms, quantities),))


def _part_text(arm: ArmReport, part: str) -> str:
    return size(arm.memory.estimate[part]) if arm.memory and part in arm.memory.estimate else ""


def _memory_error_text(arm: ArmReport) -> str:
    error = arm.memory.relative_error if arm.memory else None
    return "n/a" if error is None else f"{signed(100 * error, 1)} %"
