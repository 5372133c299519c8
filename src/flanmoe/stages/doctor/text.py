"""Findings for people: a table for each library, then what each defect means for a run and the way out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from flanmoe.core.console import say, show_table
from flanmoe.stages.doctor.check import Finding

_STYLES = {
    "ok": "green",
    "defect": "bold red",
    "note": "yellow",
    "skipped": "dim",
    "error": "bold magenta",
}
# Findings that someone has to act on, and those that only have something to say.
_EXPLAINED = ("defect", "note")
_MENTIONED = ("skipped", "error")


def show(findings: Sequence[Finding], report: Mapping[str, Any]) -> None:
    """Print the versions, a table for each library, what follows from it, and a line that sums up."""
    say(_header(report))
    for library in dict.fromkeys(finding.library for finding in findings):
        asked = [finding for finding in findings if finding.library == library]
        title = f"model {report['model']}" if library == "model" else library
        show_table(_figures(title, asked))
    if any(finding.status in (*_EXPLAINED, *_MENTIONED) for finding in findings):
        show_table(_explanations(findings))
    say(_summary(report))


def _header(report: Mapping[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {version or '(absent)'}" for name, version in report["installed"].items()
    )
    machine = report["machine"]
    bfloat16 = "with" if machine["bfloat16_instructions"] else "without"
    return (
        f"{versions}; Python {machine['python']}; {machine['cores']} cores, {machine['torch_threads']} torch "
        f"threads, {bfloat16} bfloat16 instructions."
    )


def _figures(library: str, findings: Sequence[Finding]) -> Table:
    version = findings[0].version or ""
    table = Table(
        title=escape(f"{library} {version}".strip()),
        title_justify="left",
        title_style="bold",
        box=SIMPLE,
        expand=True,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True, min_width=7)
    table.add_column("check", ratio=1)
    table.add_column("figure", justify="right", no_wrap=True, min_width=7)
    table.add_column("should be", justify="right", no_wrap=True)
    for finding in findings:
        measured = finding.figure is not None
        table.add_row(
            f"[{_STYLES[finding.status]}]{finding.status}[/]",
            f"[bold]{finding.name}[/bold]: {escape(finding.measures)}",
            _number(finding.figure) if measured else "-",
            _number(finding.expected) if measured else "-",
        )
    return table


def _explanations(findings: Sequence[Finding]) -> Table:
    """Return one block for each meaning and way out; checks that share both are named together."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, overflow="fold")
    blocks: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.status in _EXPLAINED:
            blocks.setdefault((finding.meaning, finding.way_out), []).append(finding)
    for (meaning, way_out), together in blocks.items():
        names = ", ".join(finding.name for finding in together)
        table.add_row("", f"[{_STYLES[together[0].status]}]{names}[/]")
        for finding in together:
            if finding.detail:
                table.add_row("found", escape(finding.detail))
        table.add_row("means", escape(meaning))
        table.add_row("way out", escape(way_out))
        table.add_row("", "")
    reasons: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        if finding.status in _MENTIONED:
            reasons.setdefault((finding.status, finding.detail), []).append(finding.name)
    for (status, reason), names in reasons.items():
        table.add_row(status, f"{', '.join(names)}: {escape(reason)}")
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.2f}" if 0.005 <= abs(value) < 1e4 else f"{value:.0e}"


def _summary(report: Mapping[str, Any]) -> str:
    counts = report["counts"]
    parts = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    return (
        f"{sum(counts.values())} checks in {report['seconds']:.0f} s: {parts}. A defect is one of the library "
        "or the model under whose name it stands, in this version."
    )
