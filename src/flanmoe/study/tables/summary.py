"""The key table of a report."""

from collections.abc import Callable

from flanmoe.study.arm_report import ArmReport, Evaluation
from flanmoe.study.number_text import duration, exact, listed, percent, short, signed
from flanmoe.study.report_data import ReportData
from flanmoe.study.report_text import accuracy_text, evaluated_examples, loss_text
from flanmoe.study.tables.base import MOST_ARM_COLUMNS, TextTable, peak_text, tuned_only, turned

_MOST_NAMES = 8


def summary(data: ReportData) -> TextTable:
    """The key table: a column an arm, a row a quantity.

    Many arms have a row each, and a column for each quantity in which they differ.
    """
    rows: list[tuple[str, Callable[[ArmReport], str]]] = [
        ("Parameters, total", lambda arm: short(arm.parameters.total)),
        ("Parameters, active", lambda arm: short(arm.parameters.active)),
    ]
    if data.was_tuned:
        trained = tuned_only(lambda arm: short(arm.parameters.trainable))
        rows.append(("Parameters, trained", trained))
    rows.append(("FLOPs per token, forward", lambda arm: short(arm.flops.total)))
    if len(data.arms) > 1:
        base = next((arm for arm in data.arms if arm.label == data.baseline), data.arms[0])
        rows.append((f"FLOPs against {base.label}", _against(base)))
    if data.was_tuned:
        rows += [
            ("Tokens tuned on", tuned_only(lambda arm: short(arm.ledger.real_tokens))),
            ("Time of tuning", tuned_only(lambda arm: duration(arm.ledger.seconds))),
            ("Peak memory", tuned_only(peak_text)),
        ]
    if any(arm.pretraining for arm in data.arms):
        rows.append(("Loss on held-out text", _pretrained_text))
    if any(arm.before or arm.after for arm in data.arms):
        scores = _score_rows(data)
        # A row an arm is wide, and what its reader looks for stands beside the name.
        rows = [*rows, *scores] if len(data.arms) <= MOST_ARM_COLUMNS else [*scores, *rows]
    if any(arm.expert_load for arm in data.arms):
        rows.append(("Busiest expert", _busiest_text))
        rows.append(("Unused experts", _unused_text))
        if any(arm.expert_load and arm.expert_load.unserved_share for arm in data.arms):
            rows.append(("Choices that did not fit", _dropped_text))
            rows.append(("Tokens without an expert", _unserved_text))
    table = TextTable(
        header=("", *(arm.label for arm in data.arms)),
        rows=tuple((name, *(cell(arm) for arm in data.arms)) for name, cell in rows),
        note=_summary_note(data),
        group_ends=("Parameters, trained", "Peak memory"),
    )
    return table if len(data.arms) <= MOST_ARM_COLUMNS else turned(table)


def _score_rows(data: ReportData) -> list[tuple[str, Callable[[ArmReport], str]]]:
    if not data.was_tuned:
        return [
            ("Loss", lambda arm: _loss(arm.before)),
            ("Accuracy", lambda arm: _accuracy(arm.before)),
        ]
    rows: list[tuple[str, Callable[[ArmReport], str]]] = [
        ("Loss before", lambda arm: _loss(arm.before)),
        ("Loss after", lambda arm: _loss(arm.after)),
        ("Accuracy before", lambda arm: _accuracy(arm.before)),
        ("Accuracy after", lambda arm: _accuracy(arm.after)),
    ]
    evaluated = {
        "before": any(arm.before for arm in data.arms),
        "after": any(arm.after for arm in data.arms),
    }
    return [row for row in rows if evaluated[row[0].split()[1]]]


def _loss(evaluation: Evaluation | None) -> str:
    return loss_text(evaluation.loss if evaluation else None)


def _accuracy(evaluation: Evaluation | None) -> str:
    return accuracy_text(evaluation.accuracy) if evaluation else "not evaluated"


def _busiest_text(arm: ArmReport) -> str:
    return f"{arm.expert_load.max_over_mean:.2f}× even" if arm.expert_load else "no experts"


def _unused_text(arm: ArmReport) -> str:
    load = arm.expert_load
    return f"{load.num_unused} of {len(load.layers) * load.num_experts}" if load else "no experts"


def _against(base: ArmReport) -> Callable[[ArmReport], str]:
    """Say by how much an arm's FLOPs per token differ from another's."""
    return lambda arm: f"{signed(100 * (arm.flops.total / base.flops.total - 1), 1)} %"


def _pretrained_text(arm: ArmReport) -> str:
    losses = [one.held_out_loss for one in arm.pretraining if one.held_out_loss is not None]
    return f"{losses[-1]:.3f}" if losses else "not measured"


def _dropped_text(arm: ArmReport) -> str:
    return _mean_share(arm, "dropped_share")


def _unserved_text(arm: ArmReport) -> str:
    return _mean_share(arm, "unserved_share")


def _mean_share(arm: ArmReport, name: str) -> str:
    if arm.expert_load is None:
        return "no experts"
    shares: tuple[float, ...] = getattr(arm.expert_load, name)
    return percent(sum(shares) / len(shares)) if shares else "not recorded"


def _summary_note(data: ReportData) -> str:
    evaluations = [
        evaluation for arm in data.arms for evaluation in (arm.before, arm.after) if evaluation
    ]
    sentences = _descriptions(data)
    if evaluations:
        counts = listed(list(dict.fromkeys(evaluated_examples(item) for item in evaluations)))
        sentences.append(
            f"Mean ± standard error over held-out examples ({counts}). Loss: nats per token."
        )
        chances = [item.accuracy.chance for item in evaluations if item.accuracy]
        known = dict.fromkeys(percent(chance) for chance in chances if chance is not None)
        if known:
            sentences.append(f"Guessing scores {listed(list(known))} accuracy.")
    context = dict.fromkeys(exact(arm.flops.context_length) for arm in data.arms)
    training = "; training costs three times that" if data.was_tuned else ""
    sentences.append(f"FLOPs at a context of {listed(list(context))} tokens{training}.")
    if any(arm.expert_load for arm in data.arms):
        sentences.append("Busiest expert: the largest load of any layer, over the even share.")
    seeds = max(len(arm.seeds) for arm in data.arms)
    if seeds > 1 and data.was_tuned:
        sentences.append(f"Tokens and time are of up to {seeds} seeds together.")
    return " ".join(sentences)


def _descriptions(data: ReportData) -> list[str]:
    """Say what each arm is, arms that are made alike together."""
    labels: dict[str, list[str]] = {}
    for arm in data.arms:
        labels.setdefault(arm.description, []).append(arm.label)
    labels.pop("", None)
    names = {
        description: "Every arm"
        if len(alike) == len(data.arms) > 1
        else listed(alike, most=_MOST_NAMES)
        for description, alike in labels.items()
    }
    return [f"{alike}: {description}." for description, alike in names.items()]
