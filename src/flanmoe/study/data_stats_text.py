"""Statistics of data on the terminal: a block for each task, then a line for each."""

from collections.abc import Sequence

from rich.text import Text

from flanmoe.core.console import console, say
from flanmoe.data.statistics import Bin, Summary
from flanmoe.study.data_stats import GroupStatistics, TaskStatistics

_BAR_WIDTH = 40
_LABELS = {
    "tokens": "tokens",
    "prompt_tokens": "tokens of the prompt",
    "response_tokens": "tokens of the response",
    "prompt_characters": "characters of the prompt",
    "response_characters": "characters of the response",
}


def show_statistics(found: Sequence[GroupStatistics]) -> None:
    """Print all groups. On a terminal bars are drawn in colour, elsewhere with plain signs."""
    for group in found:
        say("")
        _heading(group.group.title)
        for name, task in group.tasks.items():
            _show_task(name, task, group.group.packing_length)
        for name, reason in group.left_out.items():
            say(f"{name}: left out of the averages. {reason}")
        say("")
        _show_aligned(_overview(group))


def _show_task(name: str, task: TaskStatistics, packing_length: int | None) -> None:
    say("")
    _heading(name)
    for line in _facts(task, packing_length):
        say(f"  {line}")
    if task.measured:
        _show_aligned(_figures(task), indent="  ")
        _show_histogram(task.histogram)


def _facts(task: TaskStatistics, packing_length: int | None) -> list[str]:
    facts = [f"{task.examples:,} examples, {task.rejected:,} rejected"]
    if task.share is not None:
        shared = "" if task.group is None else f" of `{task.group}` together"
        origin = "by size" if task.rate is None else f"rate {task.rate:g}{shared}"
        tokens = "" if task.token_share is None else f", {_percent(task.token_share)} of the tokens"
        facts.append(f"{_percent(task.share)} of the draws ({origin}){tokens}")
    if task.asked is not None:
        facts.append(f"{task.asked:,} of them asked")
    if task.is_sample:
        facts.append(f"lengths are of a sample of {task.measured + task.without_exemplars:,}")
    if task.without_exemplars:
        facts.append(f"{task.without_exemplars:,} left out: no exemplar fits before the question")
    if task.longer is not None:
        share = f" ({_percent(task.longer / task.measured, digits=2)})" if task.longer else ""
        facts.append(f"{task.longer:,} longer than a row of {packing_length:,} tokens{share}")
    return facts


def _figures(task: TaskStatistics) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "mean", "median", "95 %", "most")]
    for key, label in _LABELS.items():
        found = task.lengths[key]
        if found is not None:
            rows.append((label, *_written(found)))
    return rows


def _written(found: Summary) -> tuple[str, ...]:
    return f"{found.mean:,.1f}", f"{found.median:,.0f}", f"{found.p95:,}", f"{found.maximum:,}"


def _show_histogram(bins: Sequence[Bin]) -> None:
    most = max(each.number for each in bins)
    ranges = [f"{each.above + 1:,} to {each.at_most:,} tokens" for each in bins]
    width = max(map(len, ranges))
    sign = "█" if console.is_terminal else "#"
    for each, label in zip(bins, ranges, strict=True):
        # One example is seen too, beside however many.
        length = max(round(_BAR_WIDTH * each.number / most), 1) if each.number else 0
        line = Text(f"  {label:>{width}}  ")
        line.append(sign * length, style="green")
        line.append(f" {each.number:,}")
        console.print(line, soft_wrap=True, highlight=False)


def _overview(group: GroupStatistics) -> list[tuple[str, ...]]:
    """Return a line for each task and one for all, without columns that would be empty."""
    header = (
        "task",
        "examples",
        "rejected",
        "asked",
        "of draws",
        "of tokens",
        "tokens",
        "too long",
    )
    rows = [_overview_row(name, task) for name, task in group.tasks.items()]
    if len(rows) > 1:
        rows.append(_totals_row(group))
    columns = [
        column for column in zip(header, *rows, strict=True) if any(cell for cell in column[1:])
    ]
    return list(zip(*columns, strict=True))


def _overview_row(name: str, task: TaskStatistics) -> tuple[str, ...]:
    return (
        name,
        f"{task.examples:,}",
        f"{task.rejected:,}",
        _count(task.asked),
        "" if task.share is None else _percent(task.share),
        "" if task.token_share is None else _percent(task.token_share),
        _tokens(task.tokens, is_sample=task.is_sample),
        _count(task.longer),
    )


def _totals_row(group: GroupStatistics) -> tuple[str, ...]:
    totals = group.totals()
    return (
        "all",
        f"{totals['examples']:,}",
        f"{totals['rejected']:,}",
        _count(totals["asked"]),
        "",
        "",
        _tokens(totals["tokens"], is_sample=totals["is_sample"]),
        _count(totals["longer"]),
    )


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _tokens(number: float, *, is_sample: bool) -> str:
    return f"about {number:,.0f}" if is_sample else f"{number:,.0f}"


def _percent(share: float, *, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _heading(text: str) -> None:
    console.print(Text(text, style="bold"), soft_wrap=True, highlight=False)


def _show_aligned(rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
    """Print columns, the first to the left and numbers to the right; a line is never cut in two."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *numbers = row
        aligned = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True)]
        say(f"{indent}{first:<{widths[0]}}  {'  '.join(aligned)}".rstrip())
