"""Every error on purpose carries the exit status of the documented contract."""

import pytest

from flanmoe.core import errors


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.FlanmoeError, 1),
        (errors.DiskError, 1),
        (errors.UserError, 2),
        (errors.ConfigError, 2),
        (errors.DataError, 2),
        (errors.ModelError, 2),
        (errors.RunError, 2),
        (errors.Interrupted, 130),
    ],
)
def test_exit_statuses(kind: type[errors.FlanmoeError], status: int) -> None:
    assert kind("x").exit_code == status


def test_an_unexpected_error_is_one_sentence_with_a_way_out() -> None:
    assert errors.unexpected(KeyError("x")) == (
        "An unexpected KeyError stopped the command: 'x'. Set FLANMOE_TRACEBACK=1 to see where, and please "
        "report it."
    )
    assert errors.unexpected(ValueError("y"), way_out="Go.") == (
        "An unexpected ValueError stopped the command: y. Go."
    )


def test_the_table_above_names_every_error() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type)}
    assert len(defined) == 8
    assert all(issubclass(kind, errors.FlanmoeError) for kind in defined)
