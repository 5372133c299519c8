"""Claims in a study's file: checked before anything runs, judged on what its arms left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core.errors import ConfigError, DataError, FlanmoeError
from flanmoe.core.rundir import RunDir
from flanmoe.study.collect import collect
from flanmoe.study.outcome import rebuild_report
from flanmoe.study.plan import plan_study
from flanmoe.study.study_file import study_from_mapping


@pytest.fixture
def values(base: Path, sums_file: Path) -> dict[str, Any]:
    """A model as it is, and tuned a little and more, scored on the loss of sums."""
    score = {"stage": "evaluate", "tasks": [{"name": str(sums_file)}], "limit": 6}
    tune = {
        "stage": "tune",
        "data": {"tasks": ["exemplars/gsm8k_cot"]},
        "packing": {"length": 512, "window": 8},
        "train": {"length": 512, "rows_per_step": 1, "learning_rate": 1e-3},
    }
    return {
        "name": "claimed",
        "model": str(base),
        "seeds": [0, 1],
        "arms": {
            name: {
                "factors": {"steps": steps},
                "stages": [
                    *([{**tune, "train": {**tune["train"], "steps": steps}}] * (steps > 0)),
                    score,
                ],
            }
            for name, steps in (("untuned", 0), ("tuned-1", 1), ("tuned-2", 2))
        },
        "claims": [
            {
                "name": "tuning-helps",
                "statement": "Tuning lowers the loss of sums.",
                "metric": "loss",
                "better": "tuned-*",
                "than": "untuned",
                "margin": 0.01,
                "requires": "flops_per_token",
            },
            {
                "name": "same-cost",
                "statement": "The same at equal cost of training.",
                "metric": "loss",
                "better": "tuned-2",
                "than": "tuned-1",
                "margin": 0.01,
                "requires": "tokens",
            },
        ],
    }


@pytest.mark.slow
def test_claims_are_judged_on_the_last_scores_of_their_arms(
    values: dict[str, Any], run_here: Callable[..., RunDir], tmp_path: Path
) -> None:
    study = study_from_mapping(values)
    run = run_here(study, tmp_path / "out")
    data = collect(study, run)
    helps, cost = data.claims
    assert (helps.name, cost.name) == ("tuning-helps", "same-cost")
    losses = {arm.label: arm.after or arm.before for arm in data.arms}
    mean = {label: found.loss.mean for label, found in losses.items() if found and found.loss}
    expected = (mean["tuned-1"] + mean["tuned-2"]) / 2 - mean["untuned"]
    assert helps.measurement is not None
    assert helps.measurement.estimate == pytest.approx(expected, rel=1e-6)
    assert helps.measurement.seeds == (0, 1)
    assert helps.measurement.num_examples == 6
    # All arms have the same model, but the second was tuned for twice as long.
    assert cost.verdict == "not token-matched"
    ratios = {match.budget: match.ratio for match in cost.budgets}
    assert ratios["tokens"] == pytest.approx(2.0, abs=0.2)
    assert ratios["flops_per_token"] == 1.0
    # Claims say what is compared, so not every arm is compared with the first.
    assert data.comparisons == ()
    (table,) = data.effects
    assert {effect.name for effect in table.effects} == {"steps 1 over 0", "steps 2 over 0"}
    told = rebuild_report(run.path)
    assert [(claim["name"], claim["verdict"]) for claim in told["claims"]] == [
        ("tuning-helps", helps.verdict),
        ("same-cost", "not token-matched"),
    ]
    report = (run.path / "report.md").read_text(encoding="utf-8")
    assert report.index("tuning-helps") < report.index("FLOPs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "accuracy"}, "must be one that is measured (`loss`), but found `accuracy`"),
        ({"tasks": ["sum*"]}, "must name a task that is evaluated"),
    ],
)
def test_what_nobody_measures_is_refused_by_the_plan(
    values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    claims = [{**values["claims"][0], **change}]
    study = study_from_mapping({**values, "claims": claims})
    with pytest.raises(ConfigError) as caught:
        plan_study(study, None)
    assert message in str(caught.value)


def test_a_metric_that_an_arm_of_the_claim_lacks_is_refused_by_the_plan(
    values: dict[str, Any],
) -> None:
    with_choices = {"stage": "evaluate", "tasks": ["exemplars/bbh/navigate"], "limit": 2}
    values["arms"]["untuned"]["stages"] = [with_choices]
    claims = [{**values["claims"][0], "metric": "accuracy"}]
    study = study_from_mapping({**values, "claims": claims})
    with pytest.raises(ConfigError, match="`tuned-1` is scored by `loss` and not by `accuracy`"):
        plan_study(study, None)


def test_words_that_are_not_there_are_refused_by_the_plan(values: dict[str, Any]) -> None:
    (score,) = values["arms"]["untuned"]["stages"]
    for family, message in (("answer_cu", "answer_cu"), ("entailment", "hypothesis")):
        worded = {**score, "template": {"family": family}}
        arms = {"untuned": {"stages": [worded]}}
        study = study_from_mapping({**values, "arms": arms, "claims": []})
        with pytest.raises(DataError, match=message):
            plan_study(study, None)


@pytest.mark.slow
def test_a_study_of_which_an_arm_has_no_seed_finished_is_reported(
    values: dict[str, Any], run_here: Callable[..., RunDir], tmp_path: Path
) -> None:
    values["seeds"] = [0]
    del values["arms"]["tuned-2"]
    broken = {**values["arms"]["tuned-1"], "factors": {"steps": 9}}
    train = {**broken["stages"][0]["train"], "learning_rate": 1e30, "warmup_steps": 0}
    broken["stages"] = [
        {**broken["stages"][0], "train": {**train, "steps": 2}},
        broken["stages"][1],
    ]
    values["arms"]["broken"] = broken
    values["claims"] = [{**values["claims"][0], "better": ["tuned-1", "broken"]}]
    study = study_from_mapping(values)
    with pytest.raises(FlanmoeError, match="needs a finite gradient norm"):
        run_here(study, tmp_path / "out")
    data = collect(study, RunDir(tmp_path / "out"))
    (claim,) = data.claims
    assert claim.verdict == "not measured"
    assert "arm `broken` has 0" in claim.sentence
    (table,) = data.effects
    assert [effect.name for effect in table.effects] == ["steps 1 over 0"]
    assert table.failed == ("broken",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "accurcy"}, "but found `accurcy`. Did you mean `accuracy`?"),
        ({"than": "untund"}, "must compare arms of the study"),
        ({"better": "moe-*"}, "but found `moe-*`"),
    ],
)
def test_what_no_study_has_is_refused_when_the_file_is_read(
    values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    claims = [{**values["claims"][0], **change}]
    with pytest.raises(ConfigError) as caught:
        study_from_mapping({**values, "claims": claims})
    assert message in str(caught.value)


def test_a_model_above_the_limit_of_the_study_is_refused(values: dict[str, Any]) -> None:
    study = study_from_mapping({**values, "max_parameters": 1000})
    refusal = plan_study(study, None).refusal
    assert refusal is not None
    assert "but the study allows 0.0 million (`max_parameters`)" in refusal


def test_parts_of_one_arm_must_have_its_factors(values: dict[str, Any]) -> None:
    arms = {name: {**arm, "part_of": "all"} for name, arm in values["arms"].items()}
    with pytest.raises(ConfigError, match="parts of `all` must have the same `factors`"):
        study_from_mapping({**values, "arms": arms, "claims": []})
