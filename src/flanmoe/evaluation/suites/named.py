"""The suites that flanmoe knows by name."""

from collections.abc import Callable, Mapping

from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.data.tasks import TaskConfig
from flanmoe.evaluation.suites.flan import flan_suite
from flanmoe.evaluation.suites.groups import Part, PromptedGroup, PromptedSuite, PromptedTaskConfig
from flanmoe.evaluation.tasks.few_shot import PromptStyle

# Tasks that flanmoe itself never trains on: the authors of BIG-bench ask that nobody does.
HELD_OUT = ("exemplars/bbh/*",)


def smoke_suite() -> PromptedSuite:
    """Return a few questions of every kind, from worked examples that lm-eval ships.

    What is shown is left out of what is asked. It says that evaluation works, and nothing about a model.
    """
    return PromptedSuite(
        name="smoke",
        groups=(
            PromptedGroup(
                name="letters_direct",
                title="Letters compared, direct",
                mode="direct",
                shots=2,
                held="in",
                tasks=tuple(
                    _small(f"mmlu_cot/{name}", PromptStyle(), 1 / 4)
                    for name in ("anatomy", "virology")
                ),
            ),
            PromptedGroup(
                name="written_direct",
                title="Short answers written, direct",
                mode="direct",
                shots=1,
                held="out",
                tasks=(
                    _small("bbh/object_counting", PromptStyle(options="hidden"), 0.0),
                    _small("bbh/navigate", PromptStyle(options="dashed"), 1 / 2),
                ),
            ),
            PromptedGroup(
                name="written_cot",
                title="Chains of thought written",
                mode="chain_of_thought",
                shots=4,
                held="in",
                tasks=(_small("gsm8k_cot", PromptStyle(options="hidden", opening=" "), 0.0),),
            ),
        ),
    )


def _small(name: str, style: PromptStyle, chance: float) -> PromptedTaskConfig:
    part = Part(source=TaskConfig(name=f"exemplars/{name}"))
    return PromptedTaskConfig(
        name=name.rpartition("/")[2],
        questions=part,
        exemplars=part,
        description=None,
        style=style,
        chance=chance,
    )


_PROMPTED: Mapping[str, Callable[[], PromptedSuite]] = {"flan": flan_suite, "smoke": smoke_suite}
SUITE_NAMES = ("flan", "held-out", "smoke")


def check_suite_name(name: str) -> None:
    """Refuse a name that no suite has.

    Raises:
        ConfigError: if no suite is called that; names the nearest one.
    """
    if name not in SUITE_NAMES:
        raise ConfigError(
            f"The suite `{name}` is not known.{nearest_name_hint(name, SUITE_NAMES)} "
            f"Known: {listing(SUITE_NAMES)}."
        )


def prompted_suite(name: str) -> PromptedSuite | None:
    """Return a suite of few-shot groups by name, None where the suite is a plain list of tasks."""
    check_suite_name(name)
    return _PROMPTED[name]() if name in _PROMPTED else None
