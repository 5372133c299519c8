"""An encoder-decoder gets the words that a decoder gets, without the turns."""

from typing import Any

from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Example
from flanmoe.data.renderers.instruction import render_instruction
from flanmoe.data.renderers.template import TemplateConfig, TemplateRenderer
from flanmoe.data.text_to_text import render_text_to_text

SUM = Example(
    inputs="1 + 1?", target="2", key="sum", fields={"question": "1 + 1?"}, rationales=("Count.",)
)


def test_the_same_words_as_a_chat_without_its_marks(tokenizer: Any) -> None:
    config = TemplateConfig(family="mathematics", chain_of_thought_share=0.5)
    renderer = TemplateRenderer(config, "sums", [SUM])
    prompts = set()
    for seed in range(40):
        seeds = SeedTree(seed)
        pair = render_text_to_text(SUM, renderer, "sums", count_tokens=len, seeds=seeds)
        chat = render_chat(SUM, renderer, tokenizer, "sums", seeds=seeds)
        assert pair.prompt in chat.prompt
        assert chat.response.startswith(pair.response)
        assert (pair.task, pair.key, pair.content_hash) == ("sums", "sum", SUM.content_hash())
        prompts.add(pair.prompt)
    assert len(prompts) > 10


def test_earlier_turns_stand_before_the_question() -> None:
    history = (("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."))
    talk = Example(inputs="1 + 1?", target="2", history=history)
    pair = render_text_to_text(talk, render_instruction, "talk", count_tokens=len)
    assert (pair.prompt, pair.response) == ("Be brief.\nHi.\nHello.\n1 + 1?", "2")


def test_without_seeds_the_words_are_fixed() -> None:
    renderer = TemplateRenderer(TemplateConfig(family="mathematics"), "sums", [SUM])
    once, again = (render_text_to_text(SUM, renderer, "sums", count_tokens=len) for _ in range(2))
    assert once == again
