"""The report holds every number, fetches nothing, and copes with what is missing."""

import json
import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from flanmoe.core.errors import ConfigError, DiskError
from flanmoe.study.arm_report import CurvePoint, Evaluation, ExpertLoadReport, LossCurve, Score
from flanmoe.study.report import (
    html_report,
    markdown_report,
    read_report,
    summary_table,
    write_report,
)
from flanmoe.study.report_data import ReportData
from flanmoe.study.tables import summary

_VOID = {"meta", "link", "br", "hr", "img", "input", "wbr", "col"}


class _Page(HTMLParser):
    """Checks that tags close in order, and collects what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def test_writes_three_files_that_agree(
    two_arms: ReportData, two_arms_html: str, tmp_path: Path
) -> None:
    written = write_report(two_arms, tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == ["report.html", "report.json", "report.md"]
    assert read_report(written.json) == two_arms
    assert written.markdown.read_text(encoding="utf-8") == markdown_report(two_arms)
    assert written.html.read_text(encoding="utf-8") == two_arms_html
    assert stat.S_IMODE(written.html.stat().st_mode) & 0o444 == 0o444


def test_the_report_is_the_same_every_time(two_arms: ReportData, two_arms_html: str) -> None:
    assert html_report(two_arms) == two_arms_html


def test_html_is_well_formed_and_its_references_resolve(two_arms_html: str) -> None:
    html = two_arms_html
    page = _Page(html)
    assert len(page.ids) == len(set(page.ids))
    links = [value for name, value in page.attributes if name in ("href", "xlink:href")]
    targets = {link[1:] for link in links if not link.startswith("data:")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", html))
    labelled = " ".join(value for name, value in page.attributes if name == "aria-labelledby")
    targets |= set(labelled.split())
    assert targets
    assert targets <= set(page.ids)


def test_html_fetches_nothing_and_runs_nothing(two_arms_html: str) -> None:
    html = two_arms_html
    page = _Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    references += re.findall(r"url\(([^)]*)\)", html)
    assert all(reference.startswith(("#", "data:")) for reference in references)
    assert "@import" not in html
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # Names of XML vocabularies are no addresses that anything fetches.
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.findall(r"https?://", without_namespaces)


def test_html_follows_the_reader_s_colour_scheme_and_screen(two_arms_html: str) -> None:
    html = two_arms_html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in html
    assert html.count('<div class="scroll"') == html.count("<table>")
    assert not re.search(r"<svg[^>]*\b(width|height)=", html)


def test_text_from_the_data_cannot_become_markup(two_arms: ReportData) -> None:
    hostile = two_arms.model_copy(
        update={"notes": ("<script>alert(1)</script>",), "scale": "a | b & <b>"}
    )
    page = _Page(html_report(hostile))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    arms = tuple(arm.model_copy(update={"label": f"<i>{arm.label}|x"}) for arm in two_arms.arms)
    relabelled = two_arms.model_copy(update={"arms": arms, "baseline": ""})
    assert "i" not in _Page(html_report(relabelled)).tags
    assert "<i>dense\\|x" in markdown_report(relabelled)


def test_verdict_comes_first(two_arms: ReportData, two_arms_html: str) -> None:
    page = _Page(two_arms_html)
    body = page.text[page.text.index("flanmoe quickstart") :]
    assert body.index("Against dense, sparse") < body.index("Parameters, total")
    assert (
        markdown_report(two_arms).splitlines()[2].startswith("**Against dense, sparse after tuning")
    )


def _leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}")]
    if isinstance(value, list):
        return [
            leaf for number, item in enumerate(value) for leaf in _leaves(item, f"{path}.{number}")
        ]
    return [(path, value)]


def _written_forms(path: str, number: float) -> set[str]:
    """Every way in which a number of the data may be shown."""
    minus = "\N{MINUS SIGN}"
    forms = {f"{number:,}", f"{number:g}", f"{number:.2e}"}
    forms |= {f"{number:.{digits}f}".replace("-", minus) for digits in (1, 3, 4)}
    forms |= {f"{100 * number:.1f}".replace("-", minus), f"{number:.4g}"}
    forms |= {f"{number / 2**30:.2f} GiB", f"{number / 2**20:.1f} MiB"}
    forms |= {f"{number / scale:#.4g} {suffix}" for scale, suffix in ((1e6, "M"), (1e12, "T"))}
    return forms


def _is_inside_a_curve(path: str, data: ReportData) -> bool:
    match = re.match(r"\.arms\.(\d+)\.curves\.(\d+)\.points\.(\d+)\.", path)
    if match is None:
        return False
    arm, curve, point = map(int, match.groups())
    return 0 < point < len(data.arms[arm].curves[curve].points) - 1


def test_markdown_shows_every_number(two_arms: ReportData) -> None:
    markdown = markdown_report(two_arms)
    leaves = _leaves(json.loads(json.dumps(two_arms.to_mapping())))
    numbers = [(path, value) for path, value in leaves if isinstance(value, int | float)]
    assert len(numbers) > 400
    missing = [
        (path, value)
        for path, value in numbers
        if not _is_inside_a_curve(path, two_arms)
        and not any(form in markdown for form in _written_forms(path, value))
    ]
    assert missing == []


def test_markdown_shows_every_name_and_sentence(two_arms: ReportData) -> None:
    markdown = markdown_report(two_arms)
    shown = {"study", "description", "scale", "created", "label", "task", "cpu", "reference"}
    names = [
        value
        for path, value in _leaves(two_arms.to_mapping())
        if path.rpartition(".")[2] in shown
        or re.match(r"\.(versions|notes|limits|data\.held)", path)
    ]
    assert len(names) > 20
    assert [name for name in names if str(name) not in markdown] == []


def test_markdown_tables_have_as_many_cells_in_every_row(two_arms: ReportData) -> None:
    blocks = re.findall(r"(?:^\|.*\n)+", markdown_report(two_arms), flags=re.MULTILINE)
    assert len(blocks) >= 10
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}
        assert len(widths) == 1, block
        assert re.fullmatch(r"\| ---( \| ---:)+ \|", block.splitlines()[1])


def test_one_dense_arm_without_accuracy_or_comparisons(one_dense_arm: ReportData) -> None:
    markdown = markdown_report(one_dense_arm)
    page = _Page(html_report(one_dense_arm))
    assert "No paired comparison was made, so this report claims no difference." in markdown
    assert "| Loss before |" not in markdown
    assert "| Accuracy after | no choices |" in markdown
    assert "expert" not in markdown.lower()
    assert "Better" not in page.text
    assert "Expert load" not in page.text
    assert page.tags.count("svg") == 2


def test_an_arm_that_was_never_evaluated(one_dense_arm: ReportData) -> None:
    arm = one_dense_arm.arms[0].model_copy(update={"after": None, "curves": ()})
    bare = one_dense_arm.model_copy(update={"arms": (arm,)})
    assert "Loss" not in markdown_report(bare).split("## What the differences show")[0]
    assert "svg" not in _Page(html_report(bare)).tags


def test_a_diverged_run_still_gets_its_report(one_dense_arm: ReportData, tmp_path: Path) -> None:
    nan = float("nan")
    arm = one_dense_arm.arms[0].model_copy(
        update={
            "curves": (LossCurve(seed=0, points=(CurvePoint(tokens=10, loss=nan),)),),
            "after": Evaluation(loss=Score(mean=nan, standard_error=nan, num_examples=4)),
        }
    )
    written = write_report(one_dense_arm.model_copy(update={"arms": (arm,)}), tmp_path)
    assert "| Loss after | not finite |" in written.markdown.read_text(encoding="utf-8")
    assert read_report(written.json).arms[0].curves[0].points[0].loss is None


def test_many_experts_stay_a_page(two_arms: ReportData) -> None:
    dense, sparse = two_arms.arms
    shares = tuple(tuple(1 / 128 for _ in range(128)) for _ in range(48))
    load = ExpertLoadReport(layers=tuple(range(48)), shares=shares)
    wide = two_arms.model_copy(
        update={"arms": (dense, sparse.model_copy(update={"expert_load": load}))}
    )
    html = html_report(wide)
    _Page(html)
    assert len(html) < 2_000_000
    assert "0 of 6144" in html


def test_terminal_table_fits_80_columns(two_arms: ReportData) -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary_table(two_arms))
    console.file.close()
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    for words in (
        "dense",
        "sparse",
        "134.5 M",
        "373.2 M",
        "304.6 M",
        "127.2 k",
        "8 min 18 s",
        "7.42 GiB",
    ):
        assert words in text
    for words in ("1.912 ± 0.044", "1.652 ± 0.044", "41.2 % ± 3.4", "43.1 % ± 3.4", "× even"):
        assert words in text


def test_many_arms_have_a_row_each_and_only_what_differs_has_a_column(two_arms: ReportData) -> None:
    dense = two_arms.arms[0].model_copy(update={"before": None, "description": "tune"})
    arms = [dense.model_copy(update={"label": f"arm-{number}"}) for number in range(6)]
    ledger = dense.ledger.model_copy(update={"seconds": dense.ledger.seconds + 60})
    arms[2] = arms[2].model_copy(update={"ledger": ledger})
    found = summary(two_arms.model_copy(update={"arms": tuple(arms), "baseline": "arm-0"}))
    assert found.header == ("", "Time of tuning")
    assert [row[0] for row in found.rows] == [arm.label for arm in arms]
    assert len({row[1] for row in found.rows}) == 2
    assert found.note.startswith(
        "The same in every arm: Loss after: 1.671 ± 0.044; Accuracy after: "
    )
    assert "Every arm: tune." in found.note
    assert "before" not in found.note
    assert len(summary(two_arms).header) == 3


def test_a_foreign_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"study": "x", "arms": []}')
    with pytest.raises(ConfigError, match=r"report\.json has 1 problem:\n  arms: "):
        read_report(path)


def test_a_disk_that_cannot_be_written(
    one_dense_arm: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskError, match=r"Writing .*report\.json failed"):
        write_report(one_dense_arm, tmp_path / "run")
