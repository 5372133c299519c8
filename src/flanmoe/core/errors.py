"""Errors a user can read: one sentence that says what, the limit, the value found, and the way out.

Every error that flanmoe raises on purpose derives from `FlanmoeError` and carries the exit status that
the command line turns it into (DESIGN 6): 2 for a user's mistake, 130 after Ctrl-C, 1 for anything else.
"""

_SEE_WHERE = "Set FLANMOE_TRACEBACK=1 to see where, and please report it."


class FlanmoeError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UserError(FlanmoeError):
    """Something the user asked for cannot be done as asked."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe, a study or a command line option is not valid."""


class DataError(UserError):
    """A data source is missing, unreadable or does not hold what a task needs."""


class ModelError(UserError):
    """A model cannot be used for what was asked of it."""


class RunError(UserError):
    """A run folder is missing, foreign, or in a state that forbids the request."""


class DiskError(FlanmoeError):
    """Writing failed because the disk is full or the folder cannot be written."""


class Interrupted(FlanmoeError):
    """The user pressed Ctrl-C; the state has been saved."""

    exit_code = 130


def unexpected(error: Exception, *, way_out: str = _SEE_WHERE) -> str:
    """Return the sentence about an error that is not raised on purpose."""
    return f"An unexpected {type(error).__name__} stopped the command: {error}. {way_out}"
