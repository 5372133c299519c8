"""Talking to a model: what is returned is its answer, whole, whatever its architecture."""

import pytest
import torch

from flanmoe.stages.chat import Speaker
from flanmoe.testing.tiny_models import tiny_model, tiny_text_tokenizer, tiny_tokenizer


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_decoders_answer_is_what_follows_the_prompt(name: str) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    read = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        whole = model.generate(input_ids=read, max_new_tokens=12, do_sample=False)[0]
    expected = tokenizer.decode(whole[read.shape[1] :], skip_special_tokens=True).strip()
    speaker = Speaker(model, tokenizer, max_new_tokens=12, temperature=0)
    answer, length = speaker.answer([{"role": "user", "content": "Why?"}], streamed=False)
    assert (answer, length) == (expected, len(whole) - read.shape[1])


def test_an_encoder_decoders_answer_keeps_its_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_model("bart"), tiny_text_tokenizer()
    read = tokenizer("Why is that so?\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = model.generate(input_ids=read, max_new_tokens=12, do_sample=False)[0]
    expected = tokenizer.decode(whole, skip_special_tokens=True).strip()
    assert expected
    speaker = Speaker(model, tokenizer, max_new_tokens=12, temperature=0)
    question = [{"role": "user", "content": "Why is that so?"}]
    assert speaker.answer(question, streamed=True) == (expected, len(whole) - 1)
    assert capsys.readouterr().out.strip() == expected
