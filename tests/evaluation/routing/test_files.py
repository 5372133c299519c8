"""What is written can be read again, and nothing is left out without a word."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flanmoe.evaluation.routing import RoutingReport, routing_report, write_routing
from flanmoe.evaluation.routing.counts import RoutingCounts


@pytest.mark.parametrize(
    "names", [["a"], ["a [1,\n 2]", "b", "c"], list("abcdefghijklmnopqrstuvwxyz")]
)
def test_the_json_holds_the_report(
    names: list[str], counts: Callable[..., RoutingCounts], tmp_path: Path
) -> None:
    report = routing_report(
        counts(names), {name: "x" if name in ("a", "b") else "y" for name in names}
    )
    path = write_routing(report, tmp_path)
    assert path == tmp_path / "routing.json"
    assert RoutingReport.parse(json.loads(path.read_text(encoding="utf-8"))) == report
    # Numbers of one list stand in one line.
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) > 30
    assert (tmp_path / "routing.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_an_empty_half_is_null(counts: Callable[..., RoutingCounts], tmp_path: Path) -> None:
    found = counts(["a", "b"])
    found.tokens[0, 1] = 0
    for layer in found.assignments:
        layer[0, 1] = 0
    values = json.loads(write_routing(routing_report(found, {}), tmp_path).read_text())
    noise = values["tasks"]["distances"]["noise"]
    assert noise[0] == [None, None]
    assert noise[1][1] > 0


def test_tasks_without_a_recorded_token_are_named(
    counts: Callable[..., RoutingCounts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_routing(routing_report(counts(["a"]), {"a": "x", "lost": "x"}), tmp_path)
    assert "The routing of `lost` is not recorded" in capsys.readouterr().err
    assert json.loads((tmp_path / "routing.json").read_text())["not_recorded"] == ["lost"]


def test_without_any_token_there_is_no_picture(
    counts: Callable[..., RoutingCounts], tmp_path: Path
) -> None:
    write_routing(routing_report(counts(["a"]).pooled({}), {"a": "x"}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["routing.json"]
