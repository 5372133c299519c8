"""The plan of shared beginnings against its definition: every text is read, every token once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flanmoe.evaluation.lm.token_tree import (
    MOST_TOKENS_IN_A_TREE,
    Group,
    Prefix,
    Text,
    num_computed,
    plan,
)

Tokens = tuple[int, ...]

# Few different tokens, so that texts share much.
token_texts = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple),
    min_size=1,
    max_size=24,
    unique=True,
)


def repeated(texts: list[Tokens], times: int) -> list[Tokens]:
    """The same tree with edges that are long enough to be worth a prefix."""
    return [tuple(token for token in text for _ in range(times)) for text in texts]


def up_to(prefix: Prefix | None) -> Tokens:
    return () if prefix is None else up_to(prefix.parent) + prefix.tokens


def texts_of(groups: list[Group]) -> dict[int, Tokens]:
    """What is read for each text, put together from prefixes and rows."""
    found: dict[int, Tokens] = {}
    for group in groups:
        for row in group.rows:
            for number, place in row.ends:
                own: list[int] = []
                while place >= 0:
                    own.append(row.tokens[place])
                    place = row.predecessors[place]
                assert number not in found
                found[number] = up_to(group.prefix) + tuple(own[::-1])
    return found


@given(token_texts, st.sampled_from([1, 7, 40]), st.booleans())
def test_every_text_is_read_whole_and_once(
    texts: list[Tokens], times: int, branching: bool
) -> None:
    texts = repeated(texts, times)
    groups = plan([Text(text, len(text) - 1) for text in texts], branching=branching)
    assert texts_of(groups) == dict(enumerate(texts))
    assert all(len(row.ends) == 1 or branching for group in groups for row in group.rows)


@given(token_texts, st.sampled_from([1, 7, 40]))
def test_no_more_is_computed_than_without_sharing_and_no_less_than_the_tree(
    texts: list[Tokens], times: int
) -> None:
    texts = repeated(texts, times)
    computed = num_computed(plan([Text(text, len(text) - 1) for text in texts]))
    beginnings = {text[:length] for text in texts for length in range(1, len(text) + 1)}
    assert len(beginnings) <= computed <= sum(map(len, texts))


@given(token_texts, st.sampled_from([1, 40]), st.randoms(use_true_random=False))
def test_a_prefix_holds_no_token_whose_prediction_is_needed(
    texts: list[Tokens], times: int, random: object
) -> None:
    texts = repeated(texts, times)
    needed = [random.randrange(len(text)) for text in texts]  # type: ignore[attr-defined]
    groups = plan([Text(*pair) for pair in zip(texts, needed, strict=True)])
    for group in groups:
        for row in group.rows:
            for number, _ in row.ends:
                assert group.prefix is None or needed[number] >= group.prefix.length


@given(token_texts, st.sampled_from([1, 40]))
@settings(max_examples=50)
def test_prefixes_stay_in_use_without_a_break(texts: list[Tokens], times: int) -> None:
    texts = repeated(texts, times)
    groups = plan([Text(text, len(text) - 1) for text in texts], branching=False)
    ways: list[list[Prefix]] = []
    for group in groups:
        way, part = [], group.prefix
        while part is not None:
            way.append(part)
            part = part.parent
        ways.append(way)
    for prefix in {part for way in ways for part in way}:
        used = [number for number, way in enumerate(ways) if prefix in way]
        assert used == list(range(used[0], used[-1] + 1))


def test_rows_see_their_own_way_only() -> None:
    texts = [(*"question", *"yes"), (*"question", *"no"), (*"question", *"not")]
    tokens = [tuple(map(ord, text)) for text in texts]
    (group,) = plan([Text(text, len(text) - 1) for text in tokens])
    (row,) = group.rows
    assert group.prefix is None
    assert "".join(map(chr, row.tokens)) == "questionnotyes"
    visible = row.visible()
    for place in range(len(row.tokens)):
        seen = "".join(chr(row.tokens[other]) for other in visible[place].nonzero()[0])
        way = row.path(place, int(row.depths()[place]) + 1)
        assert seen == "".join(chr(row.tokens[other]) for other in way)
    last = row.tokens.index(ord("y")) + 2
    assert "".join(chr(row.tokens[other]) for other in visible[last].nonzero()[0]) == "questionyes"
    assert row.depths().tolist() == [*range(11), 8, 9, 10]
    assert row.texts().tolist() == [1] * 10 + [2] + [0] * 3


def test_few_shot_prompts_share_a_prefix_and_choices_a_row() -> None:
    shots = tuple(range(1000, 1400))
    texts = [
        Text(
            (*shots, *range(100 * question, 100 * question + 90), *((5000 + choice,) * 3)), 400 + 89
        )
        for question in range(10)
        for choice in range(4)
    ]
    (group,) = plan(texts)
    assert group.prefix is not None
    assert (group.prefix.tokens, group.prefix.parent) == (shots, None)
    assert [len(row.tokens) for row in group.rows] == [90 + 4 * 3] * 10
    assert num_computed([group]) == 400 + 10 * 102


def test_a_long_branch_is_not_one_row() -> None:
    beginning = tuple(range(MOST_TOKENS_IN_A_TREE))
    (group,) = plan([Text((*beginning, end), len(beginning)) for end in (-1, -2, -3)])
    assert group.prefix is not None
    assert group.prefix.tokens == beginning
    assert [row.tokens for row in group.rows] == [(-3,), (-2,), (-1,)]


def test_a_text_that_another_one_begins_with_is_kept() -> None:
    groups = plan([Text((1, 2, 3), 2), Text((1, 2, 3, 4), 3)], branching=False)
    assert texts_of(groups) == {0: (1, 2, 3), 1: (1, 2, 3, 4)}


def test_deep_trees_need_no_deep_recursion() -> None:
    texts = [tuple([1] * length) for length in range(1, 3000)]
    assert len(texts_of(plan([Text(text, len(text) - 1) for text in texts]))) == 2999


def test_nothing_is_planned_for_nothing() -> None:
    assert plan([]) == []
