"""From scores to verdicts: planted studies of every outcome, what cannot be compared, what must not matter."""

import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flanmoe.core.errors import ConfigError
from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.analyse import analyse
from flanmoe.study.analysis.budget import ArmCosts
from flanmoe.study.analysis.claim_result import ClaimResult
from flanmoe.study.analysis.claims import Claim
from flanmoe.study.analysis.observations import Observations
from flanmoe.study.tables.claims import budgets_table, claims_table

Table = Callable[..., Observations]
Drawn = Callable[..., dict[str, Any]]
SEEDS = SeedTree(11)
COSTS = {
    "dense": ArmCosts(tokens=1000, training_flops=1e12, flops_per_token=1e8, active_parameters=5e7),
    "sparse": ArmCosts(
        tokens=1000, training_flops=1.03e12, flops_per_token=1.03e8, active_parameters=5e7
    ),
}


def _claim(name: str = "one", **written: Any) -> Claim:
    return Claim.parse(
        {
            "name": name,
            "statement": "Sparse is better.",
            "metric": "accuracy",
            "margin": 0.1,
            **(
                {}
                if {"weights", "effect", "gain"} & written.keys()
                else {"better": "sparse", "than": "dense"}
            ),
            **written,
        }
    )


def _one(data: Observations, claim: Claim, costs: Any = COSTS) -> ClaimResult:
    (found,) = analyse(data, [claim], costs, seeds=SEEDS)
    return found


@pytest.fixture(scope="module")
def study(table: Table, drawn: Drawn) -> Callable[..., Observations]:
    """Dense at 0 and sparse at an effect, five seeds, quiet enough to find 0.1."""

    def draw(effect: float, **options: Any) -> Observations:
        return table(drawn({"dense": 0.0, "sparse": effect}, **options), tasks=["t", "u"])

    return draw


@pytest.mark.parametrize(
    ("effect", "written", "verdict", "reason"),
    [
        (0.15, {}, "reproduced", "as claimed, and this design would find "),
        (
            -0.15,
            {},
            "contradicted",
            "the difference goes the other way, and one of 10.0 as claimed is ruled out.",
        ),
        (
            0.0,
            {},
            "contradicted",
            "no difference is shown, and one of 10.0 as claimed is ruled out.",
        ),
        (
            0.05,
            {"margin": 0.15},
            "contradicted",
            "the difference is as claimed, but below the margin of 15.0: too small to matter.",
        ),
        (
            0.15,
            {"margin": 0.02},
            "underpowered",
            "No evidence either way. The smallest difference that this design",
        ),
        (
            0.0,
            {"weights": {"sparse": 1, "dense": -1}, "direction": "same"},
            "reproduced",
            "a difference of 10.0 or more is ruled out",
        ),
        (
            0.3,
            {"weights": {"sparse": 1, "dense": -1}, "direction": "same"},
            "contradicted",
            "the difference is larger than the margin of 10.0.",
        ),
        (
            -0.15,
            {"weights": {"sparse": 1, "dense": -1}, "direction": "lower"},
            "reproduced",
            "as claimed",
        ),
        (0.15, {"requires": "flops_per_token"}, "reproduced", "as claimed"),
        (
            0.15,
            {"requires": {"flops_per_token": 0.02}},
            "not FLOP-matched",
            "No comparison at the budget that the claim requires: `sparse` has 103.0 M FLOPs per token and "
            "`dense` 100.0 M, 3.0 % more (2 % allowed).",
        ),
    ],
)
def test_planted_studies(
    study: Callable[..., Observations],
    effect: float,
    written: dict[str, Any],
    verdict: str,
    reason: str,
) -> None:
    found = _one(study(effect), _claim(**written))
    assert found.verdict == verdict
    assert reason in found.sentence
    assert found.measurement is not None
    assert found.measurement.estimate == pytest.approx(effect, abs=0.05)


def test_inconclusive_between_nothing_and_the_margin(study: Callable[..., Observations]) -> None:
    before = _one(study(0.0), _claim()).measurement
    assert before is not None
    assert before.detectable is not None
    # Half of a margin that the power just reaches can be told from neither end.
    shift = before.detectable / 2 - before.estimate
    found = _one(study(shift), _claim(margin=before.detectable * 1.001))
    assert found.verdict == "inconclusive"
    assert "neither a difference as claimed is shown, nor one of" in found.sentence


def test_lower_loss_is_better(table: Table, drawn: Drawn) -> None:
    data = table(drawn({"dense": 0.0, "sparse": -0.15}), metric="loss")
    found = _one(data, _claim(metric="loss"))
    assert (found.claimed, found.verdict) == ("lower", "reproduced")
    assert "`sparse` minus `dense` in loss is −0.1" in found.sentence
    assert "nats per token (95 % interval −0.1" in found.sentence


def test_a_larger_gain(table: Table, drawn: Drawn) -> None:
    arms = {"dense": 0.0, "dense-flan": 0.1, "sparse": -0.05, "sparse-flan": 0.3}
    claim = _claim(
        gain={"of": "sparse-flan", "over": "sparse"},
        than_gain={"of": "dense-flan", "over": "dense"},
        margin=0.15,
    )
    found = _one(table(drawn(arms, luck=0.01)), claim)
    assert found.verdict == "reproduced"
    assert found.measurement is not None
    assert found.measurement.estimate == pytest.approx(0.25, abs=0.05)


def test_an_underpowered_claim_says_which_scale_would_do(
    study: Callable[..., Observations],
) -> None:
    found = _one(study(0.15), _claim(margin=0.03))
    assert found.measurement is not None
    scale = found.measurement.sufficient[0]
    assert f"{scale.seeds} seeds on {scale.examples} examples" in found.sentence
    assert "above the margin of 3.0 percentage points" in found.sentence
    assert found.sentence.endswith("; all of the interval lies beyond the margin, as claimed.")
    larger = _one(
        study(0.15, num_seeds=scale.seeds, num_examples=scale.examples), _claim(margin=0.03)
    )
    assert larger.measurement is not None
    # The spread is measured anew, and five seeds had told it only roughly.
    assert larger.measurement.detectable == pytest.approx(0.03, rel=0.5)


def test_one_seed_is_no_evidence(study: Callable[..., Observations]) -> None:
    found = _one(study(5.0, num_seeds=1), _claim())
    assert found.verdict == "underpowered"
    assert "With 1 seed the luck of training has no measure" in found.sentence
    assert "run at least 3 seeds." in found.sentence


def test_copies_of_one_arm_are_noticed(table: Table) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 9))
    found = _one(table({"dense": rows, "sparse": rows}), _claim())
    assert found.verdict == "inconclusive"
    assert found.sentence.startswith(
        "All 9 differences are the same number, so chance cannot be judged;"
    )


def test_an_arm_that_failed_leaves_the_other_claims_standing(table: Table, drawn: Drawn) -> None:
    data = table(drawn({"dense": 0.0, "sparse": 0.15}), failed=["broken"])
    broken = _claim("two", better="broken", than="dense")
    first, second = analyse(data, [_claim(), broken], COSTS, seeds=SEEDS)
    assert first.verdict == "reproduced"
    assert first.num_claims == 1
    assert second.verdict == "not measured"
    assert second.sentence.startswith(
        "Every arm that is compared needs scores of `accuracy`, but arm `broken`"
    )
    assert second.measurement is None


def test_a_run_that_diverged_is_not_measured(table: Table, drawn: Drawn) -> None:
    data = drawn({"dense": 0.0, "sparse": 0.15})
    data["sparse"][2, 5] = math.nan
    found = _one(table(data), _claim())
    assert found.verdict == "not measured"
    assert "1 of 60 scores of `accuracy` of arm `sparse` with seed 2 are not." in found.sentence


def test_what_is_left_out_is_said(table: Table, drawn: Drawn) -> None:
    data = drawn({"dense": 0.0, "sparse": 0.15})
    data["sparse"] = data["sparse"][:4]
    found = _one(table(data), _claim())
    assert found.verdict == "reproduced"
    assert found.measurement is not None
    assert found.measurement.seeds == (0, 1, 2, 3)
    assert found.left_out == (
        "Seed 4 is left out: arm `sparse` has no `accuracy` of any task with it.",
    )


def test_neither_the_order_of_records_nor_of_claims_matters(
    study: Callable[..., Observations],
) -> None:
    data = study(0.05)
    claims = [_claim("one"), _claim("two", margin=0.05), _claim("three", tasks="t")]
    records = list(data.records())
    random.Random(0).shuffle(records)
    shuffled = Observations(records, arms=data.arms)
    first = analyse(data, claims, COSTS, seeds=SEEDS)
    second = analyse(shuffled, claims[::-1], COSTS, seeds=SEEDS)
    assert first == second[::-1]
    assert analyse(data, claims, COSTS, seeds=SeedTree(12)) != first


def test_more_claims_ask_for_more_evidence(study: Callable[..., Observations]) -> None:
    data = study(0.15)
    alone = _one(data, _claim())
    several = [_claim(f"claim-{i}") for i in range(6)]
    among = analyse(data, several, COSTS, seeds=SEEDS)[0]
    first, second = alone.measurement, among.measurement
    assert first is not None
    assert second is not None
    assert (first.detectable or 0) < (second.detectable or 0)
    assert first.tests is not None
    assert second.tests is not None
    assert first.tests.p_holm == first.tests.p
    assert second.tests.p_holm >= second.tests.p
    assert "by Holm over 6 claims" in among.sentence


def test_an_effect_leaves_out_the_partners_of_arms_that_failed(table: Table, drawn: Drawn) -> None:
    arms = {
        f"{size}-{general}": {"size": size, "general": general == "on"}
        for size in ("small", "large")
        for general in ("off", "on")
    }
    scores = drawn({arm: 0.2 * factors["general"] for arm, factors in arms.items()})
    claim = _claim(effect={"factor": "general", "of": True, "over": False})
    whole = _one(table(scores, arms=arms), claim)
    del scores["large-on"]
    rest = _one(table(scores, arms=arms), claim)
    assert whole.verdict == rest.verdict == "reproduced"
    assert rest.left_out == ("Left out with their partners, for want of `accuracy`: `large-on`.",)
    del scores["small-off"]
    none = _one(table(scores, arms=arms), claim)
    assert none.verdict == "not measured"
    assert "needs at least 1 pair of arms" in none.sentence or "has the levels" in none.sentence


def test_a_claim_that_does_not_fit_the_study_is_refused(study: Callable[..., Observations]) -> None:
    with pytest.raises(ConfigError, match="must compare arms of the study"):
        _one(study(0.0), _claim(better="spare"))
    with pytest.raises(
        ConfigError, match=re.escape("but found `accurcy`. Did you mean `accuracy`?")
    ):
        _one(study(0.0), _claim(metric="accurcy"))


def test_a_metric_that_nobody_has_scores_of_is_not_measured(
    study: Callable[..., Observations],
) -> None:
    found = _one(study(0.0), _claim(metric="loss"))
    assert found.verdict == "not measured"
    assert "needs scores of `loss`, but arm" in found.sentence


def test_results_are_written_and_read_back(study: Callable[..., Observations]) -> None:
    found = _one(study(0.15), _claim(requires="tokens"))
    assert ClaimResult.parse(found.to_mapping()) == found


def test_tables(table: Table, drawn: Drawn) -> None:
    data = table(drawn({"dense": 0.0, "sparse": 0.15}), failed=["broken"])
    claims = [
        _claim(requires={"tokens": 0.05, "flops_per_token": 0.02}),
        _claim("two", better="broken"),
    ]
    results = analyse(data, claims, COSTS, seeds=SEEDS)
    shown = claims_table(results)
    assert [len(row) for row in shown.rows] == [len(shown.header)] * 2
    cells = dict(zip(shown.header, shown.rows[0], strict=True))
    assert cells["verdict"] == "not FLOP-matched"
    assert cells["estimate"].startswith("+1")
    assert cells["margin"] == "10.0"
    assert cells["unit"] == "percentage points"
    assert cells["examples"] == "60"
    assert dict(zip(shown.header, shown.rows[1], strict=True))["estimate"] == ""
    budgets = budgets_table(results)
    assert budgets.rows[0] == (
        "one",
        "sparse / dense",
        "1.000*",
        "1.030",
        "1.030*!",
        "1.000",
    )
    assert budgets.rows[1][2] == "unknown"
