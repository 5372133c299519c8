"""Grids: which cells become arms, with which stages and settings, and every mistake by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import ConfigError
from flanmoe.study.grid import Grid, Rule, holds
from flanmoe.study.study_file import study_from_mapping

EVALUATE = {"stage": "evaluate", "tasks": ["exemplars/bbh/navigate"]}
TUNE = {"stage": "tune", "label": "general", "data": {"tasks": ["exemplars/gsm8k_cot"]}}


def values(**changes: Any) -> dict[str, Any]:
    """A study of a grid of two factors."""
    grid = {
        "factors": {
            "general": {False: {}, True: {}},
            "shots": {0: {}, 2: {"few": {"train": {"steps": 2}}}},
        },
        "stages": [
            {**TUNE, "when": {"general": True}},
            {"stage": "tune", "label": "few", "data": TUNE["data"], "when": {"shots": [2]}},
            EVALUATE,
        ],
    }
    return {"name": "crossed", "model": "m", "grid": {**grid, **changes}}


def test_every_cell_is_an_arm_with_the_stages_whose_condition_holds() -> None:
    study = study_from_mapping(values())
    labels = {name: [stage.label for stage in arm.stages] for name, arm in study.arms.items()}
    assert labels == {
        "shots0": ["evaluate"],
        "shots2": ["few", "evaluate"],
        "general-shots0": ["general", "evaluate"],
        "general-shots2": ["general", "few", "evaluate"],
    }
    assert study.arms["general-shots2"].factors == {"general": True, "shots": 2}
    assert study.arms["shots2"].stages[0].train.steps == 2
    assert all(arm.model == "m" for arm in study.arms.values())


def test_settings_of_a_level_go_over_those_of_the_stage_and_defaults_below_both() -> None:
    changed = values()
    stage = changed["grid"]["stages"][1]
    changed["grid"]["stages"][1] = {**stage, "train": {"steps": 5, "rows_per_step": 3}}
    changed["defaults"] = {"tune": {"train": {"rows_per_step": 7, "learning_rate": 1e-3}}}
    few = study_from_mapping(changed).arms["shots2"].stages[0]
    assert (few.train.steps, few.train.rows_per_step, few.train.learning_rate) == (2, 3, 1e-3)


def test_kept_levels_alone_are_crossed() -> None:
    assert list(study_from_mapping(values(keep={"shots": 0})).arms) == ["shots0", "general-shots0"]
    with pytest.raises(
        ConfigError, match=r"`keep.shots` must be a level of it \(`0`, `2`\), but found `3`"
    ):
        study_from_mapping(values(keep={"shots": [3]}))


def test_true_and_one_are_different_levels() -> None:
    assert holds({"general": (True,)}, {"general": True})
    assert not holds({"general": (1,)}, {"general": True})
    assert not holds({"general": (False,)}, {"general": 0})
    assert not holds({"missing": (1,)}, {"general": 1})


@given(
    st.dictionaries(
        st.sampled_from("abc"), st.lists(st.integers(0, 3), min_size=1, unique=True), min_size=1
    ),
    st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), min_size=1), max_size=3),
)
def test_cells_are_the_product_without_what_rules_forbid(
    factors: dict[str, list[int]], forbidden: list[dict[str, int]]
) -> None:
    grid = Grid.parse(
        {
            "factors": {name: dict.fromkeys(levels) for name, levels in factors.items()},
            "stages": [EVALUATE],
        }
    )
    rules = [Rule.parse({"never": never, "because": "so"}) for never in forbidden]
    cells: list[dict[str, int]] = [{}]
    for name, levels in factors.items():
        cells = [{**cell, name: level} for cell in cells for level in levels]
    expected = [
        cell
        for cell in cells
        if not any(all(cell.get(name) == level for name, level in one.items()) for one in forbidden)
    ]
    if not expected:
        with pytest.raises(ConfigError, match="all of its cells are forbidden"):
            grid.arms(rules)
    else:
        assert [arm["factors"] for arm in grid.arms(rules).values()] == expected


def test_parts_are_arms_of_one_name() -> None:
    tasks = {
        task: {"evaluate": {"tasks": [f"exemplars/bbh/{task}"]}} for task in ("navigate", "snarks")
    }
    changed = values(parts=["task"])
    changed["grid"]["factors"] = {"shots": {0: {}, 2: {}}, "task": tasks}
    changed["grid"]["stages"] = [EVALUATE]
    study = study_from_mapping(changed)
    assert study.systems == {
        "shots0": ("shots0-navigate", "shots0-snarks"),
        "shots2": ("shots2-navigate", "shots2-snarks"),
    }
    assert study.factors == {"shots0": {"shots": 0}, "shots2": {"shots": 2}}
    assert study.arms["shots2-snarks"].stages[0].tasks[0].name == "exemplars/bbh/snarks"


RULE = {
    "never": {"general": False, "shots": [2]},
    "because": "few examples follow general training",
}


def test_a_rule_about_nothing_is_refused() -> None:
    for never, message in (
        (
            {"shotz": 2},
            "`rules.0.never` must name a factor (`general`, `shots`), but found `shotz`",
        ),
        ({"shots": 3}, "`rules.0.never.shots` must be a level of it (`0`, `2`), but found `3`"),
    ):
        with pytest.raises(ConfigError) as caught:
            study_from_mapping({**values(), "rules": [{"never": never, "because": "so"}]})
        assert message in str(caught.value)


def test_numbers_in_names_stand_in_full() -> None:
    changed = values()
    changed["grid"]["factors"] = {"size": {1_000_000: {}, 1_000_001: {}, 0.5: {}}}
    changed["grid"]["stages"] = [EVALUATE]
    assert list(study_from_mapping(changed).arms) == ["size1000000", "size1000001", "size0_5"]


def test_an_override_reaches_levels_that_are_no_text() -> None:
    changed = ["grid.factors.shots.2.few.train.steps=9", "grid.factors.general.on.evaluate.limit=4"]
    arms = study_from_mapping(values(), overrides=changed).arms
    assert len(arms) == 4
    assert arms["shots2"].stages[0].train.steps == 9
    limits = {name: arm.stages[-1].limit for name, arm in arms.items()}
    assert limits == {"shots0": None, "shots2": None, "general-shots0": 4, "general-shots2": 4}


def test_parts_are_scored_on_tasks_of_their_own() -> None:
    changed = values(parts=["shots"])
    with pytest.raises(ConfigError, match=r"must be scored on tasks of their own, but .* share"):
        study_from_mapping(changed)


def test_a_rule_takes_cells_out_of_a_grid_and_refuses_listed_arms() -> None:
    ruled = {**values(), "rules": [RULE]}
    assert "shots2" not in study_from_mapping(ruled).arms
    listed = {"own": {"factors": {"general": False, "shots": 2}, "stages": [EVALUATE]}}
    with pytest.raises(
        ConfigError,
        match="arm `own` has general off with shots 2, which a rule forbids: few examples follow general",
    ):
        study_from_mapping({**ruled, "arms": listed})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ["tsk"]}, "`parts` must name a factor (`general`, `shots`), but found `tsk`"),
        (
            {"stages": [{**EVALUATE, "when": {"shot": 0}}]},
            "`stages.0.when` must name a factor (`general`, `shots`), but found `shot`. Did you mean `shots`?",
        ),
        (
            {"stages": [{**EVALUATE, "when": {"general": "on"}}]},
            "`stages.0.when.general` must be a level of it (`off`, `on`), but found `on`",
        ),
        (
            {"factors": {"shots": {0: {"few_shot": {"train": {}}}}}, "stages": [EVALUATE]},
            "`factors.shots.0.few_shot` must be the kind or the label of a stage that cells of this level have",
        ),
        (
            {
                "factors": {"a": {"x-y": {}, "x": {}}, "b": {"z": {}, "y-z": {}}},
                "stages": [EVALUATE],
            },
            "two are called `x-y-z`",
        ),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study_from_mapping(values(**change), origin="file.yaml")
    assert message in str(caught.value)


def test_an_arm_and_a_cell_of_one_name_are_refused() -> None:
    listed = {"shots0": {"stages": [EVALUATE]}}
    with pytest.raises(ConfigError, match=r"arms.shots0: is a cell of the grid as well"):
        study_from_mapping({**values(), "arms": listed})
