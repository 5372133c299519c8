"""What a report says of routing: tasks by experts, the course of the load, alerts in words and in a table."""

import math
import random
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flanmoe.moe.alerts import Alert
from flanmoe.study import plots
from flanmoe.study.arm_report import (
    AlertReport,
    ArmReport,
    ExpertLoadReport,
    RoutingCurvePoint,
    TaskLoad,
)
from flanmoe.study.plots.task_loads import spreads
from flanmoe.study.records import SeedResults
from flanmoe.study.report import html_report, markdown_report
from flanmoe.study.report_data import ReportData
from flanmoe.study.report_routing import (
    alert_sentences,
    alerts,
    expert_load,
    routing_curve,
    shared_alert_sentences,
)
from flanmoe.study.tables import sections

TASKS = (
    "exemplars/mmlu_cot/anatomy",
    "exemplars/mmlu_cot/astronomy",
    "exemplars/mmlu_cot/high_school_government_and_politics",
    "exemplars/gsm8k_cot",
    "exemplars/strategyqa_cot",
)


def alert(**changes: Any) -> Alert:
    values = {
        "kind": "collapse",
        "layer": 4,
        "name": "model.layers.4.mlp",
        "value": 0.12,
        "limit": 0.5,
        "words": "The router of layer 4 (model.layers.4.mlp) has collapsed: do something.",
        "step": 20,
        **changes,
    }
    return Alert.parse(values)


def entropy_share(row: tuple[float, ...]) -> float:
    return -sum(share * math.log(share) for share in row if share) / math.log(len(row))


def monitored(data: ReportData, names: tuple[str, ...] = TASKS) -> ReportData:
    """The sparse arm of a report with tasks that differ most in layer 4 and 9, a curve and alerts."""
    rng = random.Random(3)
    dense, sparse = data.arms
    load = sparse.expert_load
    assert load is not None

    def of_task(number: int) -> TaskLoad:
        rows: list[tuple[float, ...]] = []
        for layer, row in enumerate(load.shares):
            sharpness = {4: 0.9, 9: 0.7}.get(layer, 0.1)
            weights = [share * math.exp(sharpness * rng.gauss(0, 1)) for share in row]
            if layer == 9 and number == 1:
                weights[2] = 0.0
            rows.append(tuple(weight / sum(weights) for weight in weights))
        return TaskLoad(
            task=names[number],
            tokens=40_000 - 3_000 * number,
            shares=tuple(rows),
            entropy_share=tuple(map(entropy_share, rows)),
            confidence=tuple(0.3 + 0.01 * number for _ in rows),
        )

    tasks = tuple(map(of_task, range(len(names))))
    curve = tuple(
        RoutingCurvePoint(
            tokens=1987 * (step + 1),
            worst=0.86 + 0.05 * (1 - math.exp(-step / 15)) + rng.gauss(0, 0.004),
            mean=0.94 + 0.03 * (1 - math.exp(-step / 15)) + rng.gauss(0, 0.002),
        )
        for step in range(64)
    )
    found = (
        AlertReport(seed=0, stage="tune", alert=alert()),
        AlertReport(
            seed=0,
            stage="tune",
            alert=alert(
                kind="drops", layer=9, name="model.layers.9.mlp", words="Drops.", cleared=40
            ),
        ),
    )
    changed = sparse.model_copy(
        update={
            "expert_load": load.model_copy(update={"tasks": tasks, "num_tasks": len(names)}),
            "routing_curve": curve,
            "alerts": found,
        }
    )
    sentences = tuple(alert_sentences("sparse", found))
    return data.model_copy(update={"arms": (dense, changed), "warnings": sentences})


@pytest.fixture(scope="module")
def report(two_arms: ReportData) -> ReportData:
    return monitored(two_arms)


@pytest.fixture(scope="module")
def drawn(report: ReportData) -> dict[str, plots.Drawing]:
    return {drawing.name: drawing for drawing in plots.drawings(report)}


def _texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter() if "text" in text.tag]


def test_tasks_are_drawn_in_the_layers_that_tell_them_apart(
    report: ReportData, drawn: dict[str, plots.Drawing]
) -> None:
    load = report.arms[1].expert_load
    assert load is not None
    assert sorted(spreads(load).argsort()[::-1][:2].tolist()) == [4, 9]
    drawing = drawn["task-load-1"]
    texts = _texts(drawing.svg)
    assert {"layer 4", "layer 9", "mmlu_cot/anatomy", "gsm8k_cot"} <= set(texts)
    assert "\N{HORIZONTAL ELLIPSIS}government_and_politics" in texts
    # One task sends nothing to one expert, and everybody leaves one of layer 4 alone.
    assert len(re.findall(r"<use [^>]*#fffffe", drawing.svg)) == 1
    assert len(re.findall(r"<use [^>]*#1f2329", drawing.svg)) == len(TASKS)
    assert "the 2 of 30 layers that tell tasks apart most" in drawing.caption
    assert drawing.alt.startswith(
        "Experts that tasks use: sparse. 5 tasks, 8 experts; the share of assignments that a task sends "
        "elsewhere than all tasks do together (mean over tasks) is layer 4: 0."
    )


def test_redder_means_more_than_all_tasks_together(report: ReportData) -> None:
    rows = ((0.5, 0.25, 0.125, 0.125),), ((0.125, 0.25, 0.125, 0.5),)
    tasks = tuple(
        TaskLoad(task=name, tokens=10, shares=shares, entropy_share=(0.9,), confidence=(0.5,))
        for name, shares in zip("ab", rows, strict=True)
    )
    load = ExpertLoadReport(layers=(0,), shares=((0.25,) * 4,), tasks=tasks, num_tasks=2)
    arm = report.arms[1].model_copy(update={"expert_load": load})
    drawing = plots.task_load(report.model_copy(update={"arms": (arm,), "baseline": ""}), 0)
    assert drawing is not None
    mesh = drawing.svg[drawing.svg.index("QuadMesh") :]
    fills = re.findall(r"fill: #([0-9a-f]{6})", mesh)[:4]
    red_less_blue = [int(colour[:2], 16) - int(colour[4:], 16) for colour in fills]
    assert red_less_blue[0] > red_less_blue[1] > 0 > red_less_blue[2] == red_less_blue[3]


def test_many_tasks_are_those_with_the_most_tokens(two_arms: ReportData) -> None:
    names = tuple(f"family/task{number:02d}" for number in range(20))
    found = monitored(two_arms, names)
    drawing = plots.task_load(found, 1)
    assert drawing is not None
    texts = _texts(drawing.svg)
    assert "task15" in texts
    assert "task16" not in texts
    assert "Of 20 tasks the 16 with the most tokens." in drawing.caption


def test_the_course_of_the_load_is_drawn(drawn: dict[str, plots.Drawing]) -> None:
    drawing = drawn["routing-curves"]
    assert {"sparse", "entropy of the load (% of even)"} <= set(_texts(drawing.svg))
    assert "dense" not in _texts(drawing.svg)
    assert re.search(
        r"sparse: mean over layers from 9\d\.\d % to 9\d\.\d %, most uneven layer from 8\d\.\d % to 9\d\.\d %",
        drawing.alt,
    )


def test_without_tasks_and_curve_there_are_no_figures_of_them(two_arms: ReportData) -> None:
    names = {drawing.name for drawing in plots.drawings(two_arms)}
    assert "expert-load-1" in names
    assert not any(name.startswith(("task-load", "routing-curves")) for name in names)


def test_alerts_are_said_in_words_and_listed(report: ReportData) -> None:
    text = markdown_report(report)
    assert (
        "sparse: The router of layer 4 (model.layers.4.mlp) has collapsed: do something. It was noticed after "
        "step 20 and was still so at the end."
    ) in text
    assert "sparse: Drops. It was noticed after step 20 and was well again after step 40." in text
    assert "| sparse | collapse | model.layers.4.mlp | 0.12 | 0.5 | 20 | still up | 0 |" in text
    assert "| sparse | drops | model.layers.9.mlp | 0.12 | 0.5 | 20 | 40 | 0 |" in text
    assert "has collapsed" in html_report(report)


def test_the_experts_of_an_alert_are_named_in_its_table(report: ReportData) -> None:
    found = [
        AlertReport(seed=0, stage="tune", alert=alert(kind="dead_expert", experts=experts))
        for experts in ((3,), tuple(range(9)))
    ]
    arm = report.arms[1].model_copy(update={"alerts": tuple(found)})
    text = markdown_report(report.model_copy(update={"arms": (arm,), "baseline": ""}))
    assert "| dead_expert | model.layers.4.mlp, expert 3 |" in text
    assert "| dead_expert | model.layers.4.mlp, experts 0, 1, 2, 3, 4, 5, ... |" in text


def test_alerts_of_one_kind_are_one_sentence() -> None:
    found = [
        AlertReport(seed=seed, stage="tune", alert=alert(layer=seed, words=f"Layer {seed}."))
        for seed in range(3)
    ]
    assert alert_sentences("a", found) == [
        "a: Layer 0. It was noticed after step 20 and was still so at the end. The same kind of alert was "
        "raised 2 times more, in other places or seeds."
    ]
    assert alert_sentences("a", []) == []


def test_arms_that_share_their_alerts_share_the_sentence() -> None:
    (one,) = alerts([cast(SeedResults, SimpleNamespace(seed=0, tunings={"t": tuned()}))])
    other = one.model_copy(update={"alert": alert(layer=9)})
    words = shared_alert_sentences({"a": [one], "b": [], "c": [other], "d": [one], "e": []})
    assert [sentence.partition(":")[0] for sentence in words] == ["a and d", "c"]
    many = shared_alert_sentences({f"arm{number}": [one] for number in range(6)})
    assert [sentence.partition(":")[0] for sentence in many] == [
        "arm0, arm1, arm2, arm3 and 2 more"
    ]


def test_tasks_have_a_table(report: ReportData) -> None:
    (routing,) = [section for section in sections(report) if section.title == "Routing"]
    (table,) = [table for table in routing.tables if table.title == "Routing by task: sparse"]
    assert [row[0] for row in table.rows] == list(TASKS)
    assert table.rows[0][1] == "40,000"
    assert table.rows[1][4] == "31.0 %"


def test_the_data_survive_as_json(report: ReportData) -> None:
    assert ReportData.parse(report.to_mapping()) == report
    values = report.to_mapping()
    for arm in values["arms"]:
        for name in ("routing_curve", "alerts"):
            del arm[name]
        if arm["expert_load"]:
            del arm["expert_load"]["tasks"], arm["expert_load"]["num_tasks"]
    before = ReportData.parse(values)
    assert before.arms[1].alerts == before.arms[1].routing_curve == ()


# ---- From results ----


def tuned(**training: Any) -> Any:
    """As much of a tuning's result as a report asks for here."""
    values = {
        "expert_load": SimpleNamespace(
            layers=(0, 0),
            shares=((0.5, 0.5), (1.0, 0.0)),
            entropy_nats=(math.log(2), 0.0),
            names=("encoder.block.0", "decoder.block.0"),
        ),
        "drops": None,
        "tasks": {
            "small": SimpleNamespace(
                tokens=(3, 2),
                counts=((1, 2), (2, 0)),
                entropy_share=(0.9, 0.0),
                confidence=(0.5, 1.0),
            ),
            "large": SimpleNamespace(
                tokens=(5, 9),
                counts=((3, 2), (9, 0)),
                entropy_share=(0.9, 0.0),
                confidence=(0.5, 1.0),
            ),
        },
        "alerts": (alert(),),
        "routing_history": (SimpleNamespace(tokens=10, worst=0.5, mean=0.75),),
        "ledger": SimpleNamespace(real_tokens=12),
        **training,
    }
    return SimpleNamespace(training=SimpleNamespace(**values))


def test_the_load_of_a_result_has_its_tasks_by_tokens() -> None:
    load = expert_load(tuned())
    assert load is not None
    assert load.names == ("encoder 0", "decoder 0")
    assert [(task.task, task.tokens) for task in load.tasks] == [("large", 9), ("small", 3)]
    assert load.tasks[0].shares == ((0.6, 0.4), (1.0, 0.0))
    assert load.num_tasks == 2
    assert expert_load(tuned(expert_load=None)) is None


def test_curves_of_tunings_follow_one_another_and_alerts_of_seeds_are_together() -> None:
    seeds = [
        cast(SeedResults, SimpleNamespace(seed=seed, tunings={"one": tuned(), "two": tuned()}))
        for seed in (7, 8)
    ]
    assert [point.tokens for point in routing_curve(seeds[0])] == [10, 22]
    assert [(one.seed, one.stage) for one in alerts(seeds)] == [
        (7, "one"),
        (7, "two"),
        (8, "one"),
        (8, "two"),
    ]


def test_arms_hold_their_alerts_apart(report: ReportData) -> None:
    arm = report.arm("dense")
    assert isinstance(arm, ArmReport)
    assert arm.alerts == ()
