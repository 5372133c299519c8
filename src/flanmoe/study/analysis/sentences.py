"""One plain sentence or two a verdict, with the numbers that it rests on."""

from flanmoe.study.analysis.claim_result import ClaimResult, Measurement
from flanmoe.study.analysis.power import Scale
from flanmoe.study.analysis.verdict import ALPHA, claimed_sign
from flanmoe.study.number_text import exact, p_text


def sentence(result: ClaimResult) -> str:
    """Say why a claim that was measured has its verdict."""
    found = result.measurement
    if found is None:
        raise ValueError("a claim that was not measured has its reason as its sentence")
    finding = _finding(result, found)
    if result.verdict.startswith("not "):
        unmatched = next(one for one in result.budgets if one.required and not one.matched)
        return (
            f"No comparison at the budget that the claim requires: {unmatched.sentence}. {finding}."
        )
    if result.verdict == "underpowered":
        return f"No evidence either way. {_power(result, found)} {finding}{_beyond(result, found)}."
    if found.tests is None:
        return (
            f"All {exact(found.num_examples)} differences are the same number, so chance cannot be judged; see "
            f"whether one arm is a copy of another. {finding}."
        )
    return f"{finding}; {_reason(result, found)}"


def _finding(result: ClaimResult, found: Measurement) -> str:
    text = result.metric.text
    p_value = "" if found.tests is None else f", {_p_of(result, found)}"
    return (
        f"{_capital(result.contrast)} in {result.metric.name} is {text(found.estimate)} {result.metric.unit} "
        f"(95 % interval {text(found.low)} to {text(found.high)}{p_value}; {_count(len(found.seeds), 'seed')}, "
        f"{exact(found.num_examples)} examples of {_count(found.num_tasks, 'task')})"
    )


def _p_of(result: ClaimResult, found: Measurement) -> str:
    tests = found.tests
    if tests is None:
        return ""
    corrected = (
        ""
        if result.num_claims == 1
        else f", {p_text(tests.p_holm)} by Holm over {result.num_claims} claims"
    )
    shown = p_text(tests.p)
    return f"p {shown if shown.startswith('<') else f'= {shown}'}{corrected}"


def _reason(result: ClaimResult, found: Measurement) -> str:
    text, margin = result.metric.text, result.metric.text(result.margin, sign=False)
    detectable = text(found.detectable or 0.0, sign=False)
    power = f"this design would find {detectable}"
    if result.claimed == "same":
        return {
            "reproduced": f"a difference of {margin} or more is ruled out ({power}).",
            "contradicted": f"the difference is larger than the margin of {margin}.",
        }.get(result.verdict, f"a difference of {margin} is neither shown nor ruled out.")
    if result.verdict == "reproduced":
        return f"as claimed, and {power}, which is not above the margin of {margin}."
    oriented = claimed_sign(result.claimed) * found.estimate
    if result.verdict == "contradicted":
        too_small = oriented > 0 and found.tests is not None and found.tests.p_holm <= ALPHA
        if too_small:
            return f"the difference is as claimed, but below the margin of {margin}: too small to matter."
        wrong_way = oriented < 0 and found.tests is not None and found.tests.p_holm <= ALPHA
        way = "the difference goes the other way" if wrong_way else "no difference is shown"
        return f"{way}, and one of {margin} as claimed is ruled out."
    return f"neither a difference as claimed is shown, nor one of {margin} ruled out."


def _power(result: ClaimResult, found: Measurement) -> str:
    text = result.metric.text
    margin = f"the margin of {text(result.margin, sign=False)} {result.metric.unit}"
    if found.detectable is None:
        return (
            "With 1 seed the luck of training has no measure, and no smallest difference that the design would "
            "find; run at least 3 seeds."
        )
    smallest = text(found.detectable, sign=False)
    missed = f"The smallest difference that this design would find is {smallest}, above {margin}"
    if not found.sufficient:
        return f"{missed}; no scale within 1,000 seeds would suffice."
    scales = " or ".join(_scale(scale, found) for scale in found.sufficient)
    return f"{missed}; with the spread measured here, {scales} would suffice."


def _beyond(result: ClaimResult, found: Measurement) -> str:
    """Say so where a design too small for its margin has found more than the margin all the same."""
    sign = claimed_sign(result.claimed)
    nearest = min(sign * found.low, sign * found.high)
    beyond = found.detectable is not None and sign and nearest > result.margin
    return "; all of the interval lies beyond the margin, as claimed" if beyond else ""


def _scale(scale: Scale, found: Measurement) -> str:
    return f"{_count(scale.seeds, 'seed')} on {exact(scale.examples)} examples"


def _count(number: int, what: str) -> str:
    return f"{exact(number)} {what}{'' if number == 1 else 's'}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
