"""`metrics.jsonl` and `routing.jsonl`, and how a resumed run goes on with them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flanmoe.core.rundir import RunDir
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.alerts import AlertConfig
from flanmoe.moe.routing_measures import MEASURES
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.callbacks.metrics_log import METRICS_FILE, MetricsLog
from flanmoe.training.callbacks.routing_alerts import RoutingAlerts
from flanmoe.training.callbacks.routing_log import ROUTING_FILE, RoutingLog
from flanmoe.training.report import StepReport

Report = Callable[..., StepReport]
# Those of the made-up reports (conftest.py).
TASKS = ("boolean", "gsm8k", "unused")


def routing_log(run: RunDir) -> RoutingLog:
    blocks = moe_blocks(tiny_model("mixtral", num_local_experts=3))
    alerts = RoutingAlerts(AlertConfig(), blocks)
    return RoutingLog(run, blocks, task_names=TASKS, alerts=alerts)


def test_metrics_of_a_sparse_and_a_dense_step(tmp_path: Path, report: Report) -> None:
    log = MetricsLog(RunDir(tmp_path))
    log.start(0)
    log.after_step(report(1))
    log.after_step(report(2, sparse=False))
    sparse, dense = RunDir(tmp_path).rows(METRICS_FILE)
    assert sparse == {
        "step": 1,
        "tokens": 30,
        "loss": 1.535,
        "loss/cross_entropy": 1.5,
        "learning_rate": 1e-4,
        "gradient_norm": 0.5,
        "router/balance_raw": 3.0,
        "router/balance_weighted": 0.03,
        "router/importance_raw": 0.5,
        "router/importance_weighted": 0.0,
        "router/z_raw": 5.0,
        "router/z_weighted": 0.005,
        "routing/worst/entropy_share": pytest.approx(0.5118595, abs=1e-6),
        "routing/worst/max_over_mean": 2.25,
        "routing/worst/unused_share": pytest.approx(1 / 3),
        "routing/worst/dropped_share": 0.5,
        "routing/worst/unserved_share": 0.4,
        "routing/worst/logit_rms": 2.0,
        "routing/mean/entropy_share": pytest.approx(0.5713944, abs=1e-6),
        "routing/mean/router_entropy_share": pytest.approx(0.4551196, abs=1e-6),
        "routing/mean/confidence": 0.75,
    }
    assert dense == {name: value for name, value in sparse.items() if "rout" not in name} | {
        "step": 2,
        "tokens": 60,
    }
    assert not any(" " in name for name in sparse)


def test_steps_that_are_made_again_are_cut_off(tmp_path: Path, report: Report) -> None:
    first = MetricsLog(RunDir(tmp_path))
    first.start(0)
    for step in (1, 2, 3):
        first.after_step(report(step))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "tok')
    second = MetricsLog(RunDir(tmp_path))
    second.start(2)
    second.after_step(report(3, cross_entropy=0.25))
    rows = RunDir(tmp_path).rows(METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["tokens"] for row in rows] == [30, 60, 90]
    assert rows[2]["loss/cross_entropy"] == 0.25


def test_routing_of_a_step_and_of_the_run(tmp_path: Path, report: Report) -> None:
    log = routing_log(RunDir(tmp_path))
    log.start(0)
    log.after_step(report(1))
    log.after_step(report(2))
    rows = RunDir(tmp_path).rows(ROUTING_FILE)
    assert [row["step"] for row in rows] == [1, 2]
    assert list(rows[1]) == ["step", "layers", "worst", "mean", "tasks", "alerts"]
    first, second = rows[1]["layers"]
    assert (first["layer"], first["balance"], first["counts"]) == (0, 2.0, [3, 0, 1])
    assert (second["layer"], second["balance"], second["counts"]) == (1, 4.0, [2, 2, 0])
    assert first["load"] == [0.75, 0.0, 0.25]
    assert first["unused_share"] == pytest.approx(1 / 3)
    assert (first["name"], second["name"]) == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert (first["dropped_share"], first["unserved_share"]) == (0.5, 0.4)
    # Nobody asked where experts choose.
    assert (second["dropped_share"], second["unserved_share"]) == (0.0, 0.2)
    assert set(first) == {"layer", "name", "balance", "tokens", "counts", "load", *MEASURES}
    together = [layer.together() for layer in log.sums]
    assert [layer.assignments.tolist() for layer in together] == [[[6, 0, 2]], [[4, 4, 0]]]
    assert [int(layer.dropped) for layer in together] == [8, 0]


def test_each_task_of_a_step_has_its_measures(tmp_path: Path, report: Report) -> None:
    log = routing_log(RunDir(tmp_path))
    log.after_step(report(1))
    (row,) = RunDir(tmp_path).rows(ROUTING_FILE)
    assert list(row["tasks"]) == ["boolean", "gsm8k"]
    boolean, gsm8k = row["tasks"].values()
    assert boolean["tokens"] == [3, 3]
    assert boolean["dropped_share"] == [0.6, 0.0]
    assert boolean["unserved_share"] == pytest.approx([2 / 3, 1 / 3])
    assert gsm8k["entropy_share"] == pytest.approx([0.6309298, 0.0], abs=1e-6)
    assert gsm8k["max_over_mean"] == [1.5, 3.0]
    assert boolean["confidence"] == gsm8k["confidence"] == [0.75, 0.75]
    assert log.sums[0].assignments.tolist() == [[2, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_names_of_metrics_are_paths_in_the_row(tmp_path: Path, report: Report) -> None:
    log = routing_log(RunDir(tmp_path))
    log.after_step(made := report(1))
    (row,) = RunDir(tmp_path).rows(ROUTING_FILE)
    row |= {layer["name"]: layer for layer in row["layers"]}
    assert made.router is not None
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    metrics = made.metrics() | made.router.layer_metrics(names)
    told = {name: value for name, value in metrics.items() if name.startswith("routing/")}
    assert len(told) == 6 + 3 + 2 * len(MEASURES)
    for name, value in told.items():
        _, place, measure = name.split("/")
        assert row[place][measure] == value, name


def test_the_sums_of_a_run_survive(tmp_path: Path, report: Report) -> None:
    first = routing_log(RunDir(tmp_path))
    first.after_step(report(1))
    state = json.loads(json.dumps(first.state_dict()))
    first.after_step(report(2))
    second = routing_log(RunDir(tmp_path))
    second.load_state_dict(state)
    second.start(1)
    second.after_step(report(2))
    assert second.state_dict() == first.state_dict()
    assert [row["step"] for row in RunDir(tmp_path).rows(ROUTING_FILE)] == [1, 2]


def test_a_dense_step_leaves_no_routing(tmp_path: Path, report: Report) -> None:
    log = RoutingLog(RunDir(tmp_path), [], task_names=(), alerts=RoutingAlerts(AlertConfig(), []))
    log.start(0)
    log.after_step(report(1, sparse=False))
    assert not (tmp_path / ROUTING_FILE).exists()
