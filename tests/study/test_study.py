"""Files become studies: defaults, profiles, overrides, and every mistake named with its path."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flanmoe.core.errors import ConfigError
from flanmoe.data.tasks import load_tasks
from flanmoe.study.study import Study
from flanmoe.study.study_file import load_study, study_from_mapping

REPOSITORY = Path(__file__).parents[2]


def two_arms() -> dict[str, Any]:
    """A small valid study."""
    return {
        "name": "small",
        "model": "some-model",
        "defaults": {
            "tune": {"data": {"tasks": ["exemplars/gsm8k_cot"]}, "train": {"steps": 3}},
            "evaluate": {"tasks": ["exemplars/bbh/snarks"]},
        },
        "arms": {
            "dense": {"stages": [{"stage": "tune"}, {"stage": "evaluate"}]},
            "sparse": {
                "model": "other-model",
                "stages": [
                    {"stage": "upcycle", "num_experts": 4},
                    {"stage": "tune", "train": {"learning_rate": 1e-3}},
                ],
            },
        },
    }


def test_defaults_are_merged_under_every_stage_of_their_kind() -> None:
    study = study_from_mapping(two_arms())
    dense, sparse = study.arms["dense"], study.arms["sparse"]
    assert (dense.model, sparse.model) == ("some-model", "other-model")
    assert dense.stages[0].train.steps == sparse.stages[1].train.steps == 3
    assert sparse.stages[1].train.learning_rate == 1e-3
    assert dense.stages[0].train.learning_rate != 1e-3
    assert study.baseline_arm == "dense"


def test_a_study_written_out_is_the_same_study() -> None:
    study = study_from_mapping(two_arms())
    assert Study.parse(yaml.safe_load(study.to_yaml())) == study


def test_overrides_win_over_profiles_and_profiles_over_the_file() -> None:
    values = {**two_arms(), "profiles": {"long": {"defaults.tune.train.steps": 7, "seeds": [1, 2]}}}
    study = study_from_mapping(values, profile="long", overrides=["seeds=[5]"])
    assert study.arms["dense"].stages[0].train.steps == 7
    assert study.seeds == (5,)


def test_a_file_with_stages_is_a_study_of_one_arm() -> None:
    recipe = {"name": "one", "model": "m", "seed": 4, "stages": [{"stage": "upcycle"}]}
    study = study_from_mapping(recipe)
    assert list(study.arms) == ["one"]
    assert study.seeds == (4,)
    assert study.recipe("one", 4).stages == study.arms["one"].stages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "arms.sparse.stages.1.train.learning_rat=1",
            "unknown key `learning_rat`. Did you mean `learning_rate`?",
        ),
        (
            "defaults.tuen.train.steps=1",
            "defaults.tuen: unknown key `tuen`. Did you mean `tune`? Known: `pretrain`, `upcycle`, "
            "`upcycle_t5`, `tune`, `evaluate`.",
        ),
        ("profiles.smoke.seeds=[1]", "unknown key `profiles`."),
        ("arms.sparse.stages.0.num_experts=0", "arms.sparse.stages.0.upcycle.num_experts"),
        ("arms.sparse.stages.0.stage=upcicle", "arms.sparse.stages.0"),
        ("baseline=spares", "`baseline` must name an arm"),
        ("seeds=[1,1]", "seeds must be distinct, but found [1, 1]"),
        ("arms.sparse.stages.1.label=upcycle", "stage labels must be unique"),
    ],
)
def test_mistakes_are_named_with_their_path(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study_from_mapping(two_arms(), overrides=[change], origin="file.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"defaults": ["tune"]},
            "defaults: Input should be a valid dictionary or instance of StageDefaults, but is ['tune'].",
        ),
        (
            {"defaults": {"tune": 3}},
            "defaults.tune: Input should be a valid dictionary, but is 3.",
        ),
        (
            {"defaults": {**two_arms()["defaults"], "upcycle": None}},
            "defaults.upcycle: Input should be a valid dictionary, but is None.",
        ),
        ({"profiles": ["q"]}, "profiles: Input should be a valid dictionary, but is ['q']."),
        (
            {"profiles": {"q": 3}},
            "profiles.q: Input should be a valid dictionary, but is 3.",
        ),
    ],
)
def test_wrong_shapes_are_named_with_their_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study_from_mapping({**two_arms(), **change}, origin="file.yaml")
    assert str(caught.value) == f"file.yaml has 1 problem:\n  {message}"


def test_defaults_that_no_arm_uses_are_a_mistake() -> None:
    values = two_arms()
    del values["arms"]["sparse"]
    values["defaults"]["upcycle"] = {"num_expert": 4}
    with pytest.raises(ConfigError) as caught:
        study_from_mapping(values, origin="file.yaml")
    assert str(caught.value) == (
        "file.yaml has 1 problem:\n  defaults.upcycle: has no effect: every arm lacks a stage `upcycle`. "
        "Take it out, or add the stage."
    )


def test_values_of_a_profile_arrive_as_the_file_has_them() -> None:
    values = two_arms()
    values["defaults"]["evaluate"]["limit"] = 5
    overrides = {
        "defaults.evaluate.limit": None,
        "description": "yes: it's {one} sentence",
        "defaults.tune.data.tasks": [{"name": "exemplars/gsm8k_cot", "cluster": "null"}],
        "defaults.evaluate.tasks": [{"name": "exemplars/bbh/snarks"}],
        "defaults.evaluate.tasks.0.cluster": "5",
        "arms.sparse.model": "nan",
        "defaults.tune.train.learning_rate": "1e-4",
    }
    study = study_from_mapping({**values, "profiles": {"whole": overrides}}, profile="whole")
    tune, evaluate = study.arms["dense"].stages
    assert evaluate.limit is None
    assert study.description == "yes: it's {one} sentence"
    assert tune.data.tasks[0].cluster == "null"
    assert evaluate.tasks[0].cluster == "5"
    assert study.arms["sparse"].model == "nan"
    assert tune.train.learning_rate == 1e-4


def test_all_mistakes_are_reported_at_once() -> None:
    changes = ["arms.dense.stages.0.train.steps=-1", "nmae=x", "seeds=[]"]
    with pytest.raises(ConfigError, match=r"file\.yaml has 3 problems") as caught:
        study_from_mapping(two_arms(), overrides=changes, origin="file.yaml")
    assert all(part in str(caught.value) for part in ("steps", "nmae", "seeds"))


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no profile `smok`. Did you mean `smoke`\?"):
        load_study(REPOSITORY / "recipes" / "quickstart.yaml", profile="smok")


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_recipe_is_valid_with_every_profile(path: Path) -> None:
    profiles = yaml.safe_load(path.read_text()).get("profiles", {})
    for profile in [None, *profiles]:
        study = load_study(path, profile=profile)
        assert study.name == path.stem


def test_the_quickstart_trains_on_nothing_that_it_evaluates() -> None:
    study = load_study(REPOSITORY / "recipes" / "quickstart.yaml")
    tune, evaluate = study.arms["dense"].stages[1], study.arms["dense"].stages[0]
    trained = {e.content_hash() for t in load_tasks(tune.data.tasks) for e in t.examples}
    evaluated = {e.content_hash() for t in load_tasks(evaluate.tasks) for e in t.examples}
    assert not trained & evaluated
    assert len(trained) > 200
    assert len(evaluated) > 120
