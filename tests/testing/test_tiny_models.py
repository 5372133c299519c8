"""Tiny models repeat, leave the global generator alone, and hide no zeros;
the tokenizer fits them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.testing.tiny_models import (
    DENSE_NAMES,
    ENCODER_DECODER_NAMES,
    SPARSE_NAMES,
    tiny_model,
    tiny_text_tokenizer,
    tiny_tokenizer,
)

NAMES = DENSE_NAMES + SPARSE_NAMES + ENCODER_DECODER_NAMES

_ASCII = st.text(alphabet=[chr(code) for code in range(32, 127)] + ["\n", "\t"], max_size=60)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_all_weights_and_nothing_else(name: str) -> None:
    state = torch.get_rng_state()
    first, second, other = tiny_model(name), tiny_model(name), tiny_model(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key
        assert not torch.equal(tensor, other.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_varies(name: str) -> None:
    for key, parameter in tiny_model(name).named_parameters():
        assert parameter.std() > 0.01, key


def test_overrides_replace_the_tiny_values() -> None:
    assert tiny_model("llama", num_hidden_layers=4).config.num_hidden_layers == 4


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        KeyError, match=r"No tiny model is called `mixtrl`\. Did you mean `mixtral`\?"
    ):
        tiny_model("mixtrl")


@given(_ASCII)
def test_ascii_text_survives_the_tokenizer_one_token_a_character(text: str) -> None:
    tokenizer = tiny_tokenizer()
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text


def test_token_ids_agree_with_the_models() -> None:
    tokenizer = tiny_tokenizer()
    config = tiny_model("llama").config
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) <= config.vocab_size
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_the_chat_template_marks_turns() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    prompt = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    shown = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert shown == prompt
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + "4<|im_end|>\n"
    assert tokenizer(prompt)["input_ids"][0] == tokenizer.bos_token_id


@given(_ASCII)
def test_the_text_tokenizer_ends_every_text_and_adds_nothing_else(text: str) -> None:
    tokenizer = tiny_text_tokenizer()
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text) + 1
    assert token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == token_ids[:-1]


@pytest.mark.parametrize("name", ENCODER_DECODER_NAMES)
def test_token_ids_of_the_text_tokenizer_agree_with_the_encoder_decoders(name: str) -> None:
    tokenizer, config = tiny_text_tokenizer(), tiny_model(name).config
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)
    assert (tokenizer.bos_token, tokenizer.chat_template) == (None, None)
    assert len(tokenizer) <= config.vocab_size
