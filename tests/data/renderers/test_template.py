"""Samples of templates: a function of the sample's seeds, at the shares asked for, exemplars included."""

from collections import Counter
from typing import Any

import pytest

from flanmoe.core.errors import DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example
from flanmoe.data.renderers.base import Exchange, Occasion
from flanmoe.data.renderers.template import NoExemplarError, TemplateConfig, TemplateRenderer

SHARE_ERROR = 0.06
NUMBER = 600

QUESTIONS = [
    Example(
        inputs=f"Is {number} even?",
        target="yes" if number % 2 == 0 else "no",
        choices=("yes", "no"),
        label=number % 2,
        rationales=(f"{number} leaves {number % 2} when halved.",),
        key=f"even-{number}",
        fields={"question": f"Is {number} even?"},
    )
    for number in range(30)
]


def occasion(seed: int) -> Occasion:
    """Seeds of one sample; a character is a token."""
    return Occasion(seeds=SeedTree(seed), count_tokens=len)


def renderer(pool: list[Example] = QUESTIONS, **settings: Any) -> TemplateRenderer:
    config = TemplateConfig.parse({"family": "mathematics", **settings})
    return TemplateRenderer(config, "parity", pool)


def samples(render: TemplateRenderer, example: Example = QUESTIONS[3]) -> list[Exchange]:
    return [render(example, occasion(seed)) for seed in range(NUMBER)]


def test_a_sample_is_a_function_of_its_seeds() -> None:
    settings = {
        "few_shot_share": 0.5,
        "options_share": 0.5,
        "option_style": "random",
        "chain_of_thought_share": 0.5,
        "inversion_share": 0.3,
    }
    once, again = samples(renderer(**settings)), samples(renderer(**settings))
    assert once == again
    assert len({sample.user for sample in once}) > NUMBER / 3


def test_wordings_are_drawn_evenly() -> None:
    render = renderer(options_share=0.0)
    forms = [one for one in render._templates if one.form == "question"]
    counts = Counter(sample.user for sample in samples(render))
    assert len(counts) == len(forms) >= 10
    assert min(counts.values()) > NUMBER / len(forms) / 2
    assert {sample.response for sample in samples(render)} == {"no"}


def test_options_are_shown_at_their_share_and_the_answer_follows_them() -> None:
    found = samples(renderer(options_share=0.4))
    shown = [sample for sample in found if "(A) yes" in sample.user]
    assert len(shown) / NUMBER == pytest.approx(0.4, abs=SHARE_ERROR)
    assert {sample.response for sample in shown} == {"(B)"}
    assert {sample.response for sample in found if sample not in shown} == {"no"}


def test_reasoning_is_shown_at_its_share_and_only_where_there_is_some() -> None:
    render = renderer(chain_of_thought_share=0.3)
    reasoned = [one for one in samples(render) if "leaves 1 when halved" in one.response]
    assert len(reasoned) / NUMBER == pytest.approx(0.3, abs=SHARE_ERROR)
    bare = Example(inputs="Is 5 odd?", target="yes", fields={"question": "Is 5 odd?"})
    assert all(one.response == "yes" for one in samples(render, bare))


def test_inversions_give_the_answer_and_ask_for_the_question() -> None:
    render = renderer(inversion_share=0.25, option_style="random")
    inverted = [one for one in samples(render) if "Is 3 even?" in one.response]
    assert len(inverted) / NUMBER == pytest.approx(0.25, abs=SHARE_ERROR)
    assert all("no" in one.user and "Is 3 even?" not in one.user for one in inverted)


def test_exemplars_come_from_the_pool_without_the_question_itself() -> None:
    render = renderer(few_shot_share=1.0, max_exemplars=3, prompt_tokens=2000, options_share=0.0)
    counts: Counter[int] = Counter()
    for sample in samples(render):
        shown = [one for one in QUESTIONS if one.inputs in sample.user]
        assert QUESTIONS[3] in shown
        assert sample.user.count(QUESTIONS[3].inputs) == 1
        assert sample.user.index(QUESTIONS[3].inputs) > max(
            sample.user.index(one.inputs) for one in shown if one is not QUESTIONS[3]
        )
        counts[len(shown) - 1] += 1
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > NUMBER / 5


def test_exemplars_share_the_style_of_their_sample() -> None:
    render = renderer(few_shot_share=1.0, option_style="letters", options_share=0.5)
    for sample in samples(render):
        shown = sum(one.inputs in sample.user for one in QUESTIONS)
        assert sample.user.count("(A) yes") in (0, shown)


def test_few_shot_samples_are_drawn_at_their_share() -> None:
    found = samples(renderer(few_shot_share=0.5, options_share=0.0))
    few = sum(sum(one.inputs in sample.user for one in QUESTIONS) > 1 for sample in found)
    assert few / NUMBER == pytest.approx(0.5, abs=SHARE_ERROR)


def test_no_exemplar_that_fits_is_said_and_never_passed_over() -> None:
    render = renderer(few_shot_share=1.0, prompt_tokens=40)
    with pytest.raises(NoExemplarError) as caught:
        render(QUESTIONS[3], occasion(0))
    assert str(caught.value) == (
        "Example `even-3` of task `parity` must be shown after at least 1 exemplar, but none of 25 fits "
        "within 40 tokens with it. Raise `template.prompt_tokens`, or lower `template.few_shot_share`."
    )


def test_a_pool_of_the_question_alone_has_no_exemplar() -> None:
    with pytest.raises(NoExemplarError, match="none of 0 fits"):
        renderer(QUESTIONS[3:4], few_shot_share=1.0)(QUESTIONS[3], occasion(0))


def test_a_missing_field_is_named() -> None:
    bare = Example(inputs="Is 5 odd?", target="yes", fields={"text": "Is 5 odd?"}, key="odd")
    with pytest.raises(DataError, match="needs `question`, but the example has only `text`"):
        renderer()(bare, occasion(0))
    assert "Is 5 odd?" in renderer(fields={"question": "text"})(bare, occasion(0)).user


def test_a_share_of_a_form_that_the_family_lacks_is_refused() -> None:
    config = TemplateConfig(family="prompted", inversion_share=0.1)
    with pytest.raises(DataError) as caught:
        TemplateRenderer(config, "parity", QUESTIONS)
    assert str(caught.value) == (
        "The family `prompted` has no template of the form `inversion`, which task `parity` asks for. Set "
        "its share to 0, or choose another family."
    )


def test_a_template_can_name_the_task_without_its_split() -> None:
    config = TemplateConfig(family="task_identifier", options_share=0.0)
    render = TemplateRenderer(config, "odd_or_even[x]:test@task_identifier", QUESTIONS)
    assert render(QUESTIONS[3], occasion(0)).user == "(odd or even) Is 3 even?"


def test_a_field_can_be_what_every_rendering_gives() -> None:
    config = TemplateConfig(family="dialogue", fields={"context": "inputs"}, options_share=0.0)
    talk = Example(inputs="Hello.", target="Hi.")
    shown = TemplateRenderer(config, "talk", [talk])(talk, occasion(0))
    assert "Hello." in shown.user
    assert shown.response == "Hi."
