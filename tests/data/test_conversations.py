"""Rows of turns: what is learnt, what is shown, and every message where a row cannot be read."""

import re
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import DataError
from flanmoe.data.conversations import FIELDS, conversation_field
from flanmoe.data.example import Example
from flanmoe.data.rows import example_from_row
from flanmoe.data.sources.base import Locator

HERE = Locator("talk/train.jsonl", 7)
SYSTEM, QUESTION, ANSWER = ("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2")


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def read(row: dict[str, Any]) -> Example:
    return example_from_row(row, HERE)


def message(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        read(row)
    return str(caught.value)


def test_the_last_turn_is_learnt_and_the_others_are_kept() -> None:
    row = {
        **messages(SYSTEM, QUESTION, ANSWER, ("user", " And 2 + 2? "), ("assistant", "4\n")),
        "id": 5,
        "source": "school",
        "tools": None,
    }
    assert read(row) == Example(
        inputs="And 2 + 2?",
        target="4",
        key="5",
        fields={"source": "school"},
        metadata={"source": "school"},
        history=(SYSTEM, QUESTION, ANSWER),
    )


def test_one_question_has_no_history() -> None:
    example = read(messages(QUESTION, ANSWER))
    assert (example.inputs, example.target, example.history) == ("1 + 1?", "2", ())
    assert example.key == "row-7"


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("role", "text", "names"),
    [
        ("role", "content", ("system", "user", "assistant")),
        ("role", "content", ("System", "USER", "Assistant")),
        ("from", "value", ("system", "human", "gpt")),
        ("from", "value", ("system", "user", "chatgpt")),
        ("from", "value", ("system", "prompter", "bot")),
        ("role", "content", ("system", "user", "model")),
    ],
)
def test_ways_of_writing_turns(field: str, role: str, text: str, names: tuple[str, ...]) -> None:
    said = zip(names, ("Be brief.", "1 + 1?", "2"), strict=True)
    turns = [{role: name, text: words, "weight": None} for name, words in said]
    example = read({field: turns})
    assert example == Example(inputs="1 + 1?", target="2", key="row-7", history=(SYSTEM,))


def test_in_dialogues_the_system_answers() -> None:
    turns = [
        {"speaker": "USER", "utterance": "A table, please.", "frames": [{"service": "tables"}]},
        {"speaker": "SYSTEM", "utterance": "For when?"},
        {"speaker": "USER", "utterance": "Nine."},
        {"speaker": "SYSTEM", "utterance": "It is booked."},
    ]
    example = read({"id": "d-1", "services": ["tables"], "turns": turns})
    assert (example.inputs, example.target) == ("Nine.", "It is booked.")
    assert example.history == (("user", "A table, please."), ("assistant", "For when?"))
    assert example.metadata == {"services": ["tables"]}


def test_turns_decide_before_other_fields() -> None:
    example = read({"prompt": "1 + 1?", "completion": "3", **messages(QUESTION, ANSWER)})
    assert example.target == "2"


@pytest.mark.parametrize("value", [None, "1 + 1?", ["1 + 1?", "2"], {"role": "user"}, 3])
def test_what_is_no_conversation(value: Any) -> None:
    assert conversation_field({"messages": value}) is None
    assert read({"messages": value, "question": "1 + 1?", "answer": "2"}).target == "2"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": []},
            "`messages` must hold the turns of a user and an assistant, but is empty.",
        ),
        (
            {"conversations": [{"who": "me", "what": "Hi."}]},
            "`conversations`: a turn must have the fields of a known form (`role + content`, `from + "
            "value`, `speaker + utterance`), but the first has `what`, `who`. Rename its fields.",
        ),
        (
            {"messages": [{"role": "user", "content": "Hi."}, "Hello."]},
            "`messages`, turn 2: a turn must be a mapping, but is a str.",
        ),
        (
            messages(QUESTION, ("asistant", "2")),
            "`messages`, turn 2: `role` must be one of `system`, `user`, `human`, `prompter`, "
            "`assistant`, `gpt`, `chatgpt`, `model`, `bot`, but is `asistant`. Did you mean "
            "`assistant`? Rename it.",
        ),
        (
            {"messages": [{"role": "user", "content": "Hi."}, {"from": "gpt", "value": "Hello."}]},
            "`messages`, turn 2: `role` must be one of `system`, `user`, `human`, `prompter`, "
            "`assistant`, `gpt`, `chatgpt`, `model`, `bot`, but is `None`. Rename it.",
        ),
        (
            {"turns": [{"speaker": "GUIDE", "utterance": "Hi."}]},
            "`turns`, turn 1: `speaker` must be one of `user`, `system`, but is `GUIDE`. Rename it.",
        ),
        (
            messages(QUESTION, ("assistant", " \n")),
            "`messages`, turn 2: `content` must hold text, but is empty. Fill it in, or take the turn "
            "out.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]},
            "`messages`, turn 1: `content` must be text, but is a list.",
        ),
        (
            messages(SYSTEM, QUESTION),
            "`messages` must hold a turn of the assistant to learn, but holds none. Set "
            "`on_bad_record: skip` for the task to leave such records out.",
        ),
        (
            messages(QUESTION, ANSWER, QUESTION),
            "`messages` must end in a turn of the assistant, but ends in one of the user. Cut off what "
            "follows its last turn.",
        ),
        (
            messages(ANSWER),
            "`messages`: user and assistant must take turns, the user first, but turn 1 is of the "
            "assistant instead of the user. Join or take out turns.",
        ),
        (
            messages(SYSTEM, QUESTION, QUESTION, ANSWER),
            "`messages`: user and assistant must take turns, the user first, but turn 3 is of the user "
            "instead of the assistant. Join or take out turns.",
        ),
        (
            messages(QUESTION, ANSWER, SYSTEM, QUESTION, ANSWER),
            "`messages`: user and assistant must take turns, the user first, but turn 3 is of the "
            "system instead of the user. Join or take out turns.",
        ),
        *(
            (
                {"messages": [{"role": "user", "content": "Hi."}, turn]},
                f"`messages`, turn 2: the turn belongs to a tool call ({what}), but tasks of text cannot "
                "show one. Set `on_bad_record: skip` for the task to leave such records out.",
            )
            for turn, what in (
                ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "`tool_calls`"),
                (
                    {"role": "assistant", "content": None, "function_call": {"name": "f"}},
                    "`function_call`",
                ),
                ({"role": "tool", "content": "2"}, "the role `tool`"),
                ({"role": "Function", "content": "2"}, "the role `Function`"),
            )
        ),
    ],
)
def test_conversations_that_cannot_be_read(row: dict[str, Any], problem: str) -> None:
    assert message(row) == f"talk/train.jsonl:7: {problem}"


def test_which_orders_are_read() -> None:
    """Against a written-out definition: an optional system turn, then user and assistant in pairs."""
    letters = {"s": SYSTEM, "u": QUESTION, "a": ANSWER}
    for length in range(1, 7):
        for order in map("".join, product("sua", repeat=length)):
            row = messages(*(letters[kind] for kind in order))
            if re.fullmatch(r"s?(ua)+", order):
                assert read(row).history == tuple(letters[kind] for kind in order[:-2])
            else:
                assert message(row).startswith("talk/train.jsonl:7: `messages`")


def test_the_hash_covers_the_history_and_stays_without_one() -> None:
    alone = read(messages(QUESTION, ANSWER))
    assert alone.content_hash() == read({"question": "1 + 1?", "answer": "2"}).content_hash()
    # The hash of an example before there was a history.
    assert alone.content_hash() == "2ba65e26ea6c512bf3ab2320"
    shown = read(messages(SYSTEM, QUESTION, ANSWER))
    assert shown.content_hash() != alone.content_hash()
    spaced = read(messages(("system", "be  BRIEF."), QUESTION, ANSWER))
    assert spaced.content_hash() == shown.content_hash()


_HISTORIES = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text("ab c", max_size=4)),
    max_size=3,
).map(tuple)


@given(first=_HISTORIES, second=_HISTORIES)
def test_different_histories_have_different_hashes(
    first: tuple[tuple[str, str], ...], second: tuple[tuple[str, str], ...]
) -> None:
    def folded(history: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
        return [(role, " ".join(text.split())) for role, text in history]

    hashes = [Example("q", "t", history=history).content_hash() for history in (first, second)]
    assert (hashes[0] == hashes[1]) == (folded(first) == folded(second))
