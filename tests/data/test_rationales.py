"""Chains of thought lose their opening and closing sentence, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.data.rationales import Reasoning, clean_rationale, take_apart


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("Let's think step by step. 2 + 2 = 4. The answer is 4.", "2 + 2 = 4.", "4"),
        ("Let’s think step by step.\nIt is so. So the answer is (D).", "It is so.", "(D)"),
        ("Sum it up. The final answer is 6", "Sum it up.", "6"),
        ("Step 1: look.   **Final Answer**: Yes.", "Step 1: look.", "Yes"),
        ("A = -3. So the answer is -219.\n\n", "A = -3.", "-219"),
        ("sort. So the answer is ] } ].", "sort.", "] } ]"),
        (
            "The answer is none of these, so the answer is (D).",
            "The answer is none of these,",
            "(D)",
        ),
        ("Therefore, the answer is 3.5.", "", "3.5"),
        ("The answer is clear:\nit rains.", "The answer is clear:\nit rains.", None),
        ("Nothing said at the end.", "Nothing said at the end.", None),
        ("", "", None),
    ],
)
def test_a_chain_is_taken_apart(text: str, reasoning: str, answer: str | None) -> None:
    assert take_apart(text) == Reasoning(text=reasoning, answer=answer)


@given(
    text=st.text("abc 12.", max_size=30).map(str.strip),
    answer=st.text("abc12", min_size=1, max_size=5),
)
def test_what_is_put_together_comes_apart(text: str, answer: str) -> None:
    whole = f"Let's think step by step. {text} So the answer is {answer}."
    assert take_apart(whole) == Reasoning(text=text, answer=answer)


def test_calculator_marks_go() -> None:
    text = "He sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72."
    assert clean_rationale(text, answers=("72",)) == (
        "He sold 48/2 = 24 clips.\nIn all 48+24 = 72."
    )


def test_a_closing_sentence_goes_only_where_it_gives_the_answer() -> None:
    assert clean_rationale("It is B. The answer is (b).", answers=("less", "(B)")) == "It is B."
    other = "Some say so. The answer is wrong."
    assert clean_rationale(other, answers=("less", "(B)")) == other
