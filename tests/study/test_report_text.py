"""Sentences follow from intervals, and formats keep their meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flanmoe.study.arm_report import Evaluation, ExpertLoadReport, Memory, Score, TaskScore
from flanmoe.study.report_data import Comparison, Metric, ReportData
from flanmoe.study.report_limits import limits
from flanmoe.study.report_text import (
    accuracy_text,
    difference_sentence,
    difference_sentences,
    loss_text,
    verdict,
)


def _compared(low: float, high: float, *, metric: Metric = "loss") -> Comparison:
    return Comparison(
        subject="sparse",
        reference="dense",
        metric=metric,
        mean=(low + high) / 2,
        standard_error=0.01,
        low=low,
        high=high,
        num_examples=186,
    )


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("loss", -0.03, -0.01, "better"),
        ("loss", 0.01, 0.03, "worse"),
        ("accuracy", 0.01, 0.03, "better"),
        ("accuracy", -0.03, -0.01, "worse"),
        ("loss", -0.01, 0.03, "unclear"),
        ("accuracy", -0.03, 0.01, "unclear"),
        ("loss", -0.03, 0.0, "unclear"),
        ("loss", 0.0, 0.03, "unclear"),
        ("loss", 0.0, 0.0, "unclear"),
    ],
)
def test_only_an_interval_without_zero_decides(
    metric: Metric, low: float, high: float, expected: str
) -> None:
    assert _compared(low, high, metric=metric).verdict == expected


_bound = st.floats(-1, 1).map(lambda value: round(value, 4))


@given(ends=st.tuples(_bound, _bound), metric=st.sampled_from(["loss", "accuracy"]))
def test_a_sentence_says_better_or_worse_only_when_zero_is_excluded(
    ends: tuple[float, float], metric: Metric
) -> None:
    low, high = sorted(ends)
    sentence = difference_sentence(_compared(low, high, metric=metric))
    decided = low > 0 or high < 0
    assert sentence.startswith(("Better: ", "Worse: ")) == decided
    assert sentence.startswith("No evidence of a difference: ") == (not decided)
    assert ("lower" in sentence or "higher" in sentence) == decided


def test_sentences_in_full() -> None:
    assert difference_sentence(_compared(-0.0313, -0.0075)) == (
        "Better: the loss of sparse after tuning is 0.0194 nats per token lower than that of dense "
        "(95 % interval −0.0313 to −0.0075; standard error 0.0100, n = 186)."
    )
    assert difference_sentence(_compared(-0.04, -0.02, metric="accuracy")) == (
        "Worse: the accuracy of sparse after tuning is 3.0 percentage points lower than that of dense "
        "(95 % interval −4.0 to −2.0; standard error 1.0, n = 186)."
    )
    assert difference_sentence(_compared(-0.01, 0.03)) == (
        "No evidence of a difference: the loss of sparse after tuning minus that of dense is +0.0100 nats "
        "per token, and its interval includes zero "
        "(95 % interval −0.0100 to +0.0300; standard error 0.0100, n = 186)."
    )


def test_the_verdict_comes_from_arms_and_names_the_cost(two_arms: ReportData) -> None:
    assert verdict(two_arms) == (
        "Against dense, sparse after tuning shows a better loss (0.0194 nats per token lower) and no "
        "measurable difference in accuracy; it costs 1.00× the FLOPs per token, 2.25× the tuning time and "
        "2.24× the peak memory."
    )


def test_without_two_arms_the_verdict_is_about_tuning(two_arms: ReportData) -> None:
    tuning = tuple(item for item in two_arms.comparisons if item.kind == "tuning")[:1]
    assert verdict(two_arms.model_copy(update={"comparisons": tuning})) == (
        "After tuning, dense shows a better loss (0.2410 nats per token lower) against the same model "
        "before it."
    )


def test_every_seed_is_named_in_the_verdict(two_arms: ReportData) -> None:
    first = two_arms.comparisons[0].model_copy(update={"seed": 1})
    second = first.model_copy(update={"seed": 2, "high": 0.01})
    text = verdict(two_arms.model_copy(update={"comparisons": (first, second)}))
    assert text.startswith(
        "Against dense, sparse after tuning shows a better loss (0.0194 nats per token lower, seed 1) and no "
        "measurable difference in loss (seed 2); it costs 1.00×"
    )
    assert difference_sentence(first).endswith("n = 186, seed 1).")


def _many(two_arms: ReportData, decided: int) -> ReportData:
    """Fourteen comparisons with the baseline, of which the first ones exclude zero."""
    found = [
        _compared(-0.03, -0.01 if number < decided else 0.01).model_copy(
            update={"subject": f"arm-{number}"}
        )
        for number in range(14)
    ]
    return two_arms.model_copy(update={"comparisons": tuple(found)})


def test_of_many_arms_those_that_differ_come_first_and_the_others_in_one_sentence(
    two_arms: ReportData,
) -> None:
    assert verdict(_many(two_arms, 1)) == (
        "Against dense, arm-0 after tuning shows a better loss (0.0200 nats per token lower). "
        "Against dense, 13 other arms show no measurable difference in loss."
    )
    assert verdict(_many(two_arms, 0)) == (
        "Against dense, 14 arms show no measurable difference in loss."
    )
    assert verdict(_many(two_arms, 10)) == (
        "Against dense, 10 of 14 arms show a measurable difference: 10 a better loss. "
        "Against dense, 4 other arms show no measurable difference in loss."
    )
    assert "other" not in verdict(_many(two_arms, 14))


def test_where_many_differ_they_are_gathered_by_what_they_show(two_arms: ReportData) -> None:
    worse = _compared(0.01, 0.03).model_copy(update={"subject": "late", "seed": 1})
    seeds = [worse.model_copy(update={"subject": "both", "seed": seed}) for seed in (0, 1)]
    unclear = _compared(-0.01, 0.03).model_copy(update={"subject": "late", "seed": 0})
    told = difference_sentences([*_many(two_arms, 14).comparisons, worse, *seeds, unclear])
    assert told == (
        (
            "better",
            "Better: loss lower than that of dense, each interval excludes zero: arm-0, arm-1, arm-2, arm-3, "
            "arm-4, arm-5 and 8 more.",
        ),
        (
            "worse",
            "Worse: loss higher than that of dense, each interval excludes zero: late (seed 1) and both.",
        ),
        (
            "unclear",
            "No evidence of a difference in loss from dense, each interval includes zero: late (seed 0).",
        ),
    )


def test_many_comparisons_of_many_arms_stay_a_dozen_sentences(many_arms: ReportData) -> None:
    assert len(many_arms.comparisons) == 294
    assert len(difference_sentences(many_arms.comparisons)) <= 12
    without = many_arms.model_copy(update={"claims": ()})
    assert verdict(without) == (
        "Against dense-flan-direct, 22 of 24 arms show a measurable difference with at least one seed: 9 a "
        "better loss, 10 a worse loss, 10 a worse accuracy and 13 a better accuracy. Against "
        "dense-flan-direct, 2 other arms show no measurable difference in loss or accuracy."
    )
    assert len(limits(many_arms)) < 10


def test_many_arms_of_other_budgets_are_told_in_one_sentence(many_arms: ReportData) -> None:
    # Claims say themselves which budgets their arms must share.
    assert not _about(limits(many_arms), "no comparison at equal")
    many_arms = many_arms.model_copy(update={"claims": ()})
    found = _about(limits(many_arms), "no comparison at equal compute")
    assert len(found) == 1
    assert found[0].startswith(
        "6 arms spend 1.70× the FLOPs per token of dense-flan-direct: gshard-flan-direct, "
    )
    arms = [
        arm.model_copy(
            update={"ledger": arm.ledger.model_copy(update={"real_tokens": 1000 + number})}
        )
        for number, arm in enumerate(many_arms.arms)
    ]
    first = arms[0].model_copy(update={"ledger": many_arms.arms[0].ledger})
    found = _about(
        limits(many_arms.model_copy(update={"arms": (first, *arms[1:])})), "at equal data"
    )
    assert len(found) == 1
    assert found[0].startswith(
        "dense-flan-direct was tuned on 127,168 tokens, and 24 arms on 1,001 to 1,024: dense-flan-finetune, "
    )
    assert "and 16 more" in found[0]


def test_of_many_comparisons_those_that_show_nothing_are_gathered(two_arms: ReportData) -> None:
    comparisons = list(_many(two_arms, 2).comparisons)
    comparisons[-1] = comparisons[-1].model_copy(update={"seed": 3})
    told = difference_sentences(comparisons)
    assert told[:2] == tuple(("better", difference_sentence(item)) for item in comparisons[:2])
    assert told[2:] == (
        (
            "unclear",
            "No evidence of a difference in loss from dense, each interval includes zero: "
            "arm-2, arm-3, arm-4, arm-5, arm-6, arm-7 and 6 more.",
        ),
    )
    assert difference_sentences(comparisons[1:])[-1][1].endswith("arm-7 and 6 more.")
    few = comparisons[:12]
    assert difference_sentences(few) == tuple(
        (item.verdict, difference_sentence(item)) for item in few
    )


def test_without_comparisons_nothing_is_claimed(one_dense_arm: ReportData) -> None:
    assert verdict(one_dense_arm) == (
        "No paired comparison was made, so this report claims no difference."
    )


def _about(sentences: tuple[str, ...], words: str) -> list[str]:
    return [sentence for sentence in sentences if words in sentence]


def test_limits_that_follow_from_the_data(two_arms: ReportData) -> None:
    found = limits(two_arms)
    assert _about(found, "373.2 M parameters at most, tuned on 127.2 k tokens")
    assert _about(found, "Every arm ran with one seed")
    assert _about(
        found, "4 intervals are shown, uncorrected: if nothing differed at all, 0.2 of them"
    )
    assert _about(found, "17 of the examples that dense and sparse answered were seen in training")
    assert not _about(found, "equal compute")
    assert not _about(found, "equal data")


def test_unequal_arms_are_called_unequal(two_arms: ReportData) -> None:
    dense, sparse = two_arms.arms
    heavier = sparse.model_copy(
        update={
            "flops": sparse.flops.model_copy(update={"body": 2 * sparse.flops.body}),
            "ledger": sparse.ledger.model_copy(update={"real_tokens": 1000}),
            "seeds": (0, 1),
        }
    )
    found = limits(
        two_arms.model_copy(update={"arms": (dense, heavier), "limits": ("Own words.",)})
    )
    assert _about(
        found, "sparse spends 1.70× the FLOPs per token of dense: this is no comparison at equal"
    )
    assert _about(found, "sparse was tuned on 1,000 tokens, dense on 127,168")
    assert not _about(found, "one seed")
    assert found[-1] == "Own words."


@pytest.mark.parametrize(("more", "unequal"), [(1.019, False), (1.021, True), (0.979, True)])
def test_rows_of_one_size_may_hold_a_little_more_padding(
    more: float, unequal: bool, two_arms: ReportData
) -> None:
    dense, sparse = two_arms.arms
    tokens = round(more * dense.ledger.real_tokens)
    ledger = sparse.ledger.model_copy(update={"real_tokens": tokens})
    other = sparse.model_copy(update={"ledger": ledger})
    found = limits(two_arms.model_copy(update={"arms": (dense, other)}))
    assert bool(_about(found, "equal data")) == unequal


def test_arms_on_different_data_are_said_to_be(two_arms: ReportData) -> None:
    (mixture,) = two_arms.data.mixtures
    apart = tuple(mixture.model_copy(update={"arms": (arm,)}) for arm in mixture.arms)
    data = two_arms.data.model_copy(update={"mixtures": apart})
    found = limits(two_arms.model_copy(update={"data": data}))
    assert _about(found, "dense and sparse were not tuned on the same data: a difference")
    assert not _about(limits(two_arms), "the same data")


def test_scores_with_and_without_errors() -> None:
    assert loss_text(Score(mean=1.8424, standard_error=0.0312, num_examples=9)) == "1.842 ± 0.031"
    assert loss_text(Score(mean=1.8424, num_examples=1)) == "1.842"
    assert loss_text(Score(mean=float("nan"), num_examples=9)) == "not finite"
    assert loss_text(None) == "not evaluated"
    assert accuracy_text(Score(mean=0.413, standard_error=0.031, num_examples=9)) == "41.3 % ± 3.1"
    assert accuracy_text(None) == "no choices"


def test_an_interval_upside_down_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"`low` must not lie above `high`, but found 1\.0 and -1\.0"
    ):
        _compared(1, -1)


def test_expert_load_in_numbers() -> None:
    load = ExpertLoadReport(layers=(1, 3), shares=((0.5, 0.5, 0.0, 0.0), (0.7, 0.1, 0.1, 0.1)))
    assert load.max_over_mean == pytest.approx(2.8)
    assert load.num_unused == 2


@pytest.mark.parametrize(
    ("layers", "shares"),
    [((0,), ((0.5, 0.5), (1.0, 0.0))), ((0, 1), ((0.5, 0.5), (1.0,))), ((0,), ((),))],
)
def test_ragged_expert_load_is_refused(
    layers: tuple[int, ...], shares: tuple[tuple[float, ...], ...]
) -> None:
    with pytest.raises(ValidationError, match="found"):
        ExpertLoadReport(layers=layers, shares=shares)


def test_memory_against_measurement() -> None:
    memory = Memory(estimate={"weights": 60, "gradients": 50}, measured=100)
    assert memory.relative_error == pytest.approx(0.1)
    assert Memory(estimate={"weights": 60}).relative_error is None


def test_seen_examples_add_up_over_tasks() -> None:
    score = Score(mean=1.0, num_examples=5)
    tasks = tuple(TaskScore(task=str(seen), loss=score, num_seen=seen) for seen in (2, 3))
    assert Evaluation(loss=score, tasks=tasks).num_seen == 5
