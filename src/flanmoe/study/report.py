"""Writing the report of a study: `report.json`, `report.md`, `report.html`, and the table for the terminal.

Pure functions of `ReportData`. The HTML is one file without scripts and without anything to fetch.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from rich.table import Table

from flanmoe.core import files
from flanmoe.study import plots
from flanmoe.study.plots import Drawing
from flanmoe.study.report_claims import (
    ClaimEntry,
    claim_entries,
    detectable_text,
    estimate_text,
    interval_text,
    margin_text,
)
from flanmoe.study.report_data import ReportData
from flanmoe.study.report_limits import limits
from flanmoe.study.report_text import EVIDENCE_RULE, difference_sentences, verdict
from flanmoe.study.tables import Section, TextTable, sections, summary
from flanmoe.study.tables.terminal import TerminalTable


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where a report was written."""

    json: Path
    markdown: Path
    html: Path


@dataclass(frozen=True, slots=True)
class _Page:
    """What the templates are given."""

    data: ReportData
    verdict: str
    claims: tuple[ClaimEntry, ...]
    claims_drawing: Drawing | None
    differences: tuple[tuple[str, str], ...]
    evidence_rule: str
    summary: TextTable
    drawings: tuple[Drawing, ...]
    limits: tuple[str, ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]


def write_report(data: ReportData, folder: Path) -> ReportFiles:
    """Write the three files of the report into `folder`, each whole or not at all.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    page = _page(data)
    written = ReportFiles(folder / "report.json", folder / "report.md", folder / "report.html")
    files.write_json(written.json, data.to_mapping())
    files.write_text(written.markdown, _render("report.md.j2", page))
    files.write_text(written.html, _render("report.html.j2", page))
    return written


def read_report(path: Path) -> ReportData:
    """Read a `report.json` again.

    Raises:
        ConfigError: if it does not hold the data of a report.
    """
    return ReportData.parse(files.read_json_file(path), origin=str(path))


def markdown_report(data: ReportData) -> str:
    """Return the report as Markdown."""
    return _render("report.md.j2", _page(data))


def html_report(data: ReportData) -> str:
    """Return the report as one self-contained HTML page."""
    return _render("report.html.j2", _page(data))


def summary_table(data: ReportData) -> TerminalTable:
    """Return the key table for the terminal; see `tables.summary`."""
    return TerminalTable(replace(summary(data), title=data.study))


def claims_terminal_table(data: ReportData) -> Table | None:
    """Return the claims and their verdicts for the terminal; None where the study makes none."""
    if not data.claims:
        return None
    caption = "Detectable: the smallest difference that 80 % of studies of this design would find."
    table = Table(title="Claims", caption=caption, caption_justify="left", title_justify="left")
    table.add_column("claim", overflow="fold")
    table.add_column("verdict", style="bold", no_wrap=True)
    table.add_column("estimate\n(95 % interval)", justify="right")
    table.add_column("detectable\n/ margin", justify="right")
    for one in data.claims:
        estimate = "not measured"
        if one.measurement is not None:
            estimate = f"{estimate_text(one)} {one.metric.unit}\n({interval_text(one)})"
        sizes = f"{detectable_text(one)} / {margin_text(one)}"
        table.add_row(one.name, one.verdict, estimate, sizes)
    return table


def _page(data: ReportData) -> _Page:
    return _Page(
        data=data,
        verdict=verdict(data),
        claims=claim_entries(data.claims),
        claims_drawing=plots.claims(data.claims),
        differences=difference_sentences(data.comparisons),
        evidence_rule=EVIDENCE_RULE,
        summary=summary(data),
        drawings=plots.drawings(data),
        limits=limits(data),
        notes=(*data.warnings, *data.notes),
        sections=sections(data),
    )


def _render(template: str, page: _Page) -> str:
    environment = Environment(
        loader=PackageLoader("flanmoe", "study/templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cells"] = _markdown_row
    environment.filters["breakable"] = _breakable
    environment.filters["svg"] = Markup
    return environment.get_template(template).render(page=page)


def _markdown_row(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _breakable(text: str) -> Markup:
    """Let long names break after `/` and `_`, keep a number and its unit together, and set `names` as code."""
    kept = text
    for sign in (" = ", " %", "< "):
        kept = kept.replace(sign, sign.replace(" ", "\N{NO-BREAK SPACE}"))
    broken = re.sub(r"([/_])", r"\1<wbr>", str(escape(kept)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", broken))
