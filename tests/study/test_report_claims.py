"""Claims come first on the page, with their verdicts, and the page of a large study stays readable."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from flanmoe.study import plots
from flanmoe.study.analysis.claim_result import ClaimResult
from flanmoe.study.analysis.factorial import FactorialTable
from flanmoe.study.report import (
    ReportFiles,
    claims_terminal_table,
    html_report,
    markdown_report,
    read_report,
)
from flanmoe.study.report_claims import claim_entries, claims_headline
from flanmoe.study.report_data import ReportData
from flanmoe.study.report_text import verdict
from flanmoe.study.tables import sections, summary
from flanmoe.study.tables.base import TextTable

_VERDICTS = {
    "reproduced": "good",
    "contradicted": "bad",
    "inconclusive": "open",
    "underpowered": "weak",
    "not FLOP-matched": "void",
    "not measured": "void",
}


def _renamed(results: tuple[ClaimResult, ...], *names: str) -> list[ClaimResult]:
    pairs = zip(results, names, strict=False)
    return [one.model_copy(update={"name": name}) for one, name in pairs]


def test_the_headline_counts_and_names(six_claims: tuple[ClaimResult, ...]) -> None:
    assert claims_headline(_renamed(six_claims, *"abcdef")) == (
        "1 of 6 claims reproduced: a; 1 contradicted: b; 1 inconclusive: c; 1 underpowered: d; "
        "1 not FLOP-matched: e; 1 not measured: f."
    )
    assert claims_headline(_renamed(six_claims[1:4], *"bcd")) == (
        "None of 3 claims reproduced; 1 contradicted: b; 1 inconclusive: c; 1 underpowered: d."
    )
    assert claims_headline(_renamed(six_claims[:1], "a")) == "Claim reproduced: a."
    assert claims_headline(_renamed(six_claims[4:5], "e")) == "Claim not FLOP-matched: e."
    alike = _renamed((six_claims[0],) * 5, *"abcde")
    assert claims_headline(alike) == "5 of 5 claims reproduced: a, b, c and 2 more."


def test_claims_decide_the_verdict_of_the_page(
    two_arms: ReportData, six_claims: tuple[ClaimResult, ...]
) -> None:
    assert verdict(two_arms.model_copy(update={"claims": six_claims})) == claims_headline(
        six_claims
    )
    assert verdict(two_arms).startswith("Against dense, sparse after tuning")


class _Badges(HTMLParser):
    """Collects the text of each badge with the tone of its claim, and the tags of sections in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.badges: list[tuple[str, str]] = []
        self.headings: list[str] = []
        self._tone = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kinds = (dict(attrs).get("class") or "").split()
        if "claim" in kinds:
            self._tone = kinds[-1]
        self._inside = "badge" if "badge" in kinds else tag

    def handle_data(self, data: str) -> None:
        if self._inside == "badge":
            self.badges.append((data, self._tone))
        if self._inside in ("h1", "h2", "summary"):
            self.headings.append(data)
        self._inside = ""


def test_each_verdict_has_its_badge(many_arms_html: str) -> None:
    assert _Badges(many_arms_html).badges == list(_VERDICTS.items())


def test_claims_come_before_everything_else(
    many_arms_files: ReportFiles, many_arms_html: str
) -> None:
    headings = _Badges(many_arms_html).headings
    assert headings[:4] == [
        headings[0],
        "Claims",
        "Claims: estimates against margins",
        "What the differences show",
    ]
    assert headings.index("Claims in numbers") < headings.index("Effects of factors")
    assert headings.index("Effects of factors") < headings.index("Paired differences")
    markdown = many_arms_files.markdown.read_text(encoding="utf-8")
    places = [
        markdown.index(text)
        for text in (
            "\n**1 of 6 claims",
            "\n## Claims\n",
            "\n## Summary\n",
            "\n## What the differences",
        )
    ]
    assert places == sorted(places)


def test_a_report_without_claims_or_differences(
    one_dense_arm: ReportData, two_arms_html: str, six_claims: tuple[ClaimResult, ...]
) -> None:
    assert 'id="claims"' not in two_arms_html
    assert "Claims" not in markdown_report(one_dense_arm)
    only_claims = one_dense_arm.model_copy(update={"claims": six_claims})
    assert "What the differences show" not in markdown_report(only_claims)
    assert "What the differences show" not in html_report(only_claims)


def test_markdown_holds_every_claim_with_its_numbers(
    many_arms_files: ReportFiles, six_claims: tuple[ClaimResult, ...]
) -> None:
    markdown = many_arms_files.markdown.read_text(encoding="utf-8")
    for claim in six_claims:
        assert (
            f"- **{claim.verdict}** `{claim.name}`: {claim.statement}\n  {claim.sentence}"
            in markdown
        )
    assert (
        "(estimate +4.1 percentage points; 95 % interval +2.8 to +5.4; p (Holm) 0.002; detectable 1.8; "
        "margin 2.0; same FLOPs per token yes)"
    ) in markdown
    assert "margin 2.0; same FLOPs per token no)" in markdown


def test_a_failed_control_is_said(six_claims: tuple[ClaimResult, ...]) -> None:
    remarks = [entry.remarks for entry in claim_entries(six_claims)]
    assert [bool(found) for found in remarks] == [False, False, True, False, False, False]
    assert remarks[2] == (
        "The control failed: a planted effect was found in 41 % of the copies with it, and one in 3 % of the "
        "copies without. The numbers of this claim cannot be trusted.",
    )


def test_claims_and_effects_survive_the_file(
    many_arms: ReportData, many_arms_files: ReportFiles
) -> None:
    found = read_report(many_arms_files.json)
    assert found.claims == many_arms.claims
    assert found.effects == many_arms.effects
    assert found == many_arms


def test_a_report_written_before_claims_can_be_read(two_arms: ReportData, tmp_path: Path) -> None:
    values = two_arms.to_mapping()
    del values["claims"], values["effects"]
    for arm in values["arms"]:
        for curve in arm["curves"]:
            for point in curve["points"]:
                del point["flops"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(values))
    assert read_report(path) == two_arms


def test_the_terminal_table_fits_100_columns(two_arms: ReportData, many_arms: ReportData) -> None:
    assert claims_terminal_table(two_arms) is None
    table = claims_terminal_table(many_arms)
    assert table is not None
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    for words in (
        *_VERDICTS,
        "frozen-router-is-harmless",
        "+4.1 percentage points",
        "(+2.8 to +5.4)",
        "11.2 / 4.0",
        "n/a / 2.0",
    ):
        assert words in text


def test_the_page_of_a_large_study_stays_small(many_arms: ReportData, many_arms_html: str) -> None:
    assert len(many_arms.arms) == 25
    assert len(many_arms_html.encode()) < 1_000_000
    assert many_arms_html.count('id="figure-expert-load-') == 4
    table = summary(many_arms)
    assert [row[0] for row in table.rows] == [arm.label for arm in many_arms.arms]
    assert table.header[1:3] == ("Loss after", "Accuracy after")


def test_tables_of_many_arms_have_few_columns(many_arms: ReportData) -> None:
    found = {section.title: section for section in sections(many_arms)}
    for section in found.values():
        for table in section.tables:
            assert len(table.header) <= 16, section.title
            assert {len(row) for row in table.rows} <= {len(table.header)}
    by_task = found["Scores by task"].tables[0]
    assert len(by_task.rows) == 3 * 25
    assert by_task.rows[1][:3] == ("exemplars/bbh/boolean_expressions", "dense-flan-finetune", "61")
    assert len(found["Training loss"].tables[0].rows) == 75
    assert len(found["Routing"].tables) == 1 + 4 * 2


def _table(many_arms: ReportData, title: str) -> TextTable:
    section = next(one for one in sections(many_arms) if one.title == "Effects of factors")
    return next(table for table in section.tables if table.title == title)


def test_effects_have_both_readings_of_relative_gain(
    many_arms: ReportData, two_effect_tables: tuple[FactorialTable, ...]
) -> None:
    mains = _table(many_arms, "Main effects: accuracy (percentage points)")
    assert mains.header[-2:] == ("ratio of means", "mean of ratios")
    assert mains.rows[0][0] == "router gshard over switch"
    assert {row[-2:] for row in mains.rows} == {("+13.1 %", "+17.4 %")}
    first = two_effect_tables[0].effects[0]
    assert mains.rows[0][1] == first.metric.text(first.estimate)
    without = _table(many_arms, "Main effects: normalised accuracy (normalised points)")
    assert {row[-2:] for row in without.rows} == {("none [1]", "none [2]")}
    assert "[2] mean of ratios: A relative gain needs finite scores" in without.note
    both = _table(many_arms, "Interactions: accuracy (percentage points)")
    assert "ratio of means" not in both.header
    assert len(both.rows) == 13
    section = next(one for one in sections(many_arms) if one.title == "Effects of factors")
    assert "for want of scores: switch-flan-finetune." in section.sentences[1]


def test_of_very_many_interactions_the_clearest_are_shown(
    two_arms: ReportData, two_effect_tables: tuple[FactorialTable, ...]
) -> None:
    both = two_effect_tables[0].effects[-1]
    many = tuple(
        both.model_copy(update={"name": f"pair {number}", "p": 1 - number / 100})
        for number in range(70)
    )
    effects = (two_effect_tables[0].model_copy(update={"effects": many}),)
    table = _table(
        two_arms.model_copy(update={"effects": effects}),
        "Interactions: accuracy (percentage points)",
    )
    assert [row[0] for row in table.rows] == [f"pair {number}" for number in range(10, 70)]
    assert "The 60 of 70 with the smallest p-values; report.json has all." in table.note


def test_the_forest_plot_says_every_claim_in_words(six_claims: tuple[ClaimResult, ...]) -> None:
    drawing = plots.claims(six_claims)
    assert drawing is not None
    for claim in six_claims:
        assert f"{claim.name}: {claim.verdict}" in drawing.alt
    assert (
        "estimate +4.1 percentage points (interval +2.8 to +5.4), detectable 1.8, margin 2.0"
        in drawing.alt
    )
    for unit in ("percentage points", "nats per token", "normalised points"):
        assert f"({unit})" in drawing.svg
    assert plots.claims(()) is None


@pytest.mark.parametrize("number", [1, 20])
def test_the_forest_plot_holds_one_claim_or_twenty(
    six_claims: tuple[ClaimResult, ...], number: int
) -> None:
    several = tuple(
        six_claims[place % 6].model_copy(update={"name": f"claim-{place}"})
        for place in range(number)
    )
    drawing = plots.claims(several)
    assert drawing is not None
    assert all(f">claim-{place}<" in drawing.svg for place in range(number))


def test_a_margin_is_marked_where_the_claim_points(six_claims: tuple[ClaimResult, ...]) -> None:
    def ticks(claim: ClaimResult) -> int:
        drawing = plots.claims((claim,))
        assert drawing is not None
        # Upright lines of the margin are the only ones of this width inside the axes.
        return len(re.findall(r'clip-path="[^"]*" style="[^"]*stroke-width: 1\.6', drawing.svg))

    assert [ticks(claim) for claim in six_claims[:3]] == [1, 1, 2]
