"""The tables of a report, as text cells: the same ones in the terminal, in Markdown and in HTML."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flanmoe.study.report_data import (
    ArmReport,
    Comparison,
    DataReport,
    Evaluation,
    ReportData,
    TaskScore,
)
from flanmoe.study.report_text import (
    accuracy_text,
    difference_text,
    difference_unit,
    duration,
    evaluated_examples,
    exact,
    listed,
    loss_text,
    peak_memory,
    percent,
    short,
    signed,
    size,
)

_MOST_CURVE_ROWS = 20
_MOST_ARM_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of text.

    Attributes:
        header: one cell a column; the first column names the row.
        rows: as many cells each.
        note: a sentence below it.
        title: a line above it.
        group_ends: first cells of the rows that a line is drawn below.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    title: str = ""
    group_ends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report that can be unfolded."""

    title: str
    tables: tuple[TextTable, ...]
    sentences: tuple[str, ...] = ()


def summary(data: ReportData) -> TextTable:
    """The key table: a column an arm, a row a quantity.

    Many arms have a row each, and a column for each quantity in which they differ.
    """
    rows: list[tuple[str, Callable[[ArmReport], str]]] = [
        ("Parameters, total", lambda arm: short(arm.parameters.total)),
        ("Parameters, active", lambda arm: short(arm.parameters.active)),
    ]
    if data.was_tuned:
        trained = _tuned(lambda arm: short(arm.parameters.trainable))
        rows.append(("Parameters, trained", trained))
    rows.append(("FLOPs per token, forward", lambda arm: short(arm.flops.total)))
    if data.was_tuned:
        rows += [
            ("Tokens tuned on", _tuned(lambda arm: short(arm.ledger.real_tokens))),
            ("Time of tuning", _tuned(lambda arm: duration(arm.ledger.seconds))),
            ("Peak memory", _tuned(_peak_text)),
        ]
    if any(arm.before or arm.after for arm in data.arms):
        rows += _score_rows(data)
    if any(arm.expert_load for arm in data.arms):
        rows.append(("Busiest expert", _busiest_text))
        rows.append(("Unused experts", _unused_text))
    table = TextTable(
        header=("", *(arm.label for arm in data.arms)),
        rows=tuple((name, *(cell(arm) for arm in data.arms)) for name, cell in rows),
        note=_summary_note(data),
        group_ends=("Parameters, trained", "Peak memory"),
    )
    return table if len(data.arms) <= _MOST_ARM_COLUMNS else _turned(table)


def _turned(table: TextTable) -> TextTable:
    """Return the table with a row an arm; what is the same in every arm goes into its note."""
    shared = [f"{name}: {cells[0]}" for name, *cells in table.rows if len(set(cells)) == 1]
    differing = [row for row in table.rows if len(set(row[1:])) > 1]
    note = f"The same in every arm: {'; '.join(shared)}. " if shared else ""
    columns = (table.header, *differing)
    header, *rows = zip(*columns, strict=True)
    return TextTable(header=header, rows=tuple(rows), note=note + table.note)


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


def _tuned(cell: Callable[[ArmReport], str]) -> Callable[[ArmReport], str]:
    """Say so instead of a zero where an arm was not tuned."""
    return lambda arm: cell(arm) if arm.was_tuned else "not tuned"


def sections(data: ReportData) -> tuple[Section, ...]:
    """The parts that can be unfolded, leaving out those that the data has nothing for."""
    everything = (
        _comparisons(data),
        _tasks(data),
        _data(data),
        _costs(data),
        _memory(data),
        _routing(data),
        _curves(data),
        _versions(data),
    )
    return tuple(section for section in everything if any(table.rows for table in section.tables))


def _peak_text(arm: ArmReport) -> str:
    peak = peak_memory(arm)
    return size(peak) if peak else "not measured"


def _loss(evaluation: Evaluation | None) -> str:
    return loss_text(evaluation.loss if evaluation else None)


def _accuracy(evaluation: Evaluation | None) -> str:
    return accuracy_text(evaluation.accuracy) if evaluation else "not evaluated"


def _busiest_text(arm: ArmReport) -> str:
    return f"{arm.expert_load.max_over_mean:.2f}× even" if arm.expert_load else "no experts"


def _unused_text(arm: ArmReport) -> str:
    load = arm.expert_load
    return f"{load.num_unused} of {len(load.layers) * load.num_experts}" if load else "no experts"


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
    return [
        f"{'Every arm' if len(alike) == len(data.arms) > 1 else listed(alike)}: {description}."
        for description, alike in labels.items()
    ]


def _error_text(comparison: Comparison, error: float | None) -> str:
    return "n/a" if error is None else difference_text(comparison, error).lstrip("+")


def _comparisons(data: ReportData) -> Section:
    rows = tuple(
        (
            f"{item.subject} after tuning",
            item.reference if item.kind == "arms" else "before tuning",
            item.metric,
            f"{difference_text(item, item.mean)} {difference_unit(item.metric)}",
            _error_text(item, item.standard_error),
            _error_text(item, item.clustered_standard_error),
            f"{difference_text(item, item.low)} to {difference_text(item, item.high)}",
            f"{100 * item.confidence:g} %",
            exact(item.num_examples),
            "" if item.seed is None else str(item.seed),
            item.verdict,
        )
        for item in data.comparisons
    )
    header = (
        "subject",
        "minus",
        "metric",
        "mean",
        "standard error",
        "with tasks as clusters",
        "interval",
        "level",
        "n",
        "seed",
        "verdict",
    )
    return Section("Paired differences", (TextTable(header, rows),))


def _tasks(data: ReportData) -> Section:
    tables = tuple(
        TextTable(
            (
                "task",
                "n",
                "loss",
                "accuracy",
                "chance",
                "n with choices",
                "seen in training",
                "prompts cut",
            ),
            tuple(_task_row(task) for task in evaluation.tasks),
            title=f"{arm.label}, {moment} tuning" if arm.was_tuned else arm.label,
        )
        for arm in data.arms
        for moment, evaluation in (("before", arm.before), ("after", arm.after))
        if evaluation is not None and evaluation.tasks
    )
    return Section("Scores by task", tables)


def _task_row(task: TaskScore) -> tuple[str, ...]:
    accuracy = task.accuracy
    chance = accuracy.chance if accuracy else None
    return (
        task.task,
        exact(task.loss.num_examples),
        loss_text(task.loss),
        accuracy_text(accuracy),
        "" if chance is None else percent(chance),
        exact(accuracy.num_examples) if accuracy else "",
        exact(task.num_seen),
        exact(task.num_truncated),
    )


def _data(data: ReportData) -> Section:
    report = data.data
    mixture = TextTable(
        (
            "training task",
            "examples that it holds",
            "records left out",
            "draws trained on",
            "share of draws",
        ),
        tuple(
            (
                task.task,
                exact(task.num_examples),
                exact(task.num_rejected),
                exact(task.num_draws),
                percent(task.share),
            )
            for task in report.tasks
        ),
    )
    counts = TextTable(
        ("quantity", "value"),
        (
            (_seen_label(report), exact(report.num_seen)),
            ("draws dropped (longer than a row)", exact(report.num_dropped)),
            ("draws truncated", exact(report.num_truncated)),
            ("padding, share of all tokens", percent(report.padding_share)),
        )
        if data.was_tuned
        else (),
    )
    sentences = []
    if report.held_out:
        sentences.append(f"Held out from training: {listed(report.held_out)}.")
    if report.evaluation_only:
        sentences.append(
            f"Only ever evaluated, never trained on: {listed(report.evaluation_only)}."
        )
    return Section("Data", (mixture, counts), tuple(sentences))


def _seen_label(report: DataReport) -> str:
    several = f", most of {exact(report.num_tunings)} tunings" if report.num_tunings > 1 else ""
    return f"different examples trained on{several}"


_TUNING_COSTS: tuple[tuple[str, Callable[[ArmReport], str]], ...] = (
    ("parameters, trained", lambda arm: exact(arm.parameters.trainable)),
    ("optimizer steps", lambda arm: exact(arm.ledger.steps)),
    ("packed rows", lambda arm: exact(arm.ledger.sequences)),
    ("real tokens", lambda arm: exact(arm.ledger.real_tokens)),
    ("padding tokens", lambda arm: exact(arm.ledger.padding_tokens)),
    ("tokens with loss", lambda arm: exact(arm.ledger.loss_tokens)),
    ("FLOPs of tuning", lambda arm: short(arm.ledger.flops)),
    ("seconds of tuning", lambda arm: f"{arm.ledger.seconds:.1f}"),
    ("peak memory", _peak_text),
)


def _costs(data: ReportData) -> Section:
    quantities: list[tuple[str, Callable[[ArmReport], str]]] = [
        ("seeds", lambda arm: ", ".join(str(seed) for seed in arm.seeds)),
        ("parameters, total", lambda arm: exact(arm.parameters.total)),
        ("parameters, active", lambda arm: exact(arm.parameters.active)),
        ("FLOPs per token: body", lambda arm: short(arm.flops.body)),
        ("FLOPs per token: head", lambda arm: short(arm.flops.head)),
        ("FLOPs per token: attention scores", lambda arm: short(arm.flops.attention_scores)),
    ]
    if data.was_tuned:
        quantities += [(name, _tuned(cell)) for name, cell in _TUNING_COSTS]
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
    return TextTable(
        ("quantity", *(arm.label for arm in arms)),
        tuple((name, *(cell(arm) for arm in arms)) for name, cell in quantities),
        note,
    )


def _step0_text(arm: ArmReport) -> str:
    return "n/a" if arm.step0_max_abs_diff is None else f"{arm.step0_max_abs_diff:.2e}"


def _memory(data: ReportData) -> Section:
    parts = dict.fromkeys(part for arm in data.arms if arm.memory for part in arm.memory.estimate)
    arms = [arm for arm in data.arms if arm.memory]
    quantities: list[tuple[str, Callable[[ArmReport], str]]] = [
        (f"estimate: {part}", lambda arm, part=part: _part_text(arm, part)) for part in parts
    ]
    if arms:
        quantities += [
            ("estimate: total", lambda arm: size(arm.memory.estimate_total) if arm.memory else ""),
            ("measured peak", _peak_text),
            ("estimate against measurement", _memory_error_text),
        ]
    return Section("Memory: estimate and measurement", (_by_arm(arms, quantities),))


def _part_text(arm: ArmReport, part: str) -> str:
    return size(arm.memory.estimate[part]) if arm.memory and part in arm.memory.estimate else ""


def _memory_error_text(arm: ArmReport) -> str:
    error = arm.memory.relative_error if arm.memory else None
    return "n/a" if error is None else f"{signed(100 * error, 1)} %"


def _routing(data: ReportData) -> Section:
    tables: list[TextTable] = []
    for arm in data.arms:
        if arm.router_losses is not None:
            settings = [(name, str(value)) for name, value in arm.router_losses.settings.items()]
            last = [
                (f"{name}, last step", _finite(value))
                for name, value in arm.router_losses.last.items()
            ]
            tables.append(
                TextTable(
                    ("router losses", arm.label),
                    (*settings, *last),
                    title=f"Router losses: {arm.label}",
                )
            )
        if arm.expert_load is not None:
            tables.append(_load_table(arm))
    return Section("Routing", tuple(tables))


def _finite(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _load_table(arm: ArmReport) -> TextTable:
    load = arm.expert_load
    assert load is not None
    entropies = [f"{value:.3f}" for value in load.entropy_nats] or [""] * len(load.layers)
    return TextTable(
        ("layer", "entropy (nats)", *(f"expert {expert}" for expert in range(load.num_experts))),
        tuple(
            (str(layer), entropy, *(percent(share) for share in row))
            for layer, entropy, row in zip(load.layers, entropies, load.shares, strict=True)
        ),
        title=f"Share of assignments: {arm.label}",
        note=f"The even share is {percent(1 / load.num_experts)}.",
    )


def _curves(data: ReportData) -> Section:
    tables: list[TextTable] = []
    for arm in data.arms:
        for curve in arm.curves:
            kept = _spread(len(curve.points))
            points = [curve.points[index] for index in kept]
            whole = len(kept) == len(curve.points)
            tables.append(
                TextTable(
                    ("real tokens", "loss (nats per token)"),
                    tuple((exact(point.tokens), _finite_loss(point.loss)) for point in points),
                    title=f"{arm.label}, seed {curve.seed}",
                    note=""
                    if whole
                    else f"{len(kept)} of {len(curve.points)} steps; report.json has all.",
                )
            )
    return Section("Training loss", tuple(tables))


def _spread(num_points: int) -> list[int]:
    """Indices of at most `_MOST_CURVE_ROWS` points, evenly spread, first and last among them."""
    if num_points <= _MOST_CURVE_ROWS:
        return list(range(num_points))
    last = _MOST_CURVE_ROWS - 1
    return [round(row * (num_points - 1) / last) for row in range(_MOST_CURVE_ROWS)]


def _finite_loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _versions(data: ReportData) -> Section:
    machine = data.hardware
    rows = [(name, version) for name, version in data.versions.items()]
    if machine.cpu:
        rows.append(("processor", machine.cpu))
    if machine.num_cores:
        rows.append(("cores", exact(machine.num_cores)))
    if machine.memory_bytes:
        rows.append(("memory of the machine", size(machine.memory_bytes)))
    if machine.accelerator:
        rows.append(("accelerator", machine.accelerator))
    return Section("Versions and hardware", (TextTable(("what", "value"), tuple(rows)),))
