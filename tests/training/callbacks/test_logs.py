"""`metrics.jsonl` and `routing.jsonl`, and how a resumed run goes on with them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flanmoe.core.rundir import RunDir
from flanmoe.models.blocks import moe_blocks
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.callbacks.metrics_log import METRICS_FILE, MetricsLog
from flanmoe.training.callbacks.routing_log import ROUTING_FILE, RoutingLog
from flanmoe.training.report import StepReport

Report = Callable[..., StepReport]


def routing_log(run: RunDir) -> RoutingLog:
    return RoutingLog(run, moe_blocks(tiny_model("mixtral", num_local_experts=3)))


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
    }
    assert dense == {name: value for name, value in sparse.items() if "router" not in name} | {
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
    first, second = rows[1]["layers"]
    assert (first["layer"], first["balance"], first["counts"]) == (0, 2.0, [3, 0, 1])
    assert (second["layer"], second["balance"], second["counts"]) == (1, 4.0, [2, 2, 0])
    assert first["fractions"] == [0.75, 0.0, 0.25]
    assert first["unused_share"] == pytest.approx(1 / 3)
    assert [layer["counts"] for layer in log.load.to_mapping()] == [[6, 0, 2], [4, 4, 0]]
    assert (first["name"], second["name"]) == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert (first["dropped_share"], first["unserved_share"]) == (0.5, 0.4)
    # Nobody asked where experts choose.
    assert (second["dropped_share"], second["unserved_share"]) == (0.0, 0.2)
    assert [layer.counts.tolist() for layer in log.drops] == [[16, 8, 10, 4], [0, 0, 10, 2]]


def test_the_load_of_a_run_survives(tmp_path: Path, report: Report) -> None:
    first = routing_log(RunDir(tmp_path))
    first.after_step(report(1))
    state = first.state_dict()
    first.after_step(report(2))
    second = routing_log(RunDir(tmp_path))
    second.load_state_dict(state)
    second.start(1)
    second.after_step(report(2))
    assert second.load.to_mapping() == first.load.to_mapping()
    assert [layer.to_mapping() for layer in second.drops] == [
        layer.to_mapping() for layer in first.drops
    ]
    assert [row["step"] for row in RunDir(tmp_path).rows(ROUTING_FILE)] == [1, 2]


def test_a_dense_step_leaves_no_routing(tmp_path: Path, report: Report) -> None:
    log = RoutingLog(RunDir(tmp_path), [])
    log.start(0)
    log.after_step(report(1, sparse=False))
    assert not (tmp_path / ROUTING_FILE).exists()
