"""From scores to claims with verdicts: the one way in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing
from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.budget import ArmCosts, budget_matches
from flanmoe.study.analysis.claim_result import ClaimResult, Measurement
from flanmoe.study.analysis.claims import Claim, Contrast, check_claims
from flanmoe.study.analysis.contrast import ContrastEstimate, estimate_contrasts
from flanmoe.study.analysis.control import run_control
from flanmoe.study.analysis.holm import holm
from flanmoe.study.analysis.metric import Metric
from flanmoe.study.analysis.observations import Observations
from flanmoe.study.analysis.pairing import Paired, pair
from flanmoe.study.analysis.power import POWER, detectable, sufficient_scales
from flanmoe.study.analysis.sentences import sentence
from flanmoe.study.analysis.verdict import ALPHA, Claimed, PValues, claimed_sign, decide, p_values


@dataclass(frozen=True, slots=True)
class _Measured:
    """A claim with what was estimated about it."""

    claim: Claim
    contrast: Contrast
    paired: Paired
    estimate: ContrastEstimate
    left_out: tuple[str, ...]

    @property
    def claimed(self) -> Claimed:
        """The direction of the contrast that is claimed."""
        return _claimed(self.claim, self.paired.metric)


def analyse(
    observations: Observations,
    claims: Sequence[Claim],
    costs: Mapping[str, ArmCosts],
    *,
    seeds: SeedTree,
) -> tuple[ClaimResult, ...]:
    """Judge the claims of a study together, and return them in their order.

    Args:
        observations: all scores, and all arms, those that failed included.
        claims: the claims of the study: the family over which Holm's correction goes.
        costs: what each arm cost, for the budgets that claims require.
        seeds: where the draws come from. The order of claims and of records does not matter.

    Returns:
        One result a claim. A claim whose arms cannot be compared (one failed, diverged, or saw other
        examples) is `not measured`, and its sentence says why; the others are judged all the same.

    Raises:
        ConfigError: if a claim names an arm or a metric that is not declared, or if its effect has no matched
            arms.
    """
    check_claims(
        claims,
        arms=observations.arms,
        metrics=observations.metrics,
        # What nobody has scores of after all (a task at chance, an arm that failed) is a claim not measured.
        measured=observations.metrics,
    )
    found: dict[str, _Measured] = {}
    reasons: dict[str, str] = {}
    for claim in claims:
        try:
            found[claim.name] = _measure(observations, claim, seeds=seeds.child(claim.name))
        except (ConfigError, DataError) as error:
            reasons[claim.name] = str(error)
    tests = _tests(found)
    judged = {
        name: _measurement(one, tests.get(name), len(tests), seeds=seeds.child(name))
        for name, one in found.items()
    }
    blanks = {
        claim.name: _blank(observations, claim, costs, num_claims=len(tests)) for claim in claims
    }
    return tuple(
        blanks[claim.name].model_copy(update={"sentence": reasons[claim.name]})
        if claim.name in reasons
        else _judge(blanks[claim.name], judged[claim.name], found[claim.name].left_out)
        for claim in claims
    )


def _measure(observations: Observations, claim: Claim, *, seeds: SeedTree) -> _Measured:
    arms = observations.arms
    left_out: tuple[str, ...] = ()
    if claim.effect is not None:
        # An effect is a mean over pairs of arms: those of which an arm failed are left out, and named.
        failed = [arm for arm in arms if not observations.has(claim.metric, arm)]
        arms = {arm: factors for arm, factors in arms.items() if arm not in failed}
        if failed:
            left_out = (
                f"Left out with their partners, for want of `{claim.metric}`: {listing(failed)}.",
            )
    contrast = claim.contrast(arms)
    paired = pair(observations, claim.metric, tuple(contrast.weights), tasks=claim.tasks)
    (estimate,) = estimate_contrasts(paired, [contrast.weights], seeds=seeds.child("bootstrap"))
    return _Measured(claim, contrast, paired, estimate, (*left_out, *paired.left_out))


def _claimed(claim: Claim, metric: Metric) -> Claimed:
    if claim.direction != "better":
        return claim.direction
    return "higher" if metric.higher_is_better else "lower"


def _tests(measured: Mapping[str, _Measured]) -> dict[str, PValues]:
    """Correct the p-values of all claims that have one, each of the two tests over all claims."""
    found = {
        name: p_values(one.estimate, one.claimed, one.claim.margin)
        for name, one in measured.items()
        if not one.estimate.is_constant
    }
    corrected = holm([p for p, _ in found.values()])
    corrected_margin = holm([p_margin for _, p_margin in found.values()])
    return {
        name: PValues(
            p=p,
            p_holm=corrected[place],
            p_margin=p_margin,
            p_margin_holm=corrected_margin[place],
        )
        for place, (name, (p, p_margin)) in enumerate(found.items())
    }


def _measurement(
    one: _Measured, tests: PValues | None, num_claims: int, *, seeds: SeedTree
) -> Measurement:
    """Gather the numbers; power is that at the strictest level which Holm's correction may ask for."""
    estimate, paired, margin = one.estimate, one.paired, one.claim.margin
    level = ALPHA / max(num_claims, 1)
    # A claim of sameness can fail on either side, so each may fail half as often.
    power = (1 + POWER) / 2 if one.claimed == "same" else POWER
    smallest = detectable(estimate, level=level, power=power)
    return Measurement(
        estimate=estimate.mean,
        standard_error=estimate.standard_error,
        degrees_of_freedom=estimate.degrees,
        low=estimate.low,
        high=estimate.high,
        t_interval=estimate.t_interval,
        bootstrap_interval=estimate.bootstrap_interval,
        tests=tests,
        detectable=smallest,
        sufficient=sufficient_scales(estimate, margin, level=level, power=power)
        if smallest is not None and smallest > margin
        else (),
        control=None
        if smallest is None
        else run_control(
            paired.parts(one.contrast.weights),
            paired.strata,
            (claimed_sign(one.claimed) or 1) * max(margin, smallest),
            level=level,
            seeds=seeds.child("control"),
        ),
        seeds=paired.seeds,
        num_tasks=len(paired.tasks),
        num_examples=len(paired.examples),
    )


def _blank(
    observations: Observations, claim: Claim, costs: Mapping[str, ArmCosts], *, num_claims: int
) -> ClaimResult:
    """Return the result of a claim before anything is known but its arms' costs."""
    metric = observations.metrics[claim.metric]
    contrast = claim.contrast(observations.arms)
    return ClaimResult(
        name=claim.name,
        statement=claim.statement,
        metric=metric,
        contrast=contrast.text,
        claimed=_claimed(claim, metric),
        margin=claim.margin,
        verdict="not measured",
        sentence="",
        budgets=budget_matches(contrast.sides, costs, claim.requires),
        num_claims=num_claims,
    )


def _judge(blank: ClaimResult, found: Measurement, left_out: tuple[str, ...]) -> ClaimResult:
    verdict = decide(
        found.estimate,
        found.tests,
        claimed=blank.claimed,
        margin=blank.margin,
        detectable=found.detectable,
        num_seeds=len(found.seeds),
        budgets=blank.budgets,
    )
    judged = blank.model_copy(
        update={"measurement": found, "verdict": verdict, "left_out": left_out}
    )
    return judged.model_copy(update={"sentence": sentence(judged)})
