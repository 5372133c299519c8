"""Few-shot prompts, character by character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import DataError
from flanmoe.data.example import Example
from flanmoe.evaluation.tasks.few_shot import PromptStyle, few_shot

BONES = Example(
    inputs="Which is a bone?",
    target="femur",
    choices=("heart", "femur"),
    label=1,
    rationales=("The femur is in the leg.",),
    key="bones",
)
SUM = Example(inputs="1 + 1?", target="2", rationales=("One and one.",), key="sum")
ABOUT = "The following are multiple choice questions (with answers) about anatomy."


def test_the_direct_form() -> None:
    shown = few_shot([BONES], description=ABOUT, style=PromptStyle(), mode="direct")
    assert shown.asking(BONES) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Q: Which is a bone?\n(A) heart (B) femur\nA: (B)\n\n"
        "Q: Which is a bone?\n(A) heart (B) femur\nA:"
    )
    assert shown.num_shots == 1


def test_chains_of_thought() -> None:
    shown = few_shot([BONES], description=ABOUT, style=PromptStyle(), mode="chain_of_thought")
    assert shown.asking(SUM) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Q: Which is a bone?\n(A) heart (B) femur\n"
        "A: Let's think step by step. The femur is in the leg. The answer is (B).\n\n"
        "Q: 1 + 1?\nA: Let's think step by step."
    )


@pytest.mark.parametrize(
    ("options", "question", "answer"),
    [
        ("inline", "Q: Which is a bone?\n(A) heart (B) femur\nA:", "(B)"),
        ("listed", "Q: Which is a bone?\nOptions:\n(A) heart\n(B) femur\nA:", "(B)"),
        ("dashed", "Q: Which is a bone?\nOptions:\n- heart\n- femur\nA:", "femur"),
        ("hidden", "Q: Which is a bone?\nA:", "femur"),
    ],
)
def test_options_as_each_family_writes_them(options: str, question: str, answer: str) -> None:
    style = PromptStyle.parse({"options": options})
    shown = few_shot([BONES], description="", style=style, mode="direct")
    assert shown.asking(BONES) == f"{question} {answer}\n\n{question}"


def test_openings_and_closings_are_those_of_the_style() -> None:
    style = PromptStyle(
        options="hidden", opening=" Let's think step by step.\n", closing="So the answer is"
    )
    shown = few_shot([SUM], description="", style=style, mode="chain_of_thought")
    assert shown.shared == (
        "Q: 1 + 1?\nA: Let's think step by step.\nOne and one. So the answer is 2.\n\n"
    )
    plain = few_shot([SUM], description="", style=PromptStyle(opening=" "), mode="chain_of_thought")
    assert plain.asking(SUM) == "Q: 1 + 1?\nA: One and one. The answer is 2.\n\nQ: 1 + 1?\nA:"


def test_a_worked_example_without_a_chain_of_thought_is_named() -> None:
    bare = Example(inputs="1?", target="1", key="row-7")
    with pytest.raises(DataError, match="but `row-7` has none"):
        few_shot([bare], description="", style=PromptStyle(), mode="chain_of_thought")


texts = st.text(min_size=1, max_size=40).map(str.strip).filter(bool)


@given(texts, texts, st.sampled_from(["inline", "listed", "dashed", "hidden"]), st.booleans())
def test_all_prompts_of_a_task_begin_alike(
    first: str, second: str, options: str, chains: bool
) -> None:
    style = PromptStyle.parse({"options": options})
    mode = "chain_of_thought" if chains else "direct"
    shown = few_shot([BONES], description=ABOUT, style=style, mode=mode)
    for question in (first, second):
        prompt = shown.asking(Example(inputs=question, target="x", choices=("x", "y"), label=0))
        assert prompt.startswith(f"{shown.shared}Q: {question}")
