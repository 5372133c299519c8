"""A study inside another: its arms and claims under names that begin with its own."""

from collections.abc import Mapping
from typing import Any

from flanmoe.study.analysis.claims import Claim
from flanmoe.study.analysis.observations import Level
from flanmoe.study.study import Study

_STUDY = "study"
_SIDES = ("better", "than")
_GAINS = ("gain", "than_gain")
_EFFECTS = ("effect", "than_effect")


def arms_of(study: Study) -> dict[str, dict[str, Any]]:
    """Return the arms of a study as a file writes them; a factor more says which study they are of."""
    return {
        _named(study, name): {
            **arm.to_mapping(),
            # As they are: JSON has no other types for levels, but a mapping of it may have other keys.
            "factors": {**arm.factors, _STUDY: _study_of(study, arm.factors)},
            "part_of": _named(study, arm.part_of) if arm.part_of else "",
        }
        for name, arm in study.arms.items()
    }


def claims_of(study: Study) -> list[dict[str, Any]]:
    """Return the claims of a study about its arms inside another."""
    return [_claim(study, claim) for claim in study.resolved_claims]


def _claim(study: Study, claim: Claim) -> dict[str, Any]:
    written = claim.model_dump(exclude_none=True)
    written["name"] = f"{study.name}.{claim.name}"
    for key in _SIDES:
        if key in written:
            written[key] = [_named(study, arm) for arm in written[key]]
    for key in _GAINS:
        if key in written:
            written[key] = {
                side: [_named(study, arm) for arm in arms] for side, arms in written[key].items()
            }
    for key in _EFFECTS:
        if key in written:
            given = written[key]["given"]
            written[key]["given"] = {**given, _STUDY: _study_of(study, given)}
    if "weights" in written:
        written["weights"] = {
            _named(study, arm): weight for arm, weight in written["weights"].items()
        }
    return written


def _study_of(study: Study, factors: Mapping[str, Level]) -> str:
    """Return the level of the factor that tells studies apart: where one is inside another, both names."""
    inner = factors.get(_STUDY)
    return study.name if inner is None else _named(study, str(inner))


def _named(study: Study, arm: str) -> str:
    return f"{study.name}-{arm}"
