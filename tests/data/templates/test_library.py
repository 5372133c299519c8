"""Every wording of ours, filled with generated texts."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.data.example import Example
from flanmoe.data.templates.flan import read_flan
from flanmoe.data.templates.folder import families, load_family
from flanmoe.data.templates.template import Template
from flanmoe.evaluation.answers import final_answer, same_answer

ROOT = Path(__file__).parents[3]
FAMILIES = families()

# Fields, and the fewest wordings of each form: question, chain of thought, inversion.
PROMISED = {
    "entailment": ({"premise", "hypothesis"}, 10, 6, 2),
    "sentiment": ({"text"}, 10, 0, 2),
    "paraphrase": ({"sentence1", "sentence2"}, 10, 0, 2),
    "closed_book_qa": ({"question"}, 10, 6, 2),
    "reading_comprehension": ({"context", "question"}, 10, 6, 2),
    "commonsense": (set[str](), 10, 6, 2),
    "coreference": ({"text"}, 10, 0, 2),
    "summarisation": ({"text"}, 10, 0, 2),
    "rewriting": ({"text"}, 10, 0, 2),
    "structure_to_text": ({"data"}, 10, 0, 2),
    "mathematics": ({"question"}, 10, 6, 2),
    "intent": ({"text"}, 10, 0, 2),
    "dialogue": ({"context"}, 10, 0, 2),
}

every_family = pytest.mark.parametrize("family", FAMILIES)
# What a text may hold: signs of jinja2, of Python and of markdown, line ends, quotes.
TEXTS = st.text(st.sampled_from("ab1 {}%#-|\\\"'\n\r*_.,:~é"), max_size=30)


def fields_of(family: str) -> frozenset[str]:
    """What the wordings of a family are about: its fields, or the inputs where it has none."""
    needs = frozenset[str]().union(*(template.needs for template in load_family(family)))
    return needs or frozenset({"inputs"})


GIVEN = ("inputs", "answer", "target", "rationale", "options", "task")


def records() -> st.SearchStrategy[dict[str, str]]:
    """Values with a name at either end, so that none can stand in another."""
    names = dict.fromkeys([*GIVEN, *(name for family in FAMILIES for name in fields_of(family))])
    return st.fixed_dictionaries({name: TEXTS.map(wrapped(name)) for name in names})


def wrapped(name: str) -> Callable[[str], str]:
    return lambda text: f"<{name}{text}{name}>"


PLAIN = {name: f"<{name}>" for name in GIVEN}


def plain(family: str, *, options: str = "<options>") -> dict[str, str]:
    return {**PLAIN, **{name: f"<{name}>" for name in fields_of(family)}, "options": options}


def asking(family: str) -> Iterator[Template]:
    return (template for template in load_family(family) if template.form != "inversion")


@pytest.mark.parametrize("family", PROMISED)
def test_families_hold_what_is_promised(family: str) -> None:
    fields, *fewest = PROMISED[family]
    templates = load_family(family)
    forms = Counter(template.form for template in templates)
    counts = [forms["question"], forms["chain_of_thought"], forms["inversion"]]
    assert all(count >= least for count, least in zip(counts, fewest, strict=True))
    assert set[str]().union(*(template.needs for template in templates)) == fields
    assert {template.version for template in templates} == {1}
    assert {template.family for template in templates} == {family}
    assert load_family(f"{family}.v1") == templates


@every_family
@given(values=records())
def test_a_prompt_shows_every_field_and_the_options_once_and_never_the_answer(
    family: str, values: dict[str, str]
) -> None:
    for template in asking(family):
        shown = template.fill(values)
        hidden = template.fill({**values, "options": ""})
        for name in fields_of(family):
            assert (template.name, shown.user.count(values[name])) == (template.name, 1)
            assert (template.name, hidden.user.count(values[name])) == (template.name, 1)
        assert (template.name, shown.user.count(values["options"])) == (template.name, 1)
        for name in ("answer", "target", "rationale"):
            assert f"<{name}" not in shown.user + hidden.user, template.name
        assert shown.response == hidden.response
        if template.form == "question":
            assert shown.response == values["answer"]


@every_family
@given(values=records())
def test_an_inversion_gives_the_answer_and_asks_for_a_field(
    family: str, values: dict[str, str]
) -> None:
    for template in load_family(family):
        if template.form != "inversion":
            continue
        filled = template.fill({**values, "options": ""})
        asked = [name for name in fields_of(family) if values[name] in filled.response]
        assert asked, template.name
        assert filled.user.count(values["target"]) == 1, template.name
        assert not any(f"<{name}" in filled.user for name in asked), template.name
        # Nor anything else that a record may lack, or that names an option by its letter.
        assert "<answer" not in filled.user + filled.response, template.name
        assert "<rationale" not in filled.user + filled.response, template.name


@every_family
def test_wordings_differ(family: str) -> None:
    for options in ("<options>", ""):
        filled = [template.fill(plain(family, options=options)) for template in load_family(family)]
        texts = [re.sub(r"[\W_]+", " ", exchange.user).casefold() for exchange in filled]
        assert [text for text, count in Counter(texts).items() if count > 1] == []


@every_family
def test_prompts_read_well_without_options(family: str) -> None:
    for template in asking(family):
        prompt = template.fill(plain(family, options="")).user
        assert "\n\n\n" not in prompt, template.name
        assert not re.search(
            r"\b(options?|choices?|(which|one) of (these|them))\b", prompt, re.I
        ), prompt


@every_family
def test_prompts_read_well_with_options(family: str) -> None:
    for template in asking(family):
        prompt = template.fill(plain(family)).user
        assert "\n\n\n" not in prompt, template.name
        # A block of lines has its own lines.
        assert re.search(r"^(### )?<options>$", prompt, re.M), template.name


CHOICES = ("leave out the keys", "a door, or two", "no")
CHOICE = [
    Example(inputs="?", target=CHOICES[label], choices=CHOICES, label=label) for label in range(3)
]
NUMBERS = [Example(inputs="?", target=text) for text in ("18", "-3.5", "1,000", "3/4", "0")]
WORDS = [
    Example(inputs="?", target=text)
    for text in ("yes", "False", "Mount Elbrus", "It rained.", "Who?")
]
WRONG_START = (
    "One might think that the answer is 7 or (C).\nAnswer: no. But look again: 4 of them are left."
)

reasoned = pytest.mark.parametrize(
    "template",
    [
        pytest.param(template, id=f"{family}-{template.name}")
        for family in FAMILIES
        for template in load_family(family)
        if template.form == "chain_of_thought"
    ],
)


def response(template: Template, answer: str, rationale: str = WRONG_START) -> str:
    values = plain(template.family)
    return template.fill({**values, "answer": answer, "rationale": rationale}).response


@reasoned
def test_the_answer_can_be_read_out_of_the_reasoning(template: Template) -> None:
    for example in [*NUMBERS, *WORDS]:
        text = response(template, example.target)
        assert final_answer(text) in (example.target, example.target.removesuffix("."))
        assert same_answer(text, example) is True, text
        other = Example(inputs="?", target="19" if example in NUMBERS else "Mount Ararat")
        assert same_answer(text, other) is not True, text


@reasoned
def test_the_option_can_be_read_out_of_the_reasoning(template: Template) -> None:
    for label, example in enumerate(CHOICE):
        letter = "ABC"[label]
        named = (f"({letter})", letter, f"({letter}) {example.target}", example.target)
        for answer in named:
            text = response(template, answer)
            right = [same_answer(text, one) is True for one in CHOICE]
            assert right == [one is example for one in CHOICE], text


@reasoned
@given(rationale=TEXTS, answer=TEXTS)
def test_reasoning_comes_first_and_verbatim(
    template: Template, rationale: str, answer: str
) -> None:
    rationale, answer = f"<{rationale}>", f"<{answer}>"
    text = response(template, answer, rationale)
    assert text.startswith(rationale)
    assert text.removesuffix(".").endswith(answer)


@every_family
def test_closing_sentences_differ(family: str) -> None:
    closings = [
        response(template, "<answer>", "")
        for template in load_family(family)
        if template.form == "chain_of_thought"
    ]
    assert len(set(closings)) == len(closings)


@reasoned
def test_a_closing_sentence_has_one_full_stop(template: Template) -> None:
    for answer in ("yes", "It rained.", "Who?", "Go!"):
        assert not re.search(r"[.?!]\.$", response(template, answer))


def test_the_guide_counts_what_is_there() -> None:
    guide = (ROOT / "docs" / "guide" / "templates.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (\d+) \| (\d+) \| (\d+) \|$", guide, flags=re.M)
    counted = []
    for family in FAMILIES:
        forms = Counter(template.form for template in load_family(family))
        fields = ", ".join(f"`{name}`" for name in sorted(fields_of(family)))
        numbers = [str(forms[form]) for form in ("question", "chain_of_thought", "inversion")]
        counted.append((family, fields, *numbers))
    assert sorted(rows) == sorted(counted)


def test_no_wording_is_one_of_flans(real_data_dir: Path) -> None:
    file = real_data_dir / "flan_templates" / "templates.jsonl.gz"
    if not file.is_file():
        pytest.skip("the data folder holds no flan_templates")

    def words(template: Template) -> str:
        bare = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", " _ ", template.prompt)
        return " ".join(re.findall(r"\w+", bare)).casefold()

    flans = {words(template) for found in read_flan(file).templates.values() for template in found}
    ours = [template for family in PROMISED for template in load_family(family)]
    assert [template.name for template in ours if words(template) in flans] == []
