"""What a run keeps of how its study was written, and where the report shows it."""

from pathlib import Path

import pytest

from flanmoe.core.rundir import RunDir
from flanmoe.study.report import html_report, markdown_report, read_report, write_report
from flanmoe.study.report_data import ReportData
from flanmoe.study.study_file import as_written
from flanmoe.study.written import WRITTEN_FILE, WrittenStudy, written_study


def test_the_files_of_a_study_are_its_own_and_those_it_includes(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("name: one")
    (tmp_path / "two.yaml").write_text("name: two\ninclude: [one.yaml]")
    (tmp_path / "all.yaml").write_text("name: all\ninclude: [two.yaml]")
    found = as_written(tmp_path / "all.yaml", profile="smoke", overrides=["seeds=[1]", "a.b=2"])
    assert list(found.files) == ["all.yaml", "two.yaml", "one.yaml"]
    assert found.files["one.yaml"] == "name: one"
    assert found.options == "--profile smoke --set seeds=[1] --set a.b=2"


def test_a_study_from_python_shows_its_resolved_recipe(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_text("recipe.yaml", "name: resolved")
    assert written_study(run).files == {"recipe.yaml": "name: resolved"}
    written = WrittenStudy(files={"mine.yaml": "name: mine"}, profile="cpu")
    run.write_json(WRITTEN_FILE, written.to_mapping())
    assert written_study(run) == written


@pytest.fixture
def shown(two_arms: ReportData) -> ReportData:
    """A report of a study with a file."""
    written = WrittenStudy(files={"mine.yaml": "arms: {a: <b>}"}, profile="cpu")
    return two_arms.model_copy(update={"written": written})


def test_the_report_shows_the_recipe_last(shown: ReportData, tmp_path: Path) -> None:
    page, text = html_report(shown), markdown_report(shown)
    assert "arms: {a: &lt;b&gt;}" in page
    assert page.index("arms: {a:") > page.index("Versions and hardware")
    assert text.index("## Recipe") > text.index("## Versions and hardware")
    assert "Started with `--profile cpu`." in text
    assert "```yaml\narms: {a: <b>}\n```" in text
    assert read_report(write_report(shown, tmp_path).json).written == shown.written


def test_a_report_without_it_has_no_such_section(two_arms: ReportData) -> None:
    assert "## Recipe" not in markdown_report(two_arms)
    assert "Recipe</summary>" not in html_report(two_arms)
