"""Effects of the factors of a study: tables where there are any, sentences where there cannot be."""

from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.observations import Observation, Observations
from flanmoe.study.factor_effects import factor_effects

ARMS = {"plain": {"prompt": "none"}, "asked": {"prompt": "instruction"}}


def scored(examples: dict[str, tuple[str, ...]]) -> Observations:
    """Losses that are 1 lower for `asked`, a little apart from example to example."""
    rows = [
        Observation(
            arm, seed, "t", example, "loss", 3.0 - (arm == "asked") + seed / 10 + place**2 / 100
        )
        for arm, keys in examples.items()
        for seed in (0, 1, 2)
        for place, example in enumerate(keys)
    ]
    return Observations(rows, arms=ARMS)


def test_an_effect_is_what_was_put_there() -> None:
    keys = tuple(f"row-{number}" for number in range(8))
    (table,), sentences = factor_effects(scored({"plain": keys, "asked": keys}), seeds=SeedTree(0))
    (effect,) = table.mains
    assert abs(effect.estimate + 1.0) < 1e-9
    assert not any("no effects" in sentence for sentence in sentences)


def test_arms_without_common_questions_cost_the_effects_alone() -> None:
    apart = {"plain": ("row-1", "row-2"), "asked": ("row-3", "row-4")}
    tables, (sentence,) = factor_effects(scored(apart), seeds=SeedTree(0))
    assert tables == ()
    assert sentence.startswith(
        "There are no effects of factors on loss. The arms `plain`, `asked` need examples of task `t` in "
        "common, but of 4 each is missing somewhere."
    )


def test_arms_that_differ_in_nothing_have_no_effects() -> None:
    one = {"plain": ("row-1", "row-2")}
    assert factor_effects(scored(one), seeds=SeedTree(0)) == ((), [])
