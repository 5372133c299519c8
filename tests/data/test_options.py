"""Options are taken out only where that is certain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.data.options import (
    SplitQuestion,
    label_of,
    letter,
    looks_optional,
    read_options,
    split_question,
)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (
            "What is it?\nOptions:\n(A) a cat\n(B) a dog\n(C) rain",
            "(B)",
            SplitQuestion("What is it?", ("a cat", "a dog", "rain"), 1),
        ),
        (
            "What is it?\nOptions:\n- (A) a cat\n- (B) a dog",
            "(A)",
            SplitQuestion("What is it?", ("a cat", "a dog"), 0),
        ),
        (
            "Is it so?\nOptions:\n- yes\n- no",
            "no",
            SplitQuestion("Is it so?", ("yes", "no"), 1),
        ),
        (
            "Which cavity?\n(A) chest (B) head (C) the (A) one",
            "(B)",
            None,  # the letters run A, B, C, A
        ),
        (
            "Which cavity?\n(A) chest (B) head (C) none",
            "(C)",
            SplitQuestion("Which cavity?", ("chest", "head", "none"), 2),
        ),
        (
            "Which applies? A. go left.  B. go right.  C. stay.",
            "C",
            SplitQuestion("Which applies?", ("go left.", "go right.", "stay."), 2),
        ),
        (
            'What holds after "go"? **Possible Answers**: A. this.  B. that.',
            "A.",
            SplitQuestion('What holds after "go"?', ("this.", "that."), 0),
        ),
        (
            "Lines\nII. two\nWhich?\n(A) I only\n(B) II only",
            "(B)",
            SplitQuestion("Lines\nII. two\nWhich?", ("I only", "II only"), 1),
        ),
    ],
)
def test_forms_that_are_understood(
    question: str, answer: str, expected: SplitQuestion | None
) -> None:
    assert split_question(question, answer) == expected


@pytest.mark.parametrize(
    ("question", "answer", "why"),
    [
        ("Q?\nOptions:\n(A) one\n(C) two", "(A)", "a letter is missing"),
        ("Q?\nOptions:\n(B) one\n(C) two", "(B)", "the letters do not begin at A"),
        ("Q?\nOptions:\n(A) one\n(B) two", "(C)", "the answer names no option"),
        ("Q?\nOptions:\n(A) one\n(B) two", "two", "the answer names no letter"),
        ("Q?\nOptions:\n(A) one", "(A)", "one option is no choice"),
        ("Q?\nOptions:\n(A) one\n(B) ", "(A)", "an option is empty"),
        ("Q?\nOptions:\n- yes\n- no\n- yes", "yes", "two options are the same"),
        ("Q?\nOptions:\n- yes\n- no", "maybe", "the answer is no option"),
        ("Q?\nOptions:\n- yes\nno", "yes", "the lines have two forms"),
        ("\nOptions:\n(A) one\n(B) two", "(A)", "nothing is asked"),
        ("Made by A. Person and B. Other.", "42", "names, not options"),
        ("No options at all?", "(A)", "there are none"),
    ],
)
def test_what_is_not_certain_stays_as_it_is(question: str, answer: str, why: str) -> None:
    assert split_question(question, answer) is None, why


_WORDS = st.text("abcdefgh ", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(stem=_WORDS, choices=st.lists(_WORDS, min_size=2, max_size=26), data=st.data())
def test_written_options_are_read_back(stem: str, choices: list[str], data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(choices) - 1))
    lines = "\n".join(f"({letter(i)}) {choice}" for i, choice in enumerate(choices))
    found = split_question(f"{stem}\nOptions:\n{lines}", f"({letter(label)})")
    assert found == SplitQuestion(stem, tuple(choices), label)
    inline = " ".join(f"({letter(i)}) {choice}" for i, choice in enumerate(choices))
    assert split_question(f"{stem}\n{inline}", letter(label)) == found


def test_a_field_of_options_is_read() -> None:
    assert read_options("A) jelly jar B) baby food jar") == ("jelly jar", "baby food jar")
    assert read_options("B) jelly jar C) baby food jar") is None
    assert read_options("yes or no") is None


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("(B)", 1),
        ("B", 1),
        ("B.", 1),
        ("B) less", 1),
        ("(B) less", 1),
        ("B) more", None),
        ("(D)", None),
        ("less", None),
    ],
)
def test_which_option_an_answer_names(answer: str, label: int | None) -> None:
    assert label_of(answer, ("more", "less", "as much")) == label


def test_questions_that_seem_to_carry_options_can_be_counted() -> None:
    assert looks_optional("Which?\nOptions:\n- Sentence A: x\n- Sentence B: y")
    assert looks_optional("Which?\n(A) x (B) y (A) z")
    assert not looks_optional("Is (A) right?")
