"""Chat templates: where the prompt ends, and that the model's turn is whole."""

from dataclasses import replace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from flanmoe.core.errors import DataError
from flanmoe.data.chat import chat_prompt, render_chat
from flanmoe.data.example import Example, Rendered
from flanmoe.data.packing import tokenize
from flanmoe.data.renderers import renderer_named
from flanmoe.testing.tiny_models import tiny_tokenizer

EXAMPLE = Example(inputs="2 + 2?", target="4", key="sums-1")
LATER = replace(
    EXAMPLE,
    history=(("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2")),
)


def render(tokenizer: Any, example: Example = EXAMPLE) -> Rendered:
    return render_chat(example, renderer_named("instruction"), tokenizer, "sums")


def templated(template: str | None, **tokens: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_prompt_and_response_of_a_chat_template(tokenizer: Any) -> None:
    rendered = render(tokenizer)
    assert rendered == Rendered(
        prompt="<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        response="4<|im_end|>",
        task="sums",
        key="sums-1",
        content_hash=EXAMPLE.content_hash(),
    )


def test_the_loss_covers_the_response_and_the_end_of_the_turn(tokenizer: Any) -> None:
    example = tokenize(render(tokenizer), tokenizer)
    learnt = tokenizer.convert_ids_to_tokens(example.input_ids[example.loss_mask])
    assert learnt == ["4", "<|im_end|>"]


def test_without_a_template_the_plain_form_is_used() -> None:
    rendered = render(templated(None))
    assert (rendered.prompt, rendered.response) == ("2 + 2?\n", "4<|im_end|>")


def test_the_plain_form_begins_as_the_tokenizer_begins_texts() -> None:
    tokenizer = templated(None)
    from_text = tokenizer.backend_tokenizer
    from_text.post_processor = _beginning_with("<|im_start|>", tokenizer.bos_token_id)
    assert render(tokenizer).prompt == "<|im_start|>2 + 2?\n"


def _beginning_with(token: str, token_id: int) -> Any:
    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])


def test_a_template_that_leaves_the_end_open_gets_the_end_of_text() -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    rendered = render(templated(template))
    assert (rendered.prompt, rendered.response) == ("[user] 2 + 2?\n[assistant] ", "4<|im_end|>")


def test_what_a_template_writes_into_the_turn_belongs_to_the_response() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
        "<think></think>{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert render(templated(template)).response == "<think></think>4<|im_end|>"


def test_a_template_that_mixes_turns_is_refused() -> None:
    template = "{{ messages | length }} turns{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError) as caught:
        render(templated(template))
    assert str(caught.value) == (
        "The chat template of the tokenizer does not keep the model's turn apart from the prompt, so "
        "the loss cannot be placed on it. Use a tokenizer whose template writes a conversation turn "
        "by turn."
    )


def test_a_template_that_writes_the_date_writes_the_same_one_tomorrow() -> None:
    template = "{{ date_string }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    assert render(templated(template)).prompt == "26 Jul 20242 + 2?<|im_end|>"


def test_a_tokenizer_that_cannot_end_a_text_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        render(templated(None, eos_token=None))
    assert str(caught.value) == (
        "A tokenizer needs an end-of-text token (`eos_token`), but this one has none, so a model "
        "could not learn to stop. Set it in the tokenizer's configuration."
    )


def test_an_answer_of_several_lines_is_kept_whole(tokenizer: Any) -> None:
    example = Example(inputs="Write.", target="one\n\ntwo\n")
    assert render(tokenizer, example).response == "one\n\ntwo<|im_end|>"


def test_earlier_turns_stand_in_the_prompt_system_first(tokenizer: Any) -> None:
    rendered = render(tokenizer, LATER)
    assert rendered.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert rendered.response == "4<|im_end|>"
    assert rendered.content_hash == LATER.content_hash()


def test_only_the_last_turn_of_the_model_is_learnt(tokenizer: Any) -> None:
    example = tokenize(render(tokenizer, LATER), tokenizer)
    learnt = tokenizer.convert_ids_to_tokens(example.input_ids[example.loss_mask])
    assert learnt == ["4", "<|im_end|>"]


def test_the_renderer_words_the_last_question_only(tokenizer: Any) -> None:
    rendered = render_chat(LATER, renderer_named("direct"), tokenizer, "sums")
    assert rendered.prompt.count("Reply with the answer only.") == 1
    assert "2 + 2?\n\nReply with the answer only.<|im_end|>" in rendered.prompt


def test_without_a_template_the_turns_stand_line_by_line() -> None:
    rendered = render(templated(None), LATER)
    assert rendered.prompt == "Be brief.\n1 + 1?\n2\n2 + 2?\n"
    assert rendered.response == "4<|im_end|>"


def test_turns_that_a_template_refuses_are_named() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turn.') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    assert render(templated(template)).prompt == "2 + 2?<|im_end|>"
    with pytest.raises(DataError) as caught:
        render(templated(template), LATER)
    assert str(caught.value) == (
        "The chat template of the tokenizer must take the turns of example `sums-1` of task `sums` "
        "(`system`, `user`, `assistant`, `user`), but refuses them: No system turn. Take such turns "
        "out of the records, or use a tokenizer whose template takes them."
    )


def test_a_text_as_one_turn_of_the_user(tokenizer: Any) -> None:
    assert chat_prompt("Q: 1?\nA:", tokenizer, task="sums") == (
        "<|im_start|>user\nQ: 1?\nA:<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_template_the_model_goes_on_with_the_text() -> None:
    assert chat_prompt("Q: 1?\nA:", templated(None), task="sums") == "Q: 1?\nA:"
    beginning = templated(None, bos_token="<|im_start|>")
    from_text = beginning.backend_tokenizer
    from_text.post_processor = _beginning_with("<|im_start|>", beginning.bos_token_id)
    assert chat_prompt("Q:", beginning, task="sums") == "<|im_start|>Q:"


def test_a_template_that_refuses_a_single_turn_is_named() -> None:
    refusing = templated("{{ raise_exception('a system turn must come first') }}")
    with pytest.raises(DataError, match="but refuses that of task `sums`: a system turn must"):
        chat_prompt("Q:", refusing, task="sums")
