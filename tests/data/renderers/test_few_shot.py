"""Exemplars before a question: never over the budget, as many as asked for, in the order given."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from flanmoe.data.renderers.base import Exchange
from flanmoe.data.renderers.few_shot import PATTERNS, Pattern, with_exemplars

ASKED = Exchange(user="last", response="answer")
_exchanges = st.lists(
    st.builds(
        Exchange, st.text("ab", min_size=1, max_size=9), st.text("cd", min_size=1, max_size=4)
    ),
    max_size=8,
)


def written_out(
    candidates: list[Exchange], pattern: Pattern, number: int, budget: int
) -> str | None:
    """The definition: take the first that still fits, until there are enough."""
    question = pattern.asked(ASKED.user)
    parts: list[str] = []
    for candidate in candidates:
        trial = [*parts, pattern.shown(candidate)]
        if len(parts) < number and len(pattern.opening + "".join(trial) + question) <= budget:
            parts = trial
    return pattern.opening + "".join(parts) + question if parts else None


@given(
    candidates=_exchanges,
    pattern=st.sampled_from(PATTERNS),
    number=st.integers(1, 5),
    budget=st.integers(1, 200),
)
def test_the_written_out_definition(
    candidates: list[Exchange], pattern: Pattern, number: int, budget: int
) -> None:
    found = with_exemplars(
        ASKED, candidates, pattern=pattern, number=number, budget=budget, count_tokens=len
    )
    expected = written_out(candidates, pattern, number, budget)
    assert (None if found is None else found.user) == expected
    if found is not None:
        assert len(found.user) <= budget
        assert found.response == "answer"


def test_a_prompt_in_full() -> None:
    shown = [Exchange("1 + 1", "2"), Exchange("2 + 2", "4")]
    found = with_exemplars(ASKED, shown, pattern=PATTERNS[1], number=5, budget=99, count_tokens=len)
    assert found == Exchange("Q: 1 + 1\nA: 2\n\nQ: 2 + 2\nA: 4\n\nQ: last\nA:", "answer")


def test_candidates_are_not_made_beyond_what_is_shown() -> None:
    made: list[int] = []

    def candidates() -> Iterator[Exchange]:
        for index in range(9):
            made.append(index)
            yield Exchange(str(index), "x")

    with_exemplars(ASKED, candidates(), pattern=PATTERNS[0], number=2, budget=99, count_tokens=len)
    assert made == [0, 1]


def test_patterns_differ() -> None:
    prompts = {(pattern.shown(ASKED), pattern.asked("x"), pattern.opening) for pattern in PATTERNS}
    assert len(prompts) == len(PATTERNS) >= 10
