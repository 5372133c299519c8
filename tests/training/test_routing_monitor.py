"""Routing while a model trains: the same sums however a step is cut, by task, and a collapse is noticed."""

import json
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed, PackedPair
from flanmoe.data.packing import TokenizedExample, pack
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.moe.routing_measures import MEASURES
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.testing.tuning import tune_rows
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.report import StepReport
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer
from flanmoe.training.tune import TuneResult

pytestmark = pytest.mark.slow

Rows = Callable[..., list[Packed]]
SCRIPT = Path(__file__).parent / "scripts" / "routing_of_two.py"
TASKS = ("arithmetic", "boolean", "cloze")


def with_tasks(rows: Sequence[Any]) -> list[Any]:
    """Deal out three tasks to the examples of rows."""
    place = iter(range(10**6))
    return [replace(row, tasks=tuple(TASKS[next(place) % 3] for _ in row.tasks)) for row in rows]


class Reports(StepCallback):
    name = "reports"

    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def after_step(self, report: StepReport) -> None:
        self.steps.append(report)


def sums_of(
    folder: Path, model: PreTrainedModel, rows: Sequence[Any], **settings: Any
) -> list[RoutingSums]:
    """Train one step and return the sums of its layers."""
    config = TuneConfig.parse(
        {"precision": "float32", "steps": 1, "rows_per_step": len(rows), **settings}
    )
    reports = Reports()
    trainer = SparseTrainer(
        model,
        training_arguments(config, folder, SeedTree(0)),
        stream=FixedRows(rows, task_names=TASKS),
        router=config.router,
        routing=config.routing,
        callbacks=[reports],
    )
    trainer.train()
    (report,) = reports.steps
    assert report.router is not None
    return list(report.router.routing)


def require_same(found: Sequence[RoutingSums], expected: Sequence[RoutingSums]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        for name, value in one.tensors().items():
            torch.testing.assert_close(value, other.tensors()[name], rtol=1e-6, atol=1e-9, msg=name)


COACTIVATION = {"routing": {"coactivation": True}}


def written_out(model: PreTrainedModel, rows: Sequence[Packed]) -> list[RoutingSums]:
    """Every example by itself, without packing, padding or a trainer."""
    blocks = moe_blocks(model)
    total = [RoutingSums.none(3, block.num_experts, coactivation=True) for block in blocks]
    for row in rows:
        for number, task in enumerate(row.tasks, start=1):
            ids = torch.as_tensor(row.input_ids[row.segment_ids == number]).unsqueeze(0)
            with torch.no_grad(), RoutingRecorder(blocks).recording() as layers:
                model(input_ids=ids, use_cache=False)
            groups = torch.full((ids.numel(),), TASKS.index(task))
            found = [
                RoutingSums.of(layer, groups, num_groups=3, coactivation=True) for layer in layers
            ]
            total = [old + new for old, new in zip(total, found, strict=True)]
    return total


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_sums_by_task_equal_those_of_the_examples_alone(
    name: str, tmp_path: Path, packed_rows: Rows
) -> None:
    rows = with_tasks(packed_rows(8))
    assert any(len(row.tasks) > 1 for row in rows)
    assert any((row.segment_ids == 0).any() for row in rows)
    expected = written_out(tiny_model(name).double(), rows)
    found = sums_of(tmp_path, tiny_model(name).double(), rows, **COACTIVATION)
    require_same(found, expected)
    assert (found[0].tokens > 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_rows": 8},
        {"micro_batch_rows": 2},
        {"micro_batch_rows": 1, "gradient_checkpointing": True},
        {"micro_batch_rows": 2, "router": {"scope": "lagged"}},
        {"micro_batch_rows": 2, "router": {"balance_coefficient": 0, "z_coefficient": 0}},
    ],
)
def test_sums_do_not_depend_on_how_a_step_is_cut(
    settings: dict[str, Any], tmp_path: Path, packed_rows: Rows
) -> None:
    rows = with_tasks(packed_rows(8))
    # Global scope: counting passes go before each step, and count once.
    expected = written_out(tiny_model("mixtral").double(), rows)
    require_same(
        sums_of(tmp_path, tiny_model("mixtral").double(), rows, **COACTIVATION, **settings),
        expected,
    )


def test_packed_rows_say_the_same_as_rows_of_one_example(tmp_path: Path) -> None:
    examples = [
        TokenizedExample(
            input_ids=torch.arange(3, 9 + number).numpy(),
            loss_mask=torch.arange(6 + number).numpy() > 2,
            task=TASKS[number % 3],
            key=str(number),
            content_hash=str(number),
        )
        for number in range(6)
    ]
    packed = pack(examples, length=24, padding=0)
    alone = pack(examples, length=16, padding=0, most_in_a_row=1)
    assert len(packed) < len(alone) == 6
    found = [
        sums_of(tmp_path, tiny_model("mixtral").double(), rows, **COACTIVATION)
        for rows in (packed, alone)
    ]
    require_same(*found)


T5_CUTS = [{"micro_batch_rows": 1}, {"micro_batch_rows": 2, "gradient_checkpointing": True}]


@pytest.mark.parametrize("settings", T5_CUTS)
def test_both_sides_of_an_encoder_decoder(
    settings: dict[str, Any],
    tmp_path: Path,
    tiny_t5: Callable[..., PreTrainedModel],
    pairs_in_rows: Callable[..., list[Any]],
    pair_rows: Callable[..., list[PackedPair]],
) -> None:
    rows = with_tasks(pair_rows(pairs_in_rows(6)))
    values = {**COACTIVATION, "target_length": 14}
    whole = sums_of(tmp_path, tiny_t5().double(), rows, micro_batch_rows=6, **values)
    require_same(sums_of(tmp_path, tiny_t5().double(), rows, **values, **settings), whole)
    inputs, targets = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    for row in rows:
        for number, task in enumerate(row.tasks, start=1):
            inputs[TASKS.index(task)] += int((row.segment_ids == number).sum())
            targets[TASKS.index(task)] += int((row.decoder_segment_ids == number).sum())
    assert [layer.tokens.tolist() for layer in whole] == [
        side.tolist() for side in (inputs, inputs, targets, targets)
    ]
    # Experts choose in the encoder, tokens in the decoder.
    assert [int(layer.asked.sum()) for layer in whole] == [0, 0, *[2 * int(targets.sum())] * 2]


def test_two_processes_say_the_same_as_one(
    tmp_path: Path, packed_rows: Rows, in_two_processes: Callable[..., None]
) -> None:
    rows = with_tasks(packed_rows(8))
    (tmp_path / "rows").write_bytes(pickle.dumps(rows))
    in_two_processes(SCRIPT, tmp_path / "rows", tmp_path)
    found = [
        [RoutingSums.from_state(layer) for layer in json.loads(path.read_text())["sums"]]
        for path in sorted(tmp_path.glob("sums-*.json"))
    ]
    expected = sums_of(tmp_path, tiny_model("mixtral").double(), rows, **COACTIVATION)
    require_same(found[0], expected)
    require_same(found[1], expected)
    told = json.loads((tmp_path / "sums-0.json").read_text())
    # One for the totals, one for the counting pass, one for everything of the step, one for the stop flag.
    assert told["reductions"] == 4
    assert told["refused"] == (
        "The streams of all processes must name the same tasks in the same order, but theirs differ "
        "(1, 2 tasks). Give each stream the `task_names` of the whole data."
    )


def test_rows_of_a_task_that_is_not_named_are_refused(tmp_path: Path, packed_rows: Rows) -> None:
    with pytest.raises(DataError) as caught:
        sums_of(tmp_path, tiny_model("mixtral"), packed_rows(2))
    assert str(caught.value) == (
        "Rows must hold examples of the 3 tasks that their stream names, but one is of the task random. Add "
        "it to the stream's `task_names`."
    )


def test_task_numbers_do_not_reach_the_model(tmp_path: Path, packed_rows: Rows) -> None:
    model = tiny_model("mixtral")
    seen: list[set[str]] = []
    model.register_forward_pre_hook(
        lambda module, arguments, values: seen.append(set(values)), with_kwargs=True
    )
    sums_of(tmp_path, model, with_tasks(packed_rows(2)))
    assert seen
    assert not any("task_ids" in names for names in seen)


# ---- Alerts ----


def healthy(seed: int = 0) -> PreTrainedModel:
    """Routers whose logits are small, as after upcycling: near ties that every token breaks in its way."""
    return tiny_model("mixtral", num_hidden_layers=3, num_local_experts=4, seed=seed)


def tuned(model: PreTrainedModel, rows: list[Packed], folder: Path, **values: Any) -> TuneResult:
    settings = {"steps": 20, "rows_per_step": 4, "micro_batch_rows": 4, **values}
    return tune_rows(model, rows, folder, **settings)


def collapse(model: PreTrainedModel, layer: int) -> None:
    """Give a router weights that send every token to the same two experts."""
    router = moe_blocks(model)[layer].router
    with torch.no_grad():
        router.weight.zero_()


def test_a_planted_collapse_is_noticed_in_its_layer_alone(
    tmp_path: Path, packed_rows: Rows, capfd: pytest.CaptureFixture[str]
) -> None:
    model = healthy()
    collapse(model, 1)
    values = {"freeze": ["gate"], "router": {"balance_coefficient": 0, "z_coefficient": 0}}
    result = tuned(model, with_tasks(packed_rows(40)), tmp_path, **values)
    collapsed = [alert for alert in result.alerts if alert.kind == "collapse"]
    assert [(alert.layer, alert.name) for alert in collapsed] == [(1, "model.layers.1.mlp")]
    assert collapsed[0].step <= 20
    assert {alert.layer for alert in result.alerts} == {1}
    said = capfd.readouterr().err
    assert said.count("The router of layer 1 (model.layers.1.mlp) has collapsed") == 1
    assert f"Warning: step {collapsed[0].step}: " in said
    rows = RunDir(tmp_path).rows("routing.jsonl")
    up = {row["step"]: [alert["kind"] for alert in row["alerts"]] for row in rows}
    assert up[collapsed[0].step - 1] == []
    assert "collapse" in up[20]
    assert TuneResult.parse(json.loads(json.dumps(result.to_mapping()))) == result


@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_raises_nothing(
    seed: int, tmp_path: Path, packed_rows: Rows, capfd: pytest.CaptureFixture[str]
) -> None:
    result = tuned(healthy(seed), packed_rows(40, seed=seed), tmp_path, learning_rate=1e-3)
    assert result.alerts == ()
    said = capfd.readouterr().err
    assert "Warning" not in said
    assert re.search(r"worst layer \d: busiest x1\.\d, entropy \d\d %$", said, re.MULTILINE)


def test_a_resumed_run_knows_its_alerts(tmp_path: Path, packed_rows: Rows) -> None:
    rows = with_tasks(packed_rows(40))
    values: dict[str, Any] = {
        "freeze": ["gate"],
        "schedule": "constant",
        "steps": 10,
        "checkpoint_every_steps": 6,
        "routing": {"alerts": {"window_steps": 4, "dead_steps": 8}},
    }

    def model() -> PreTrainedModel:
        made = healthy()
        collapse(made, 2)
        return made

    whole = tuned(model(), rows, tmp_path / "whole", **values)
    tuned(model(), rows, tmp_path / "parts", **{**values, "steps": 6})
    resumed = tuned(model(), rows, tmp_path / "parts", resume=True, **values)
    assert resumed.alerts == whole.alerts
    assert {alert.kind for alert in whole.alerts} >= {"collapse", "dead_expert"}
    assert resumed.tasks == whole.tasks
    assert resumed.routing_history == whole.routing_history
    parts, one = (RunDir(tmp_path / name).rows("routing.jsonl") for name in ("parts", "whole"))
    assert parts == one


# ---- Files, result, trackers ----


def test_the_result_holds_load_by_task(tmp_path: Path, packed_rows: Rows) -> None:
    rows = with_tasks(packed_rows(8))
    result = tune_rows(tiny_model("mixtral"), rows, tmp_path, steps=2, **COACTIVATION)
    load = result.expert_load
    assert load is not None
    assert list(result.tasks) == list(TASKS)
    for layer in range(2):
        by_task = [torch.tensor(task.counts[layer]) for task in result.tasks.values()]
        assert sum(by_task).tolist() == list(load.counts[layer])
        assert sum(task.tokens[layer] for task in result.tasks.values()) == (
            result.ledger.real_tokens
        )
        rates = torch.tensor(load.coactivation[layer])
        assert rates.diagonal().tolist() == [float(count > 0) for count in load.counts[layer]]
        # Two experts a token: beside itself an expert has one other.
        used = rates.sum(dim=1)[rates.diagonal() > 0]
        torch.testing.assert_close(used, torch.full_like(used, 2.0))
    assert len(result.routing_history) == 2
    assert [point.tokens for point in result.routing_history] == [
        point.tokens for point in result.loss_history
    ]
    assert 0 < result.routing_history[0].worst <= result.routing_history[0].mean <= 1


def test_results_from_before_are_read(tmp_path: Path, packed_rows: Rows) -> None:
    result = tune_rows(tiny_model("mixtral"), packed_rows(4), tmp_path, steps=1)
    values = result.to_mapping()
    for name in ("tasks", "alerts", "routing_history"):
        del values[name]
    for name in ("router_entropy_share", "confidence", "mean_gate", "logit_rms", "coactivation"):
        del values["expert_load"][name]
    before = TuneResult.parse(values)
    assert before.alerts == ()
    assert before.tasks == {}
    assert before.final_loss == result.final_loss


class _Tracker(TrainerCallback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        self.logged.append(dict(logs))


def test_trackers_get_the_names_of_the_files(tmp_path: Path, packed_rows: Rows) -> None:
    config = TuneConfig.parse({"precision": "float32", "steps": 2, "rows_per_step": 2})
    trainer = SparseTrainer(
        tiny_model("mixtral"),
        training_arguments(config, tmp_path, SeedTree(0)),
        stream=FixedRows(packed_rows(2)),
    )
    tracker = _Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    routing = [name for name in tracker.logged[0] if name.startswith("routing/")]
    expected = {f"routing/model.layers.{layer}.mlp/{name}" for layer in (0, 1) for name in MEASURES}
    assert expected < set(routing)
    assert "routing/worst/entropy_share" in routing
    assert not any(" " in name for name in routing)
    # TensorBoard, trackio, W&B: transformers puts them all under one head and changes nothing else.
    assert set(rewrite_logs(dict.fromkeys(routing, 0.0))) == {f"train/{name}" for name in routing}
    # They are in files of their own; transformers' history goes into every checkpoint.
    assert not any("routing/" in name for row in trainer.state.log_history for name in row)
    assert "router/z_raw" in trainer.state.log_history[0]


def test_recording_can_be_left_out(tmp_path: Path, packed_rows: Rows) -> None:
    config = TuneConfig.parse({"precision": "float32", "steps": 1, "rows_per_step": 2})
    reports = Reports()
    trainer = SparseTrainer(
        tiny_model("mixtral"),
        training_arguments(config, tmp_path, SeedTree(0)),
        stream=FixedRows(packed_rows(2)),
        routing=None,
        callbacks=[reports],
    )
    trainer.train()
    (report,) = reports.steps
    assert report.router is not None
    assert report.router.routing == report.router.measures == ()
    assert not any(name.startswith("routing/") for name in report.metrics())


def test_settings_are_checked_with_the_rest() -> None:
    values = {"steps": 0, "routing": {"alerts": {"window_steps": 0}, "coactivations": True}}
    with pytest.raises(ConfigError) as caught:
        TuneConfig.parse(values)
    text = str(caught.value)
    assert "configuration has 3 problems" in text
    assert "routing.alerts.window_steps: Input should be greater than or equal to 1" in text
    assert (
        "routing.coactivations: unknown key `coactivations`. Did you mean `coactivation`?" in text
    )
