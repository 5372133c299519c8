"""`Registry`: a saved name keeps its meaning, and a wrong one is explained."""

from collections.abc import Callable

import pytest

from flanmoe.core.errors import ConfigError
from flanmoe.core.registry import Registry


def _registry() -> Registry[Callable[[], str]]:
    registry: Registry[Callable[[], str]] = Registry("router")
    for name in ("switch.v9", "switch.v10", "switch.v2", "expert_choice.v1"):
        registry.register(name)(lambda name=name: name)
    return registry


def test_a_name_without_version_means_the_newest_by_number() -> None:
    registry = _registry()
    assert registry.resolve("switch") == "switch.v10"
    assert registry.get("switch")() == "switch.v10"


def test_a_name_with_version_keeps_its_meaning() -> None:
    assert _registry().get("switch.v2")() == "switch.v2"


def test_register_returns_what_it_registers() -> None:
    registry: Registry[type] = Registry("thing")

    @registry.register("named.v1")
    class Named:
        pass

    assert registry.get("named") is Named
    assert Named.__name__ == "Named"


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(ConfigError) as raised:
        _registry().get("swich")
    assert str(raised.value) == (
        "The router `swich` is not known. Did you mean `switch`? Known: `expert_choice`, `switch`."
    )


def test_an_unknown_version_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"The router `switch\.v3` is not known\."):
        _registry().get("switch.v3")


@pytest.mark.parametrize("name", ["switch", "switch.vx", ".v1", "switch.v", "switch1"])
def test_a_name_must_have_a_version(name: str) -> None:
    with pytest.raises(ValueError, match=r"must read `base\.vN`"):
        Registry("router").register(name)


def test_a_name_can_be_taken_once() -> None:
    with pytest.raises(ValueError, match=r"The router `switch\.v2` is already registered\."):
        _registry().register("switch.v2")


def test_iterates_in_order() -> None:
    registry = _registry()
    assert list(registry) == ["expert_choice.v1", "switch.v10", "switch.v2", "switch.v9"]
    assert len(registry) == 4
