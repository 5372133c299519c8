"""Hard cases of reading answers out of text, properties, and the measured shares on real text."""

import os
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lm_eval.filters.extraction import RegexFilter

from flanmoe.data.example import Example
from flanmoe.data.options import MAXIMUM_OPTIONS
from flanmoe.data.renderers import Occasion, renderer_named
from flanmoe.data.sources.finding import find_source
from flanmoe.data.tasks import Task, TaskConfig, load_task
from flanmoe.evaluation.answers import (
    direct_answer,
    extract_number,
    extract_option,
    extract_span,
    final_answer,
    graded_answer,
    normalise_span,
    read_number,
    same_answer,
)


def _cases(table: Sequence[tuple[Any, ...]]) -> Any:
    """Rows (id, argument, ...) as parameters named by their ids."""
    names = [row[0] for row in table]
    assert len(set(names)) == len(names)
    return [pytest.param(*row[1:], id=row[0]) for row in table]


# --- Where the answer stands --------------------------------------------------------------------

ENDINGS = [
    ("plain", "2 + 2 = 4. The answer is 4.", "4"),
    ("so", "Sum it up. So the final answer is 6", "6"),
    ("colon", "Answer: Paris", "Paris"),
    ("shouting", "ANSWER: PARIS", "PARIS"),
    ("markdown", "Step 1: look.   **Final Answer**: Yes.", "Yes"),
    ("emphasis inside", "The answer is **18**.", "18"),
    ("brackets", "4. A fly has two.\n[Final answer] D) a centipede", "D) a centipede"),
    ("heading", "## Final answer\n\n18", "18"),
    ("next line", "The answer is:\n\n  18", "18"),
    ("to the question", "The answer to the first question is Paris.", "Paris"),
    ("correct option", "The correct option would be B.", "B"),
    ("must be", "Therefore the answer must be 5", "5"),
    ("gsm8k", "He has 5 + 13 = 18.\n#### 18", "18"),
    ("gsm8k, and the model goes on", "#### 18\n\nQuestion: how many?", "18"),
    ("gsm8k in one line", "5 + 13 = 18 #### 18", "18"),
    ("gsm8k with a word", "#### Paris\n", "Paris"),
    ("a heading of markdown", "#### Step 2\nThen he sells them.", None),
    ("boxed", "so $x = \\boxed{x^{2}}$.", "x^{2}"),
    ("boxed text", "\\boxed{\\text{(B)}}", "(B)"),
    ("boxed is open", "\\boxed{18", None),
    ("boxed after a phrase", "The answer is $\\boxed{18}$ apples", "18"),
    ("phrase after boxed", "\\boxed{3}. No: the answer is 4", "4"),
    ("two phrases", "The answer is (B). Wait. The answer is (C).", "(C)"),
    ("cut off", "The answer is 5.\nFinal answer:", "5"),
    ("only symbols", "so the answer is ] } ].", "] } ]"),
    ("first line only", "The answer is no.\nExplanation: it rains.", "no"),
    ("asked, not said", "Who knows what the answer is?", None),
    ("reasoning after the cue", "Answer: Let's think step by step.\nHe runs.", None),
    ("plural", "My answers are these", None),
    ("isn't", "The answer isn't 5", None),
    ("no phrase", "He has 18 apples.", None),
    ("empty", "", None),
]


@pytest.mark.parametrize(("text", "expected"), _cases(ENDINGS))
def test_where_the_answer_stands(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


DIRECT = [
    ("one line", "Paris", "Paris"),
    ("the model goes on", "\n\n B.\nQuestion: next? The answer is Rome", "B"),
    ("with a phrase", "Answer: B\nbecause", "B"),
    ("decimal", ".5", ".5"),
    ("nothing", " \n...\n", None),
]


@pytest.mark.parametrize(("text", "expected"), _cases(DIRECT))
def test_direct_answers(text: str, expected: str | None) -> None:
    assert direct_answer(text) == expected


# --- Numbers ------------------------------------------------------------------------------------

NUMBERS = [
    ("thousands", "1,000", "1000"),
    ("millions", "The answer is 1,234,567.", "1234567"),
    ("currency", "$18", "18"),
    ("currency and a space", "$ 18", "18"),
    ("currency after", "18€", "18"),
    ("currency code", "USD 18", "18"),
    ("currency of a country", "US$18.50", "37/2"),
    ("rupees", "Rs. 500", "500"),
    ("decimal", "18.0", "18"),
    ("cents", "The answer is **$1,234.50**.", "2469/2"),
    ("no leading zero", ".5", "1/2"),
    ("leading zeros", "007", "7"),
    ("negative", "-3", "-3"),
    ("unicode minus", "The answer is −3.", "-3"),
    ("en dash as minus", "The answer is –3.", "-3"),
    ("negative money", "-$18", "-18"),
    ("money, negative", "$-18", "-18"),
    ("plus", "+18", "18"),
    ("ratio", "3/4", "3/4"),
    ("mixed", "1 3/4 cups", "7/4"),
    ("vulgar fraction", "½", "1/2"),
    ("mixed vulgar fraction", "The answer is 1½.", "3/2"),
    ("latex fraction", "\\boxed{\\frac{3}{4}}", "3/4"),
    ("latex mixed", "\\boxed{2\\dfrac{1}{2}}", "5/2"),
    ("latex thousands", "\\boxed{1{,}000}", "1000"),
    ("latex dollar", "The answer is \\$18.", "18"),
    ("latex degrees", "\\boxed{90^\\circ}", "90"),
    ("division by zero", "1/0", None),
    ("exponent", "1e3", "1000"),
    ("powers of ten", "3 × 10^5", "300000"),
    ("negative power of ten", "3 x 10^{-2}", "3/100"),
    ("percent", "The answer is 50%.", "50"),
    ("million", "$1.5 million", "1500000"),
    ("million, one letter", "$5m", None),
    ("metres", "5m", "5"),
    ("unit", "18 apples", "18"),
    ("glued unit", "18kg", "18"),
    ("squared unit", "The area is 18 cm^2", "18"),
    ("ordinal", "the 18th", "18"),
    ("age", "an 18-year-old", "18"),
    ("trailing period", "18.", "18"),
    ("bold", "**18**", "18"),
    ("gsm8k", "5 + 13 = 18\n#### 18", "18"),
    ("number sign", "The answer is No. 5.", "5"),
    ("number sign, no phrase", "No. 5", "5"),
    ("last in the text", "He has 5. He buys 13, so he has 18.", "18"),
    ("after the phrase", "It costs 7. The answer is 18.", "18"),
    ("two after the phrase", "The answer is that Tom, who had 5, now has 18.", "18"),
    ("next sentence does not count", "The answer is 18. This is because 3 * 6.", "18"),
    ("number in the next sentence", "The answer is clear. It is 18.", "18"),
    ("reason", "The answer is 18 because there are 3 boxes.", "18"),
    ("reason before a result", "He took 12 since 5 left, so 7.", "7"),
    ("remark", "The answer is 18 (6 per box).", "18"),
    ("only in parentheses", "The answer is (18).", "18"),
    ("equation", "The answer is 5 + 13 = 18 apples.", "18"),
    ("equation and more", "So 2 x 10 = 20 brownies from the 10 boxes.", "20"),
    ("sum not worked out", "The answer is 5 + 13.", None),
    ("product not worked out", "total = 5 * (3 + 1)", None),
    ("list", "1, 2, 3", None),
    ("list without spaces", "The answer is 1,2", None),
    ("one of two", "The answer is 3 or 4.", None),
    ("one of two with units", "The answer is 3 apples or 4 apples.", None),
    ("twice the same", "The answer is 18, that is 18.0", "18"),
    ("range", "between 3 and 4", None),
    ("range with a dash", "The answer is 3-4.", None),
    ("two units", "The answer is 3 hours and 20 minutes.", None),
    ("out of", "The answer is 18 out of 20.", None),
    ("two unknowns", "x = 3, y = 4", None),
    ("pair", "(3, 4)", None),
    ("denied", "The answer is not 5 but 6", "6"),
    ("only denied", "The answer is not 5.", None),
    ("european decimal", "3,14", None),
    ("european thousands", "1.234,56", None),
    ("two points", "1.000.000", None),
    ("indian grouping", "1,00,000", None),
    ("thin spaces", "The answer is 18\u202f000.", "18000"),
    ("plain spaces", "The answer is 18 000.", None),
    ("time", "The answer is 7:30 p.m.", None),
    ("earlier number does not stand in", "He has 5 and leaves at 7:30", None),
    ("date", "3/4/2020", None),
    ("iso date", "2020-01-05", None),
    ("subtraction", "5-3 = 2", "2"),
    ("power", "2^10", None),
    ("power, worked out", "2^10 = 1024", "1024"),
    ("superscript", "5²", None),
    ("root", "The answer is 2\\sqrt{3}", None),
    ("half of x", "\\boxed{\\frac{x}{2}}", None),
    ("multiple of x", "2x", None),
    ("pi", "The answer is 2π", None),
    ("recurring", "The answer is 0.333...", None),
    ("name with a digit", "vitamin B12", None),
    ("name with a digit beside", "The answer is 18 mg of B12.", "18"),
    ("word", "The answer is eighteen.", "18"),
    ("word with unit", "twenty-five apples", "25"),
    ("word with scale", "two hundred", "200"),
    ("word, negative", "minus eighteen", "-18"),
    ("word as part of a sentence", "One of them is right", None),
    ("words that go on", "one hundred and twenty", None),
    ("numbered steps", "1. He has 5.\n2. He gets 3, so 8.\n3. Done.", "8"),
    ("astronomic", "1e999999999", None),
    ("too long", "9" * 5000, None),
    ("nothing", "I do not know.", None),
    ("empty", "", None),
]


@pytest.mark.parametrize(("text", "expected"), _cases(NUMBERS))
def test_numbers(text: str, expected: str | None) -> None:
    assert extract_number(text) == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("$1,000.", "1000"), ("-1/2", "-1/2"), ("18 apples", None), ("x", None), ("1, 2", None)],
)
def test_a_text_that_is_one_number(text: str, expected: str | None) -> None:
    assert read_number(text) == (None if expected is None else Fraction(expected))


# --- Options ------------------------------------------------------------------------------------

AMOUNTS = ("more", "less", "as much")
YES_NO = ("yes", "no")
VALID = ("valid", "invalid")
ENTAILED = ("entailed", "not entailed")
TEN = tuple(f"thing {name}" for name in "pqrstuvwxy")
BLOOD = ("A", "B", "O", "AB")

OPTIONS = [
    ("parentheses", "(B)", AMOUNTS, 1),
    ("brackets", "[b]", AMOUNTS, 1),
    ("full-width", "（B）", AMOUNTS, 1),
    ("letter", "B", AMOUNTS, 1),
    ("small letter", "b", AMOUNTS, 1),
    ("bold", "**B**", AMOUNTS, 1),
    ("full stop", "B.", AMOUNTS, 1),
    ("closing parenthesis", "B)", AMOUNTS, 1),
    ("with its text", "B) less", AMOUNTS, 1),
    ("with its text, dotted", "B. less", AMOUNTS, 1),
    ("with its text, dashed", "B - less", AMOUNTS, 1),
    ("with another's text", "B) more", AMOUNTS, None),
    ("with another's text after the phrase", "The answer is (B) more.", AMOUNTS, None),
    ("phrase", "The answer is (B).", AMOUNTS, 1),
    ("phrase, bare", "the answer is b", AMOUNTS, 1),
    ("answer colon", "Answer: B", AMOUNTS, 1),
    ("option J", "option J", TEN, 9),
    ("option J after the phrase", "The answer is option J.", TEN, 9),
    ("option beyond", "The answer is (K).", TEN, None),
    ("choice", "I take choice b.", AMOUNTS, 1),
    ("is the correct answer", "Option A fails. (B) is the correct answer.", AMOUNTS, 1),
    ("bare, is the right option", "So B is the right option.", AMOUNTS, 1),
    ("boxed", "\\boxed{B}", AMOUNTS, 1),
    ("gsm8k", "#### B", AMOUNTS, 1),
    ("alone on the last line", "Let me see.\nB", AMOUNTS, 1),
    ("with a reason", "The answer is A because it rains.", AMOUNTS, 0),
    ("the article", "A dog is an animal.", AMOUNTS, None),
    ("the article after the phrase", "The answer is A good one.", AMOUNTS, None),
    ("the pronoun", "The answer is I think", TEN, None),
    ("the letter I", "The answer is I.", TEN, 8),
    ("vitamin", "Vitamin B is good for you", AMOUNTS, None),
    ("plan", "Let us try Plan B", AMOUNTS, None),
    ("plan in parentheses", "try this (Plan B)", AMOUNTS, None),
    ("compound", "The answer is B-complex", AMOUNTS, None),
    ("inside a word", "two apple(s) and f(a)", AMOUNTS, None),
    ("id est", "i.e. a thing", TEN, None),
    ("text with a marker's look", "E. coli", ("virus", "E. coli", "x", "y", "z"), 1),
    ("text with markers in it", "Both A and B", ("x", "y", "Both A and B"), 2),
    ("texts are letters", "O", BLOOD, 2),
    ("texts are letters, longer", "AB", BLOOD, 3),
    ("letters in another order", "B", ("B", "A"), None),
    ("marker against letters", "(B)", ("B", "A"), 1),
    ("text", "LESS!", AMOUNTS, 1),
    ("text in quotes", "The answer is ‘as  much’.", AMOUNTS, 2),
    ("text with an article", "The answer is the dog", ("a dog", "a cat"), 0),
    ("vitamin as text", "The answer is vitamin B.", ("vitamin A", "vitamin B"), 1),
    ("invalid", "The argument is invalid.", VALID, 1),
    ("invalid after the phrase", "The answer is invalid.", VALID, 1),
    ("valid", "The answer is valid.", VALID, 0),
    ("not valid", "The answer is not valid.", VALID, None),
    ("non-toxic", "It is non-toxic", ("toxic", "harmless"), None),
    ("not entailed", "The answer is: not entailed", ENTAILED, 1),
    ("entailed", "entailed", ENTAILED, 0),
    ("number inside a number", "5.5", ("5", "5.5", "55"), 1),
    ("number at the end", "The answer is 5.", ("5", "5.5", "55"), 0),
    ("negative number", "The answer is -5.", ("5", "-5"), 1),
    ("same texts", "same", ("same", "same"), None),
    ("same texts, marked", "The answer is (B) same", ("same", "same"), 1),
    ("two answers", "(A)? (C)!", AMOUNTS, None),
    ("two answers, a phrase decides", "First (A), but the answer is (B).", AMOUNTS, 1),
    ("two answers after the phrase", "The answer is (A) or (B).", AMOUNTS, None),
    ("two bare answers", "The answer is A or B", AMOUNTS, None),
    ("either", "The answer is either (A) or less", AMOUNTS, None),
    ("two texts", "The answer is yes or no.", YES_NO, None),
    ("list of letters", "A, B and C", AMOUNTS, None),
    ("begins with one", "The answer is (B), since (A) is for cats.", AMOUNTS, 1),
    ("other denied", "The answer is more, not less.", AMOUNTS, 0),
    ("denied", "The answer is not (B).", AMOUNTS, None),
    ("denied, then named", "The answer is not (B) but (C).", AMOUNTS, 2),
    ("called wrong", "(A) is wrong.", AMOUNTS, None),
    ("neither", "neither A nor B", AMOUNTS, None),
    ("none of them", "(A) comes near. The answer is none of these.", AMOUNTS, None),
    ("yes", "Yes, it is.", YES_NO, 0),
    ("true is yes", "The answer is True.", YES_NO, 0),
    ("no is false", "no", ("True", "False"), 1),
    ("true beside yes", "true", ("yes", "true"), 1),
    ("no before a noun", "There is no reason.", YES_NO, None),
    ("no as number sign", "No. 5 is best", YES_NO, None),
    ("no doubt yes", "The answer is no doubt yes", YES_NO, 0),
    ("with a marker and more", "The answer is A) Yes, it is still so.", YES_NO, 0),
    ("no options", "yes", (), None),
    ("empty option", "(B)", ("", "x"), 1),
    ("empty", "", AMOUNTS, None),
]


@pytest.mark.parametrize(("text", "choices", "expected"), _cases(OPTIONS))
def test_options(text: str, choices: tuple[str, ...], expected: int | None) -> None:
    assert extract_option(text, choices) == expected


# --- Spans and comparison -----------------------------------------------------------------------

SPANS = [
    ("article and case", "The answer is the Eiffel Tower.", "eiffel tower"),
    ("unicode quotes", "“The Beatles”", "beatles"),
    ("apostrophe", "don’t", "dont"),
    ("first sentence", "The answer is Paris. It is big.", "paris"),
    ("initials", "J. R. R. Tolkien. He wrote.", "j r r tolkien"),
    ("saint", "The answer is St. Louis.", "st louis"),
    ("hyphen", "well-known", "wellknown"),
    ("decimal point", "3.5%", "3.5"),
    ("thousands", "1,000", "1000"),
    ("sign", "-3", "-3"),
    ("time", "at 7:30", "at 7:30"),
    ("only an article", "The answer is A", "a"),
    ("only symbols", "The answer is ] } ].", "] } ]"),
    ("spaces", "  a \t big   cat ", "big cat"),
    ("several lines without a phrase", "He runs.\nShe walks.", None),
    ("empty", " ", None),
]


@pytest.mark.parametrize(("text", "expected"), _cases(SPANS))
def test_spans(text: str, expected: str | None) -> None:
    assert extract_span(text) == expected


def _ask(target: str, choices: tuple[str, ...] = (), **metadata: Any) -> Example:
    label = choices.index(target) if choices else None
    return Example("?", target, choices=choices, label=label, metadata=metadata)


SAME = [
    ("number by value", "So the answer is $1,000.00.", _ask("1000"), True),
    ("number by value, wrong", "So the answer is 100.", _ask("1,000"), False),
    ("number unreadable", "I do not know", _ask("1000"), None),
    ("option by letter", "The answer is (B).", _ask("less", AMOUNTS), True),
    ("option by text", "The answer is less.", _ask("less", AMOUNTS), True),
    ("option wrong", "The answer is (A).", _ask("less", AMOUNTS), False),
    ("option ambiguous", "(A) or (B)", _ask("less", AMOUNTS), None),
    ("yes", "The answer is yes, it can.", _ask("yes"), True),
    ("false", "The answer is False, for it is not.", _ask("False"), True),
    ("no against yes", "No.", _ask("yes"), False),
    ("span", "The answer is “the Beatles”.", _ask("Beatles"), True),
    ("span wrong", "The answer is Queen.", _ask("Beatles"), False),
    ("other target", "The answer is 5.", _ask("4", other_targets=["5"]), True),
    (
        "target of two sentences",
        "The answer is I sing. You dance.",
        _ask("I sing. You dance."),
        True,
    ),
]


@pytest.mark.parametrize(("text", "asked", "expected"), _cases(SAME))
def test_comparison(text: str, asked: Example, expected: bool | None) -> None:
    assert same_answer(text, asked) is expected


# --- Properties ---------------------------------------------------------------------------------

_SMALL_WORDS = {0: "zero", 1: "one", 7: "seven", 13: "thirteen", 40: "forty", 85: "eighty-five"}


@st.composite
def _written_numbers(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number in one of the accepted forms, and its value."""
    whole = draw(st.integers(0, 10**9))
    below = draw(st.integers(2, 99))
    above = draw(st.integers(1, below - 1))
    cents = draw(st.integers(0, 99))
    small = draw(st.sampled_from(sorted(_SMALL_WORDS)))
    part, decimal = Fraction(above, below), whole + Fraction(cents, 100)
    forms = [
        (f"{whole}", Fraction(whole)),
        (f"{whole:,}", Fraction(whole)),
        (f"{whole:,}".replace(",", "\u202f"), Fraction(whole)),
        (f"{whole:,}".replace(",", "{,}"), Fraction(whole)),
        (f"{whole}.{cents:02}", decimal),
        (f"${whole:,}.{cents:02}", decimal),
        (f"-${whole:,}", Fraction(-whole)),
        (f"−{whole}", Fraction(-whole)),
        (f"{whole}€", Fraction(whole)),
        (f"{whole}%", Fraction(whole)),
        (f"{whole}kg", Fraction(whole)),
        (f"**{whole:,}**", Fraction(whole)),
        (f"$\\boxed{{{whole}}}$", Fraction(whole)),
        (f"{above}/{below}", part),
        (f"-{above}/{below}", -part),
        (f"{whole} {above}/{below}", whole + part),
        (f"\\frac{{{above}}}{{{below}}}", part),
        (f"{above}e{small % 9}", Fraction(above * 10 ** (small % 9))),
        (f"{above} × 10^{small % 9}", Fraction(above * 10 ** (small % 9))),
        (f"{above}.5 million", Fraction(above * 10**6 + 500_000)),
        (_SMALL_WORDS[small], Fraction(small)),
    ]
    return draw(st.sampled_from(forms))


@given(
    written=_written_numbers(),
    before=st.text(max_size=60),
    phrase=st.sampled_from(
        ["The answer is", "So the answer is:", "**Answer:**", "Final answer:\n"]
    ),
    after=st.sampled_from(["", ".", " apples.", ".\n\nQ: 5 + 6?", ".\n"]),
)
@example(written=("18", Fraction(18)), before="\\boxed{3", phrase="The answer is", after=".")
def test_every_accepted_form_is_read_exactly(
    written: tuple[str, Fraction], before: str, phrase: str, after: str
) -> None:
    text, value = written
    assert extract_number(f"{before}\n{phrase} {text}{after}") == value
    assert read_number(text) in (value, None)


@given(
    choices=st.lists(
        st.text("abcdefAB I.,'", min_size=1, max_size=12).map(str.strip).filter(bool),
        min_size=2,
        max_size=MAXIMUM_OPTIONS,
        unique=True,
    ),
    rationale=st.text(min_size=1, max_size=80).filter(str.strip),
    data=st.data(),
)
@pytest.mark.parametrize("renderer", ["direct", "chain_of_thought"])
def test_rendered_options_are_found(
    renderer: str, occasion: Occasion, choices: list[str], rationale: str, data: st.DataObject
) -> None:
    label = data.draw(st.integers(0, len(choices) - 1))
    asked = Example(
        "?", choices[label], choices=tuple(choices), label=label, rationales=(rationale,)
    )
    response = renderer_named(renderer)(asked, occasion).response
    assert extract_option(response, choices) == label
    assert same_answer(response, asked) is True


@pytest.mark.parametrize("index", range(MAXIMUM_OPTIONS))
@pytest.mark.parametrize("form", ["({})", "{}", "{})", "{}.", "option {}.", "[{}]", "Answer: {}"])
def test_every_letter_is_an_option(form: str, index: int) -> None:
    choices = [f"word{number}" for number in range(MAXIMUM_OPTIONS)]
    letter = string.ascii_uppercase[index]
    assert extract_option(form.format(letter), choices) == index
    assert extract_option(form.format(letter.lower()), choices) == index
    assert extract_option(form.format(letter), choices[:index]) is None


_SCRAPS = "The answer is |Answer:|\\boxed{|}|#### |(A)|B.|or|not|yes|1,0|=|3/0|½|\\frac{1}{2}|^|e9|$|-|.|\n|“|x"
_PIECES = st.sampled_from(_SCRAPS.split("|"))
_MESSY = st.text() | st.lists(_PIECES | st.text(max_size=3), max_size=25).map("".join)


@given(text=_MESSY, choices=st.lists(st.text(max_size=8), max_size=MAXIMUM_OPTIONS))
@example(text="²", choices=["²", "İ", "ß"])
def test_nothing_raises(text: str, choices: list[str]) -> None:
    number, option = extract_number(text), extract_option(text, choices)
    assert number is None or isinstance(number, Fraction)
    assert option is None or option in range(len(choices))
    for found in (final_answer(text), direct_answer(text), extract_span(text)):
        assert found is None or found.strip()
    if text.strip():
        assert same_answer(text, _ask(text.strip())) is not False


@pytest.mark.parametrize(
    "piece", ["a ", "1 ", "1,", "(", "B) ", "\n", "#### x ", "\\boxed{", "answer is ", "1 because "]
)
def test_long_texts_take_linear_time(piece: str) -> None:
    """A text of 50,000 characters; with a pattern that backtracks this would not end."""
    text = piece * (50_000 // len(piece))
    for written in (text, f"The answer is 1 {text}b"):
        for read in (final_answer, direct_answer, extract_number, extract_span):
            read(written)
        extract_option(written, ("a dog", "no", "B", "not x"))


def _official_squad_form(text: str) -> str:
    """The four steps of SQuAD's evaluation script, in its order."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@given(st.text(string.ascii_letters + string.punctuation + "   \t", max_size=40))
def test_spans_are_those_of_squad(text: str) -> None:
    # LaTeX has a meaning here; where SQuAD leaves nothing, the text itself stays.
    plain = text.replace("\\", "")
    official = _official_squad_form(plain.replace("{,}", ","))
    assert normalise_span(plain) == (official or " ".join(plain.lower().split()))


# --- Real text ----------------------------------------------------------------------------------


@pytest.fixture
def real_data_dir() -> Path:
    """The folder of real data that FLANMOE_DATA names; skipped by name where it is absent."""
    named = os.environ.get("FLANMOE_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("FLANMOE_DATA names no data folder")
    return Path(named)


def _real(name: str, split: str, data_dir: Path) -> Task:
    return load_task(TaskConfig(name=name, split=split), data_dir=data_dir)


def _chains(name: str, split: str, field: str, data_dir: Path) -> Iterator[tuple[str, Any]]:
    """(row id, chain) of every chain that a field of the rows holds."""
    for _, row in find_source(name, split=split, subset=None, data_dir=data_dir).rows():
        for chain in row.get(field) or ():
            yield str(row["id"]), chain


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "split", "num_rows"),
    [
        ("gsm8k", "train", 7473),
        ("flan_cot", "aqua_train", 2728),
        ("flan_cot", "creak_train", 6915),
        ("flan_cot", "ecqa_train", 7112),
        ("flan_cot", "qasc_train", 1084),
        ("flan_cot", "sensemaking_train", 6070),
        ("flan_cot", "strategyqa_train", 2061),
    ],
)
def test_real_rendered_chains_give_their_answer_back(
    real_data_dir: Path, name: str, split: str, num_rows: int, occasion: Occasion
) -> None:
    render = renderer_named("chain_of_thought")
    examples = _real(name, split, real_data_dir).examples
    found = Counter(
        same_answer(render(row, occasion).response, row) for row in examples if row.rationales
    )
    assert found == {True: num_rows}


@pytest.mark.slow
def test_real_reasoning_without_a_closing_sentence(real_data_dir: Path) -> None:
    """GSM8K's own solutions end in the answer, mostly; lm-eval's filter takes the last number."""
    examples = _real("gsm8k", "train", real_data_dir).examples
    found = Counter(same_answer(row.rationales[0], row) for row in examples)
    assert found == {True: 7373, False: 59, None: 41}
    flexible = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    theirs = [
        answers[0] for answers in flexible.apply([[row.rationales[0]] for row in examples], [])
    ]
    # What lm-eval's task leaves out of the comparison: commas, dollar signs, a final full stop.
    bare = [re.sub(r",|\$|\.$", "", answer) for answer in theirs]
    assert sum(answer == row.target for answer, row in zip(bare, examples, strict=True)) == 7092


@pytest.mark.slow
def test_real_model_solutions_agree_with_their_marks(real_data_dir: Path) -> None:
    """Chains that models wrote for GSM8K's test questions, each marked right or wrong."""
    task = _real("gsm8k", "test_model_solutions", real_data_dir)
    examples = {row.key: row for row in task.examples}
    found = Counter(
        (chain["is_correct"], same_answer(chain["rationale"], examples[key]))
        for key, chain in _chains("gsm8k", "test_model_solutions", "chains", real_data_dir)
    )
    assert found == {(True, True): 2001, (False, False): 3268, (False, None): 7}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("coin_flip_train", {True: 4437, None: 8}),
        ("quartz_train", {True: 3762, False: 11, None: 275}),
    ],
)
def test_real_free_chains_name_their_option(
    real_data_dir: Path, split: str, expected: dict[bool | None, int]
) -> None:
    """Chains that a model wrote in its own words, kept by their authors as leading to the answer."""
    examples = {row.key: row for row in _real("divergent_cot", split, real_data_dir).examples}
    found = Counter(
        same_answer(chain["rationale"], examples[key])
        for key, chain in _chains("divergent_cot", split, "correct_chains", real_data_dir)
    )
    assert found == expected


@pytest.mark.parametrize(
    ("text", "example", "extracted", "right"),
    [
        (
            "The answer is (B).",
            Example("?", "less", choices=("more", "less"), label=1),
            "(B)",
            True,
        ),
        ("It is more.", Example("?", "less", choices=("more", "less"), label=1), "(A)", False),
        ("So the answer is yes.", Example("?", "no"), "yes", False),
        ("The answer is $1,000.50.", Example("?", "1000.5"), "2001/2", True),
        ("The answer is ] ) ).", Example("?", "] ) )"), "] ) )", True),
        ("The answer is the Eiffel Tower.", Example("?", "Eiffel tower"), "eiffel tower", True),
        ("I cannot say.\nNo idea.", Example("?", "12"), None, None),
    ],
)
def test_what_was_read_is_kept_beside_the_verdict(
    text: str, example: Example, extracted: str | None, right: bool | None
) -> None:
    assert graded_answer(text, example) == (extracted, right)
    assert same_answer(text, example) is right
