"""Claims as a file writes them: their contrasts, and every message about a wrong one."""

import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import ConfigError
from flanmoe.study.analysis.claims import Claim, check_claims
from flanmoe.study.analysis.metric import METRICS, Metric

ARMS: dict[str, dict[str, Any]] = {
    "dense": {"size": "small", "general": False},
    "dense-flan": {"size": "small", "general": True},
    "sparse": {"size": "large", "general": False},
    "sparse-flan": {"size": "large", "general": True},
    "lone": {"size": "huge", "general": True},
}
KNOWN = {
    metric.name: metric
    for metric in (*METRICS, Metric(name="entropy", higher_is_better=None, unit="nats"))
}


def _claim(text: str, **changes: Any) -> Claim:
    written = {"name": "one", "statement": "It is so.", "metric": "accuracy", "margin": 0.02}
    return Claim.parse({**written, **yaml.safe_load(text), **changes}, origin="study.yaml")


@pytest.mark.parametrize(
    ("text", "weights", "words"),
    [
        (
            "{better: sparse, than: dense}",
            {"sparse": 1, "dense": -1},
            "`sparse` minus `dense`",
        ),
        (
            "{better: dense, than: [sparse, lone]}",
            {"dense": 1, "sparse": -0.5, "lone": -0.5},
            "`dense` minus the mean of `sparse`, `lone`",
        ),
        (
            "{gain: {of: sparse-flan, over: sparse}, than_gain: {of: dense-flan, over: dense}}",
            {"sparse-flan": 1, "sparse": -1, "dense-flan": -1, "dense": 1},
            "the gain of `sparse-flan` over `sparse` minus the gain of `dense-flan` over `dense`",
        ),
        (
            "{gain: {of: sparse-flan, over: lone}, than_gain: {of: dense-flan, over: lone}}",
            {"sparse-flan": 1, "dense-flan": -1},
            "the gain of `sparse-flan` over `lone` minus the gain of `dense-flan` over `lone`",
        ),
        (
            "{weights: {sparse: 1, dense: -0.5, lone: -0.5}, direction: same}",
            {"sparse": 1, "dense": -0.5, "lone": -0.5},
            "1 × `sparse` − 0.5 × `dense` − 0.5 × `lone`",
        ),
        (
            "{effect: {factor: general, of: on, over: off}}",
            {"sparse-flan": 0.5, "sparse": -0.5, "dense-flan": 0.5, "dense": -0.5},
            "the effect of general on over off",
        ),
        (
            "{effect: {factor: general, of: on, over: off, given: {size: large}}}",
            {"sparse-flan": 1, "sparse": -1},
            "the effect of general on over off with size large",
        ),
        (
            "{effect: {factor: general, of: on, over: off, given: {size: large}}, "
            "than_effect: {factor: general, of: on, over: off, given: {size: small}}}",
            {"sparse-flan": 1, "sparse": -1, "dense-flan": -1, "dense": 1},
            "the effect of general on over off with size large minus that of general on over "
            "off with size small",
        ),
    ],
)
def test_contrasts(text: str, weights: dict[str, float], words: str) -> None:
    found = _claim(text).contrast(ARMS)
    assert found.weights == pytest.approx(weights)
    assert found.text == words
    check_claims([_claim(text)], arms=ARMS, metrics=KNOWN, measured=["accuracy"])


def test_which_arms_stand_for_each_other() -> None:
    gains = "{gain: {of: sparse-flan, over: sparse}, than_gain: {of: dense-flan, over: dense}}"
    assert _claim(gains).contrast(ARMS).sides == (
        (("sparse-flan",), ("dense-flan",)),
        (("sparse",), ("dense",)),
    )
    assert _claim("{weights: {a: 1, b: 1, c: -2}}").contrast(ARMS).sides == ((("a", "b"), ("c",)),)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
def test_every_contrast_sums_to_zero(better: list[str]) -> None:
    found = _claim("{}", better=better, than=["x", "y"]).contrast({})
    assert sum(found.weights.values()) == pytest.approx(0)


def test_budgets_that_are_only_named_get_five_percent() -> None:
    pair = "{better: a, than: b, requires: %s}"
    assert _claim(pair % "flops_per_token").requires == {"flops_per_token": 0.05}
    assert _claim(pair % "[tokens, training_flops]").requires == {
        "tokens": 0.05,
        "training_flops": 0.05,
    }
    assert _claim(pair % "{tokens: 0.02}").requires == {"tokens": 0.02}


def test_a_claim_is_written_back_as_it_reads() -> None:
    claim = _claim("{better: a, than: [b, c], tasks: mmlu/*, requires: tokens}")
    assert Claim.parse(yaml.safe_load(claim.to_yaml())) == claim


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{better: a, than: b, margin: 0}",
            "margin: `margin` must be above 0, as it is the smallest difference that matters, but found 0",
        ),
        (
            "{better: a, than: b, margin: -0.1}",
            "margin: `margin` must be above 0, as it is the smallest difference that matters, but found -0.1",
        ),
        ("{better: a}", "`better` and `than` go together, but found only one of them"),
        (
            "{than_effect: {factor: f, of: 1, over: 0}}",
            "`than_effect` goes with `effect`, but found it alone",
        ),
        (
            "{}",
            "a claim must hold exactly one of `better` and `than`, `gain` and `than_gain`, "
            "`effect`, or `weights`, "
            "but found 0",
        ),
        ("{better: a, than: b, weights: {a: 1, b: -1}}", "but found 2"),
        (
            "{weights: {a: 1, b: -0.5}}",
            "weights: the weights of a contrast must sum to 0, but found a sum of 0.5",
        ),
        ("{weights: {a: .nan, b: -0.5}}", "must sum to 0, but found a sum of nan"),
        (
            "{better: a, than: a}",
            "a claim must compare different arms, but found every arm on both sides alike",
        ),
        (
            "{better: a, than: b, direction: same}",
            "`better` says the direction; write the arms as `weights` for another, but found `direction: same`",
        ),
        (
            "{better: a, than: b, requires: {tokens: 5}}",
            "the tolerance of `tokens` must be a share from 0 to below 1, but found 5",
        ),
        ("{better: a, than: b, requires: [seconds]}", "requires.seconds"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        _claim(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{better: spare, than: dense}",
            "one: must compare arms of the study (`dense`, `dense-flan`, `sparse`, `sparse-flan`, `lone`), but "
            "found `spare`. Did you mean `sparse`?",
        ),
        (
            "{better: sparse, than: dense, metric: acuracy}",
            "one.metric: must be one that is measured (`accuracy`, `entropy`), but found "
            "`acuracy`. Did you mean "
            "`accuracy`?",
        ),
        (
            "{better: sparse, than: dense, metric: entropy}",
            "one.direction: must be `higher`, `lower` or `same` for `entropy`, of which "
            "neither more nor less is "
            "better, but found `better`.",
        ),
        (
            "{better: sparse, than: dense, tasks: [mmlu/*, bbh]}",
            "one.tasks: must name a task that is evaluated (`mmlu/x`), but found `bbh`.",
        ),
        (
            "{effect: {factor: generl, of: on, over: off}}",
            "one: An effect needs a factor that arms have (`size`, `general`), but found "
            "`generl`. Did you mean "
            "`general`? Give the arms that factor.",
        ),
        (
            "{effect: {factor: size, of: tiny, over: small}}",
            "one: The factor `size` has the levels `small`, `large`, `huge`, but found "
            "`tiny`. Add an arm with that "
            "level, or name another.",
        ),
        (
            "{effect: {factor: general, of: on, over: off, given: {size: huge}}}",
            "one: The effect of general on over off with size huge needs at least 1 pair of "
            "arms that differ in "
            "`general` alone, but found 0. Add the arms, or change `given`.",
        ),
    ],
)
def test_messages_about_the_study(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_claims(
            [_claim(text)],
            arms=ARMS,
            metrics=KNOWN,
            measured=["accuracy", "entropy"],
            tasks=["mmlu/x"],
        )
    assert str(caught.value) == f"claims have 1 problem:\n  {message}"


def test_all_problems_are_listed_and_names_must_differ() -> None:
    claims = [_claim("{better: sparse, than: none}"), _claim("{better: sparse, than: dense}")]
    with pytest.raises(ConfigError) as caught:
        check_claims(claims, arms=ARMS, metrics=KNOWN, measured=["loss"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "claims have 4 problems:"
    assert lines[-1] == "  one: claims need names of their own, but 2 have this one."
