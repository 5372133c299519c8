"""Figures show the data at the right places, say it in words, and stay the same."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from flanmoe.study import plots
from flanmoe.study.analysis.factorial import FactorialTable
from flanmoe.study.arm_report import ArmReport, CurvePoint, ExpertLoadReport, LossCurve
from flanmoe.study.plots.arm_groups import arm_groups, first_arms
from flanmoe.study.plots.curve_series import series
from flanmoe.study.report_data import ReportData

_SVG = "{http://www.w3.org/2000/svg}"


def _texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{_SVG}text")]


def _named(drawings: tuple[plots.Drawing, ...]) -> dict[str, plots.Drawing]:
    return {drawing.name: drawing for drawing in drawings}


def test_every_figure_has_title_units_and_words(
    two_arms_drawings: tuple[plots.Drawing, ...],
) -> None:
    labels = {
        "loss-curves": ["real tokens trained on", "loss (nats per token)", "dense", "sparse"],
        "scores": ["loss (nats per token), lower is better", "accuracy (%)", "chance"],
        "differences": [
            "loss (nats per token), left is better",
            "accuracy (percentage points), right is better",
        ],
        "memory": ["memory (GiB)", "weights", "optimizer", "measured peak"],
        "expert-load-1": ["expert", "layer", "load (times the even share)"],
    }
    drawn = _named(two_arms_drawings)
    assert list(drawn) == list(labels)
    for name, expected in labels.items():
        drawing = drawn[name]
        assert set(expected) <= set(_texts(drawing.svg))
        root = ElementTree.fromstring(drawing.svg)
        title, description = root.find(f"{_SVG}title"), root.find(f"{_SVG}desc")
        assert title is not None
        assert title.text == drawing.title
        assert description is not None
        assert description.text == drawing.alt
        assert root.get("role") == "img"
        assert drawing.caption


def test_words_for_those_who_cannot_see_hold_the_main_values(
    two_arms_drawings: tuple[plots.Drawing, ...],
) -> None:
    drawn = _named(two_arms_drawings)
    assert "dense: before loss 1.912 ± 0.044 and accuracy 41.2 % ± 3.4" in drawn["scores"].alt
    assert "sparse: estimate 7.15 GiB, measured 7.42 GiB" in drawn["memory"].alt
    assert "30 layers of 8 experts; the even share is 12.5 %" in drawn["expert-load-1"].alt
    assert "1 experts are unused" in drawn["expert-load-1"].alt
    assert "after 127.2 k tokens" in drawn["loss-curves"].alt
    assert "No evidence of a difference" in drawn["differences"].alt


def test_figures_are_the_same_every_time(
    two_arms: ReportData, two_arms_drawings: tuple[plots.Drawing, ...]
) -> None:
    assert plots.drawings(two_arms) == two_arms_drawings


def test_figures_need_nothing_from_outside(two_arms_drawings: tuple[plots.Drawing, ...]) -> None:
    for drawing in two_arms_drawings:
        assert "<metadata" not in drawing.svg
        assert "<!DOCTYPE" not in drawing.svg
        for reference in re.findall(r'href="([^"]*)"', drawing.svg):
            assert reference.startswith((f"#{drawing.name}-", "data:"))
        ids = re.findall(r'\bid="([^"]*)"', drawing.svg)
        assert len(ids) == len(set(ids))
        assert all(name.startswith(drawing.name) for name in ids)


def test_ink_follows_the_page_and_arms_differ_without_colour(
    two_arms_drawings: tuple[plots.Drawing, ...],
) -> None:
    svg = _named(two_arms_drawings)["loss-curves"].svg
    assert "var(--ink, #1f2328)" in svg
    assert "var(--arm-0, #0f62a8)" in svg
    assert "var(--arm-1, #c2410c)" in svg
    assert "stroke-dasharray" in svg
    assert not re.search(r"(?<!, )#1f2328", svg)


def test_nothing_to_show_means_no_figure(one_dense_arm: ReportData) -> None:
    assert list(_named(plots.drawings(one_dense_arm))) == ["loss-curves", "scores"]
    assert "accuracy (%)" not in _texts(_named(plots.drawings(one_dense_arm))["scores"].svg)
    arm = one_dense_arm.arms[0].model_copy(update={"curves": (), "after": None})
    assert plots.drawings(one_dense_arm.model_copy(update={"arms": (arm,)})) == ()


def _with_load(data: ReportData, shares: tuple[tuple[float, ...], ...]) -> plots.Drawing:
    load = ExpertLoadReport(layers=tuple(range(len(shares))), shares=shares)
    arm = data.arms[0].model_copy(update={"expert_load": load})
    drawing = plots.expert_load(data.model_copy(update={"arms": (arm,)}), 0)
    assert drawing is not None
    return drawing


def _markers(svg: str, colour: str) -> int:
    return len(re.findall(rf"<use [^>]*{colour}", svg))


def test_overloaded_and_unused_experts_are_marked(one_dense_arm: ReportData) -> None:
    drawing = _with_load(one_dense_arm, ((0.5, 0.5, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25)))
    assert _markers(drawing.svg, "#fffffe") == 2
    assert _markers(drawing.svg, "#1f2329") == 2
    even = _with_load(one_dense_arm, ((0.25, 0.25, 0.25, 0.25),))
    assert _markers(even.svg, "#fffffe") == _markers(even.svg, "#1f2329") == 0


def test_darker_means_busier(one_dense_arm: ReportData) -> None:
    svg = _with_load(one_dense_arm, ((0.05, 0.15, 0.3, 0.5),)).svg
    mesh = svg[svg.index("QuadMesh") :]
    fills = re.findall(r"fill: (#[0-9a-f]{6})", mesh)[:4]
    brightness = [
        sum(int(colour[start : start + 2], 16) for start in (1, 3, 5)) for colour in fills
    ]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) == 4


def test_steps_without_a_finite_loss_leave_a_gap_not_a_crash(one_dense_arm: ReportData) -> None:
    points = tuple(
        CurvePoint(tokens=100 * step, loss=float("nan") if step > 3 else 2.0 - 0.1 * step)
        for step in range(1, 8)
    )
    arm = one_dense_arm.arms[0].model_copy(update={"curves": (LossCurve(seed=0, points=points),)})
    drawing = plots.loss_curves(one_dense_arm.model_copy(update={"arms": (arm,)}))
    assert drawing is not None
    assert "from 1.900 to 1.700 after 300 tokens" in drawing.alt
    assert "nan" not in drawing.svg.lower()
    assert len(_heights(drawing.svg)) == 3


def _heights(svg: str) -> set[str]:
    """Vertical positions of all points of all lines inside the axes."""
    lines = re.findall(r'<path d="([^"]*)" clip-path[^>]*var\(--arm', svg)
    return {height for line in lines for height in re.findall(r"[ML] [\d.]+ ([\d.]+)", line)}


@pytest.mark.parametrize("num_steps", [2, 40, 41, 300])
def test_a_constant_loss_is_a_level_line(one_dense_arm: ReportData, num_steps: int) -> None:
    points = tuple(CurvePoint(tokens=step + 1, loss=3.0) for step in range(num_steps))
    arm = one_dense_arm.arms[0].model_copy(update={"curves": (LossCurve(seed=0, points=points),)})
    drawing = plots.loss_curves(one_dense_arm.model_copy(update={"arms": (arm,)}))
    assert drawing is not None
    # No edge effect of the running mean pulls the ends towards zero.
    assert len(_heights(drawing.svg)) == 1


def test_an_interval_of_width_zero_still_has_an_axis(two_arms: ReportData) -> None:
    item = two_arms.comparisons[0].model_copy(update={"mean": 0.0, "low": 0.0, "high": 0.0})
    drawing = plots.paired_differences(two_arms.model_copy(update={"comparisons": (item,)}))
    assert drawing is not None
    assert "No evidence of a difference" in drawing.alt


def test_more_arms_than_styles(two_arms: ReportData) -> None:
    arms = tuple(
        two_arms.arms[1].model_copy(
            update={
                "label": f"arm{number}",
                "curves": tuple(
                    curve.model_copy(update={"points": curve.points[number:]})
                    for curve in two_arms.arms[1].curves
                ),
            }
        )
        for number in range(8)
    )
    drawn = _named(plots.drawings(two_arms.model_copy(update={"arms": arms, "baseline": ""})))
    assert {f"arm{number}" for number in range(8)} <= set(_texts(drawn["loss-curves"].svg))


def test_curves_over_flops_where_these_were_counted(
    many_arms: ReportData, two_arms_drawings: tuple[plots.Drawing, ...]
) -> None:
    few = many_arms.model_copy(update={"arms": many_arms.arms[:2]})
    drawing = plots.loss_curves(few)
    assert drawing is not None
    assert drawing.title == "Training loss over tokens and training FLOPs"
    assert {"real tokens trained on", "training FLOPs"} <= set(_texts(drawing.svg))
    assert "127.2 k tokens and 80.99 T FLOPs, mean of 3 seeds" in drawing.alt
    assert "training FLOPs" not in _texts(_named(two_arms_drawings)["loss-curves"].svg)


def test_many_arms_share_panels_by_their_first_word(
    many_arms: ReportData, many_arms_drawings: tuple[plots.Drawing, ...]
) -> None:
    groups = [[arm.label for arm in group] for group in arm_groups(many_arms.arms)]
    assert [len(group) for group in groups] == [6, 4, 3, 6, 6]
    assert groups[2][-1] == "switch-flan-direct-32-experts"
    assert {label for group in groups for label in group} == {arm.label for arm in many_arms.arms}
    texts = _texts(_named(many_arms_drawings)["loss-curves"].svg)
    assert texts.count("training FLOPs") == 5
    # Once in its own group and as the baseline of the others.
    assert texts.count("dense-flan-direct") == 5
    assert {arm.label for arm in many_arms.arms} <= set(texts)


def test_of_too_many_arms_those_of_claims_come_first(many_arms: ReportData) -> None:
    kept, left_out = first_arms(many_arms, many_arms.arms[::-1], 2, what=lambda arm: arm.label)
    assert [arm.label for arm in kept] == ["switch-flan-direct", "dense-flan-direct"]
    assert left_out == len(many_arms.arms) - 2


def test_arms_that_share_their_tuning_are_one_line(one_dense_arm: ReportData) -> None:
    (arm,) = one_dense_arm.arms
    other = arm.model_copy(update={"label": "asked", "curves": arm.curves[:0]})
    twin = arm.model_copy(update={"label": "twin"})
    data = one_dense_arm.model_copy(update={"arms": (arm, twin, other)})
    kept, left_out = first_arms(data, data.arms, 5, what=lambda one: one.curves)
    assert [one.label for one in kept] == [f"{arm.label} + 1", "asked"]
    assert left_out == 0
    alone, without = first_arms(data, data.arms, 1, what=lambda one: one.curves)
    assert ([one.label for one in alone], without) == ([f"{arm.label} + 1"], 1)
    drawing = plots.loss_curves(data)
    assert drawing is not None
    assert f"{arm.label} + 1: from" in drawing.alt
    assert "twin" not in drawing.alt
    assert len(re.findall(r'<path d="[^"]*" clip-path[^>]*var\(--arm', drawing.svg)) == len(
        re.findall(
            r'<path d="[^"]*" clip-path[^>]*var\(--arm',
            plots.loss_curves(one_dense_arm).svg,  # pyright: ignore
        )
    )


def test_one_map_stands_for_arms_of_the_same_load(one_dense_arm: ReportData) -> None:
    (arm,) = one_dense_arm.arms
    even, uneven = (
        ExpertLoadReport(layers=(0,), shares=((share, 1 - share),)) for share in (0.5, 0.9)
    )
    arms = tuple(
        arm.model_copy(update={"label": label, "expert_load": load})
        for label, load in (("a", even), ("b", uneven), ("c", even))
    )
    maps = [
        one
        for one in plots.drawings(one_dense_arm.model_copy(update={"arms": arms}))
        if one.name.startswith("expert-load")
    ]
    assert [one.title.rpartition(" ")[2] for one in maps] == ["a", "b"]
    assert maps[0].caption.endswith(" The same in c.")
    assert "The same in" not in maps[1].caption


def test_figures_of_many_arms_are_no_taller_than_a_page(
    many_arms_drawings: tuple[plots.Drawing, ...],
) -> None:
    for drawing in many_arms_drawings:
        box = re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', drawing.svg)
        assert box is not None
        assert float(box[1]) / 72 < 13, drawing.name


def test_several_seeds_are_a_mean_and_a_band(one_dense_arm: ReportData) -> None:
    curves = tuple(
        LossCurve(
            seed=seed,
            points=tuple(
                CurvePoint(tokens=100 * step, loss=2.0 + seed) for step in range(1, 5 - seed)
            ),
        )
        for seed in range(2)
    )
    arm = one_dense_arm.arms[0].model_copy(update={"curves": curves})
    found = series(arm, "tokens")
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.spent[[0, -1]].tolist() == [100.0, 300.0]
    assert set(found.loss.tolist()) == {2.5}
    assert set(found.low.tolist()) == {2.0}
    assert set(found.high.tolist()) == {3.0}
    assert series(arm, "flops") is None


def test_main_effects_are_drawn_and_not_more_than_twenty(
    many_arms_drawings: tuple[plots.Drawing, ...], two_effect_tables: tuple[FactorialTable, ...]
) -> None:
    drawing = _named(many_arms_drawings)
    assert "size large over small: " in drawing["effects"].alt
    assert ", and " not in drawing["effects"].alt
    first = two_effect_tables[0].effects[0]
    many = tuple(
        first.model_copy(update={"name": f"level-{number}", "p": 1 - number / 100})
        for number in range(30)
    )
    table = two_effect_tables[0].model_copy(update={"effects": many})
    shown = plots.effects((table,))
    assert shown is not None
    assert [text for text in _texts(shown.svg) if text.startswith("level")] == [
        f"level-{number}" for number in range(10, 30)
    ]
    assert "10 effects of larger p-values or further metrics are in the table." in shown.caption


def test_of_many_differences_the_largest_between_arms_are_drawn(
    many_arms_drawings: tuple[plots.Drawing, ...],
) -> None:
    drawing = _named(many_arms_drawings)["differences"]
    assert "Of 294 differences the largest between arms; the table has all." in drawing.caption
    assert drawing.alt.count("(95 % interval") == 2 * 12 * 3
    assert "the same model before it" not in drawing.alt


def test_of_many_arms_the_baseline_and_the_most_uneven_loads_are_drawn(
    two_arms: ReportData,
) -> None:
    def arm(number: int) -> ArmReport:
        busiest = 0.25 + 0.01 * number
        rest = (1 - busiest) / 3
        load = ExpertLoadReport(layers=(0,), shares=((busiest, rest, rest, rest),))
        return two_arms.arms[1].model_copy(update={"label": f"arm{number}", "expert_load": load})

    arms = tuple(map(arm, range(8)))
    many = two_arms.model_copy(update={"arms": arms, "baseline": "arm2"})
    maps = [name for name in _named(plots.drawings(many)) if name.startswith("expert-load")]
    assert maps == ["expert-load-2", "expert-load-5", "expert-load-6", "expert-load-7"]
