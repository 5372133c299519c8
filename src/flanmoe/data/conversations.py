"""Conversations: rows that hold turns.

The last turn of the assistant is what is learnt, and everything before it is shown. A conversation with
several turns of the assistant therefore gives one example, not one for each of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.data.sources.base import Locator, Row, as_list, as_mapping

FIELDS = ("messages", "conversations", "conversation", "turns")

_CHAT_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
# In corpora of dialogues the system is who answers.
_DIALOGUE_ROLES = {"user": "user", "system": "assistant"}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_TOOL_FIELDS = ("tool_calls", "function_call")


@dataclass(frozen=True, slots=True)
class Writing:
    """One way in which a turn is written.

    Attributes:
        role: field that says who speaks.
        text: field that says what.
        roles: names of the speakers, in small letters, and what we call them.
    """

    role: str
    text: str
    roles: Mapping[str, str]


WRITINGS = (
    Writing("role", "content", _CHAT_ROLES),
    Writing("from", "value", _CHAT_ROLES),
    Writing("speaker", "utterance", _DIALOGUE_ROLES),
)


class Turn(NamedTuple):
    """What one side says once.

    Attributes:
        role: `system`, `user` or `assistant`.
        text: what is said, without spaces around it.
    """

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that ends in a turn of the assistant.

    Attributes:
        history: the turns before the last question.
        user: the last question.
        assistant: the answer to it.
    """

    history: tuple[Turn, ...]
    user: str
    assistant: str


def conversation_field(row: Row) -> str | None:
    """Return the field of a row that holds a conversation, None where none does.

    A list of plain texts is no conversation, since it does not say who speaks.
    """
    for name in FIELDS:
        turns = as_list(row.get(name))
        if turns is not None and (not turns or any(as_mapping(turn) is not None for turn in turns)):
            return name
    return None


def read_conversation(row: Row, field: str, locator: Locator) -> Conversation:
    """Read the turns that a field holds.

    Args:
        row: field names and values.
        field: the field with the turns.
        locator: where the row stands; it is part of every message.

    Raises:
        DataError: if a turn has an unknown role or no text, or calls a tool; if the assistant says
            nothing or not the last word; or if user and assistant do not take turns, the user first,
            after a system turn or without one.
    """
    place = f"{locator}: `{field}`"
    values = as_list(row[field]) or []
    writing = _writing_of(values, place)
    turns = [_turn(value, writing, f"{place}, turn {n}") for n, value in enumerate(values, start=1)]
    _check_order(turns, place)
    *history, user, assistant = turns
    return Conversation(history=tuple(history), user=user.text, assistant=assistant.text)


def _writing_of(values: Sequence[Any], place: str) -> Writing:
    if not values:
        raise DataError(f"{place} must hold the turns of a user and an assistant, but is empty.")
    first = as_mapping(values[0]) or {}
    for writing in WRITINGS:
        if first.get(writing.role) is not None:
            return writing
    forms = [f"{writing.role} + {writing.text}" for writing in WRITINGS]
    raise DataError(
        f"{place}: a turn must have the fields of a known form ({listing(forms)}), but the first has "
        f"{listing(sorted(first)) or 'none'}. Rename its fields."
    )


def _turn(value: Any, writing: Writing, place: str) -> Turn:
    turn = as_mapping(value)
    if turn is None:
        raise DataError(f"{place}: a turn must be a mapping, but is a {type(value).__name__}.")
    _refuse_tools(turn, turn.get(writing.role), place)
    role = _role(turn.get(writing.role), writing, place)
    text = turn.get(writing.text)
    if not isinstance(text, str):
        raise DataError(f"{place}: `{writing.text}` must be text, but is a {type(text).__name__}.")
    if not text.strip():
        raise DataError(
            f"{place}: `{writing.text}` must hold text, but is empty. Fill it in, or take the turn out."
        )
    return Turn(role=role, text=text.strip())


def _refuse_tools(turn: Row, role: Any, place: str) -> None:
    called = [f"`{name}`" for name in _TOOL_FIELDS if turn.get(name)]
    if isinstance(role, str) and role.casefold() in _TOOL_ROLES:
        called.append(f"the role `{role}`")
    if called:
        raise DataError(
            f"{place}: the turn belongs to a tool call ({', '.join(called)}), but tasks of text cannot "
            "show one. Set `on_bad_record: skip` for the task to leave such records out."
        )


def _role(value: Any, writing: Writing, place: str) -> str:
    name = str(value).casefold()
    if name not in writing.roles:
        raise DataError(
            f"{place}: `{writing.role}` must be one of {listing(writing.roles)}, but is `{value}`."
            f"{nearest_name_hint(name, writing.roles)} Rename it."
        )
    return writing.roles[name]


def _check_order(turns: Sequence[Turn], place: str) -> None:
    if all(turn.role != "assistant" for turn in turns):
        raise DataError(
            f"{place} must hold a turn of the assistant to learn, but holds none. Set `on_bad_record: "
            "skip` for the task to leave such records out."
        )
    if turns[-1].role != "assistant":
        raise DataError(
            f"{place} must end in a turn of the assistant, but ends in one of the {turns[-1].role}. Cut "
            "off what follows its last turn."
        )
    begin = 1 if turns[0].role == "system" else 0
    for index, turn in enumerate(turns[begin:]):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise DataError(
                f"{place}: user and assistant must take turns, the user first, but turn "
                f"{begin + index + 1} is of the {turn.role} instead of the {expected}. Join or take "
                "out turns."
            )
