"""Studies inside a study: names, factors and claims stay those of each."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flanmoe.core.errors import ConfigError
from flanmoe.study.study import Study
from flanmoe.study.study_file import load_study

EVALUATE = {"stage": "evaluate", "tasks": ["exemplars/bbh/navigate"]}


def write(folder: Path, name: str, **values: Any) -> Path:
    """Write a study's file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, **values}, sort_keys=False))
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Study:
    """A study of two others, both with a factor `size`."""
    for name in ("one", "two"):
        arms = {
            size: {
                "model": f"{name}-{size}",
                "factors": {"size": size, "on": True},
                "stages": [EVALUATE],
            }
            for size in ("small", "large")
        }
        claims = [
            {
                "name": "pair",
                "statement": "s",
                "metric": "loss",
                "better": "l*",
                "than": "small",
                "margin": 1.0,
            },
            {
                "name": "factor",
                "statement": "s",
                "metric": "loss",
                "effect": {"factor": "size", "of": "large", "over": "small", "given": {"on": True}},
                "margin": 1.0,
            },
            {
                "name": "sum",
                "statement": "s",
                "metric": "loss",
                "weights": {"small": 1, "large": -1},
                "margin": 1.0,
            },
        ]
        write(tmp_path, name, arms=arms, claims=claims, profiles={"short": {"seeds": [3]}})
    path = write(
        tmp_path,
        "both",
        seeds=[1, 2],
        include=["one.yaml", "two.yaml"],
        profiles={"short": {"seeds": [7]}},
    )
    return load_study(path, profile="short")


def test_arms_and_claims_have_the_names_of_their_study(whole: Study) -> None:
    assert list(whole.arms) == ["one-small", "one-large", "two-small", "two-large"]
    assert whole.arms["two-large"].factors == {"size": "large", "on": True, "study": "two"}
    assert whole.arms["two-large"].model == "two-large"
    assert whole.seeds == (7,)
    claims = {claim.name: claim for claim in whole.resolved_claims}
    assert list(claims)[:3] == ["one.pair", "one.factor", "one.sum"]
    assert claims["two.pair"].better == ("two-large",)
    assert claims["two.sum"].weights == {"two-small": 1, "two-large": -1}


def test_an_effect_stays_within_its_study(whole: Study) -> None:
    claim = next(claim for claim in whole.resolved_claims if claim.name == "two.factor")
    assert claim.contrast(whole.factors).weights == {"two-large": 1.0, "two-small": -1.0}


def test_a_study_written_out_is_the_same_study(whole: Study) -> None:
    assert Study.parse(yaml.safe_load(whole.to_yaml())) == whole


def test_names_that_meet_and_settings_that_reach_nothing_are_refused(tmp_path: Path) -> None:
    arms = {"x": {"model": "m", "stages": [EVALUATE]}}
    write(tmp_path, "one", arms=arms)
    whole = write(tmp_path, "both", include=["one.yaml"], arms={"one-x": arms["x"]})
    with pytest.raises(ConfigError, match=r"arms.one-x: stands in two of the files"):
        load_study(whole)
    whole = write(tmp_path, "both", include=["one.yaml"], arms=None)
    assert list(load_study(whole).arms) == ["one-x"]
    with pytest.raises(ConfigError, match="defaults: has no effect on included arms"):
        load_study(whole, overrides=["defaults.evaluate.limit=7"])
    changed = load_study(whole, overrides=["arms.one-x.stages.0.limit=7"])
    assert changed.arms["one-x"].stages[0].limit == 7
    with pytest.raises(ConfigError, match="A study cannot include itself"):
        load_study(write(tmp_path, "both", include=["both.yaml"]))


def test_a_study_inside_one_inside_another_keeps_its_effects_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        arms = {
            size: {"model": name + size, "factors": {"size": size}, "stages": [EVALUATE]}
            for size in ("small", "large")
        }
        effect = {"factor": "size", "of": "large", "over": "small"}
        claim = {"name": "c", "statement": "s", "metric": "loss", "effect": effect, "margin": 1.0}
        write(tmp_path, name, arms=arms, claims=[claim])
    write(tmp_path, "inner", include=["one.yaml", "two.yaml"])
    study = load_study(write(tmp_path, "outer", include=["inner.yaml"]))
    claims = {claim.name: claim for claim in study.resolved_claims}
    weights = claims["inner.one.c"].contrast(study.factors).weights
    assert weights == {"inner-one-large": 1.0, "inner-one-small": -1.0}


def test_a_missing_file_and_a_missing_profile_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "both", include=["none.yaml"])
    with pytest.raises(ConfigError, match=r"The file .*none.yaml does not exist"):
        load_study(path)
    write(tmp_path, "none", arms={"a": {"model": "m", "stages": [EVALUATE]}})
    with pytest.raises(ConfigError, match=r"none.yaml has no profile `short`"):
        load_study(write(tmp_path, "both", include=["none.yaml"]), profile="short")
