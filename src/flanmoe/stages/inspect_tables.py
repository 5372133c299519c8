"""What `flanmoe inspect` prints: tables that stay readable for many layers, experts and tasks.

Every layer and expert is in the JSON; where there are many of them, tables show some and say so.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flanmoe.evaluation.routing.figure import layers_shown
from flanmoe.evaluation.routing.report import LayerRouting, RowRouting
from flanmoe.stages.expert_batches import ReadExamples
from flanmoe.stages.inspect_report import InspectReport, Measures, SideReport

_MOST_LAYERS = 12
_MOST_COLUMNS = 8
_MOST_TASKS = 12
# Up to so many lines of who goes where, every layer is shown.
_MOST_LINES = 48
_MOST_PAIRS = 3
_BUSIEST = 4
# Characters of a task's name beside a table of tasks by tasks; the first table has it in full.
_NAME = 20
# Headings and measures. The line breaks keep columns narrow.
_COLUMNS = {
    "even\n%": "entropy_share",
    "idle\n%": "unused_share",
    "busiest": "max_over_mean",
    "unsure\n%": "router_entropy_share",
    "conf.\n%": "confidence",
    "drop\n%": "dropped_share",
    "bare\n%": "unserved_share",
}
_ONLY_WHERE_FOUND = ("dropped_share", "unserved_share")


class Titled(NamedTuple):
    """A table and what it shows, which stands above it as a line: a title would be as narrow as its table."""

    title: str
    table: Table


def tables(report: InspectReport) -> Iterator[Titled]:
    """Yield the tables of a report, side by side: tasks, layers, experts, distances, needs, pairs."""
    for side in report.sides:
        named = f" of the {side.side}" if len(report.sides) > 1 else ""
        yield task_table(side, report.examples, named)
        yield layer_table(side, named)
        yield from expert_tables(side, named)
        if len(side.routing.tasks.rows) > 1:
            yield distance_table(side, named)
            yield overlap_table(side, named)
        if side.coactivation:
            yield pair_table(side, named)


def task_table(side: SideReport, examples: dict[str, ReadExamples], named: str) -> Titled:
    """Return a row for each task, its measures as means over layers."""
    titled = _titled(
        f"Tasks, means over the {len(side.names)} sparse layers{named}",
        ["task", "examples", "tokens", *_columns(side), "need"],
    )
    for row in side.routing.tasks.rows:
        place = side.needs.names.index(row.name)
        read = examples[row.name]
        titled.table.add_row(
            row.name,
            f"{read.drawn - read.left_out}/{read.size}",
            f"{row.tokens:,}",
            *_measures(side, side.measures[row.name]),
            f"{np.mean([layer[place] for layer in side.needs.numbers]):.1f}",
        )
    return titled


def layer_table(side: SideReport, named: str) -> Titled:
    """Return a row for each layer, or for some of many, over all tasks together."""
    routing = side.routing
    shown = spread(len(side.names), _MOST_LAYERS, also=_most_telling(side))
    titled = _titled(
        f"Layers{named}, all tasks together{_some(shown, side)}",
        ["layer", "experts", "top-k", *_columns(side), "apart", "noise"],
    )
    distances = routing.tasks.distances
    for place in shown:
        titled.table.add_row(
            str(routing.layers[place]),
            str(routing.num_experts[place]),
            str(routing.top_k[place] or "-"),
            *_measures(side, [side.all[place]]),
            _distance(distances.layer_means[place] if distances.layer_means else None),
            _distance(distances.layer_noise[place] if distances.layer_noise else None),
        )
    return titled


def expert_tables(side: SideReport, named: str) -> Iterator[Titled]:
    """Yield for each task who goes where, with its measures layer by layer; the first tasks of many."""
    rows = side.routing.tasks.rows
    few = len(rows) * len(side.names) <= _MOST_LINES
    shown = list(range(len(side.names))) if few else layers_shown(side.routing)
    for row in rows[:_MOST_TASKS]:
        yield _expert_table(side, row, shown, named)


def _expert_table(side: SideReport, row: RowRouting, shown: Sequence[int], named: str) -> Titled:
    most = max(side.routing.num_experts)
    narrow = most <= _MOST_COLUMNS
    titled = _titled(
        f"{row.name}{named}: {'% of assignments by expert' if narrow else 'the busiest experts'}"
        f"{_some(shown, side)}",
        [
            "layer",
            *([f"e{number}" for number in range(most)] if narrow else ["expert and\nshare in %"]),
        ],
    )
    _add_columns(titled.table, (*_columns(side), "need"))
    task = side.needs.names.index(row.name)
    for place in shown:
        layer = row.layers[place]
        titled.table.add_row(
            str(side.routing.layers[place]),
            *(_shares(layer, most) if narrow else [_busiest(layer)]),
            *_measures(side, [side.measures[row.name][place]]),
            str(side.needs.numbers[place][task]),
        )
    return titled


def distance_table(side: SideReport, named: str) -> Titled:
    """Return how far tasks lie apart, mean over layers."""
    rows = side.routing.tasks.rows[:_MOST_TASKS]
    more = _more_tasks(side)
    titled = _titled(
        f"Distance between tasks by their experts{named}, 0 to 1; in brackets: within the noise{more}",
        ["task", *(str(number) for number in range(1, len(rows) + 1))],
    )
    distances = side.routing.tasks.distances
    for number, row in enumerate(rows):
        cells = zip(distances.mean[number], distances.noise[number], strict=True)
        texts = [
            "" if column == number else _bracketed(value, noise)
            for column, (value, noise) in enumerate(cells)
        ]
        titled.table.add_row(_numbered(number, row.name), *texts[: len(rows)])
    return titled


def overlap_table(side: SideReport, named: str) -> Titled:
    """Return how many of the experts that a task needs others need too."""
    needs = side.needs
    names = needs.names[:_MOST_TASKS]
    titled = _titled(
        f"Of the experts that a task needs ({100 * needs.share:g} % of its gate mass){named}, % that others "
        f"need too; in brackets: its own halves{_more_tasks(side)}",
        ["task", *(str(number) for number in range(1, len(names) + 1)), "alone"],
    )
    for number, name in enumerate(names):
        cells = [
            "-" if one is None else f"({100 * one:.0f})" if column == number else f"{100 * one:.0f}"
            for column, one in enumerate(needs.overlap[number][: len(names)])
        ]
        titled.table.add_row(_numbered(number, name), *cells, f"{100 * needs.alone[number]:.0f}")
    return titled


def pair_table(side: SideReport, named: str) -> Titled:
    """Return the pairs of experts that serve tokens together more or less often than loads would have it."""
    found = side.coactivation or ()
    shown = spread(len(found), _MOST_LAYERS)
    some = f" ({len(shown)} of {len(found)} layers)" if len(shown) < len(found) else ""
    titled = _titled(
        f"Pairs of experts{named} that serve tokens together more or less often than by their loads{some}",
        ["layer", "pair", "% of tokens", "expected", "times"],
    )
    for place in shown:
        for rank, pair in enumerate(found[place].pairs[:_MOST_PAIRS]):
            titled.table.add_row(
                "" if rank else str(found[place].layer),
                f"e{pair.experts[0]} + e{pair.experts[1]}",
                f"{100 * pair.together:.1f}",
                f"{100 * pair.expected:.1f}",
                "-" if pair.times is None else f"{pair.times:.2f}",
            )
    return titled


def legend(report: InspectReport) -> list[str]:
    """Return sentences that say what the columns mean."""
    share = 100 * report.sides[0].needs.share
    return [
        "even: how evenly assignments spread over experts (their entropy; 100 when even). idle: experts "
        "without a token. busiest: load of the busiest expert over the even share. unsure: how alike all "
        "experts look to the router of a token (entropy; 100 when all alike). conf.: its largest probability.",
        f"need: the fewest experts that hold {share:g} % of a task's gate mass. apart: mean distance between "
        "tasks by the experts that they use; distances up to noise say nothing.",
        *_legend_of_drops(report),
    ]


def _legend_of_drops(report: InspectReport) -> list[str]:
    headings = {heading for side in report.sides for heading in _columns(side)}
    if headings.isdisjoint({"drop\n%", "bare\n%"}):
        return ["Nothing was dropped, and every token has an expert."]
    return ["drop: choices of an expert that had no place left. bare: tokens that no expert took."]


def spread(number: int, most: int, *, also: Sequence[int] = ()) -> list[int]:
    """Return up to `most` places out of so many, evenly spread from the first to the last, and some others."""
    if number <= most:
        return list(range(number))
    even = np.linspace(0, number - 1, most).round().astype(int).tolist()
    return sorted({*even, *also})


def _most_telling(side: SideReport) -> list[int]:
    means = side.routing.tasks.distances.layer_means
    return [int(np.argmax(means))] if means else []


def _some(shown: Sequence[int], side: SideReport) -> str:
    return f" ({len(shown)} of {len(side.names)} layers)" if len(shown) < len(side.names) else ""


def _numbered(number: int, name: str) -> str:
    """Return a task's number and the end of its name, which tells tasks of one family apart."""
    short = name if len(name) <= _NAME else f"\N{HORIZONTAL ELLIPSIS}{name[1 - _NAME :]}"
    return f"{number + 1} {short}"


def _more_tasks(side: SideReport) -> str:
    number = len(side.routing.tasks.rows)
    return f" (the first {_MOST_TASKS} of {number} tasks)" if number > _MOST_TASKS else ""


def _titled(title: str, columns: Sequence[str]) -> Titled:
    # One space between columns: a task with eight experts fits into 80 characters.
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(columns[0], overflow="fold", min_width=5)
    _add_columns(table, columns[1:])
    return Titled(title, table)


def _add_columns(table: Table, names: Sequence[str]) -> None:
    for name in names:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))


def _columns(side: SideReport) -> dict[str, str]:
    """Return the headings of the measures that are shown, each with its measure's name."""
    found = {one for one in _ONLY_WHERE_FOUND if any(layer[one] for layer in side.all)}
    return {
        heading: name
        for heading, name in _COLUMNS.items()
        if name in found or name not in _ONLY_WHERE_FOUND
    }


def _measures(side: SideReport, measures: Sequence[Measures]) -> list[str]:
    """Return what stands under `_columns`, as means of some measures."""
    means = {
        heading: float(np.mean([one[name] for one in measures]))
        for heading, name in _columns(side).items()
    }
    return [
        _percent(mean) if heading.endswith("%") else f"{mean:.2f}"
        for heading, mean in means.items()
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _distance(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _bracketed(value: float, noise: float | None) -> str:
    return f"({value:.2f})" if noise is None or value <= noise else f"{value:.2f}"


def _shares(layer: LayerRouting, columns: int) -> list[str]:
    shares = [f"{100 * share:.0f}" for share in layer.load]
    return [*shares, *[""] * (columns - len(shares))]


def _busiest(layer: LayerRouting) -> str:
    order = np.argsort(-np.array(layer.load), kind="stable")[:_BUSIEST]
    return "  ".join(f"e{expert} {100 * layer.load[expert]:.0f}" for expert in order)
