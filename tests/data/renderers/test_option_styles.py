"""Options as text: the answer is the name of the option where a style names options, else its text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example
from flanmoe.data.renderers.base import answer_texts
from flanmoe.data.renderers.option_styles import OptionBlock, option_block

SEEDS = SeedTree(0)
_choices = st.lists(
    st.text(alphabet="abcdefgh XYZ", min_size=1).map(str.strip).filter(bool),
    min_size=2,
    max_size=40,
    unique=True,
)


def random_block(choices: list[str], seed: int) -> OptionBlock:
    return option_block(choices, "random", SeedTree(seed))


def test_letters_in_full() -> None:
    assert option_block(["no", "yes"], "letters", SEEDS) == OptionBlock(
        "Options:\n(A) no\n(B) yes", ("(A)", "(B)")
    )


def test_beyond_the_alphabet_letters_go_on_as_in_the_direct_renderer() -> None:
    names = tuple(f"intent {number}" for number in range(28))
    block = option_block(names, "letters", SEEDS)
    assert block.answers == answer_texts(Example(inputs="?", target="", choices=names))
    assert block.text.endswith("\n(Z) intent 25\n(AA) intent 26\n(AB) intent 27")


@given(choices=_choices, seed=st.integers(0, 2**32))
def test_every_option_stands_in_a_line_of_its_own_behind_its_answer(
    choices: list[str], seed: int
) -> None:
    block = random_block(choices, seed)
    lines = block.text.splitlines()[-len(choices) :]
    assert len(set(block.answers)) == len(block.answers) == len(choices)
    named = list(block.answers) != choices
    for line, choice, answer in zip(lines, choices, block.answers, strict=True):
        assert choice in line
        if named:
            assert line.startswith(answer)


@given(choices=_choices, seed=st.integers(0, 2**32))
def test_a_style_is_a_function_of_its_seeds(choices: list[str], seed: int) -> None:
    assert random_block(choices, seed) == random_block(choices, seed)


def test_styles_are_many_and_of_both_kinds() -> None:
    choices = ["heads", "tails"]
    blocks = [random_block(choices, seed) for seed in range(400)]
    by_text = sum(list(block.answers) == choices for block in blocks)
    assert len({block.text for block in blocks}) > 150
    # 6 of 34 markers name nothing.
    assert 0.08 < by_text / len(blocks) < 0.30


@pytest.mark.parametrize(
    ("answers", "options"),
    [
        (("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi"), 11),
        (("1", "2", "3"), 3),
        (("a", "b"), 2),
        (("[A]", "[B]"), 2),
    ],
)
def test_markers_are_said_bare_unless_they_are_in_brackets(
    answers: tuple[str, ...], options: int
) -> None:
    choices = [f"choice {number}" for number in range(options)]
    assert answers in {random_block(choices, seed).answers for seed in range(600)}
