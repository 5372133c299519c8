"""Talking to a model in the terminal."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from flanmoe.core.console import console, say
from flanmoe.models.loading import load_model, load_tokenizer

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that answers a conversation.

    Attributes:
        model, tokenizer: who speaks.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token every time.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    temperature: float

    def answer(self, messages: Sequence[Message], *, streamed: bool) -> tuple[str, int]:
        """Return the answer and its number of tokens; print it as it comes when `streamed`."""
        prompt = _prompt_text(self.tokenizer, messages)
        apart = bool(self.model.config.is_encoder_decoder)
        # Chat templates write their special tokens themselves; an encoder's text has no template.
        encoded = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=apart)
        streamer = TextStreamer(self.tokenizer, skip_prompt=not apart, skip_special_tokens=True)
        sampling: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            sampling["temperature"] = self.temperature
        with torch.no_grad():
            tokens = self.model.generate(
                **encoded,
                max_new_tokens=self.max_new_tokens,
                streamer=streamer if streamed else None,
                **sampling,
            )
        # A decoder returns the prompt with the answer, an encoder-decoder the token that starts it.
        new = tokens[0, 1 if apart else encoded["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip(), len(new)


def converse(
    reference: str, *, prompt: str | None, max_new_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """Answer one prompt, or hold a conversation until an empty line; returns what was said."""
    torch.manual_seed(seed)
    model = load_model(reference)
    model.eval()
    speaker = Speaker(model, load_tokenizer(reference), max_new_tokens, temperature)
    start = time.monotonic()
    turns: list[Message] = []
    num_tokens = 0
    for text in [prompt] if prompt is not None else _typed_lines():
        turns.append({"role": "user", "content": text})
        answer, length = speaker.answer(turns, streamed=True)
        turns.append({"role": "assistant", "content": answer})
        num_tokens += length
    return {"turns": turns, "new_tokens": num_tokens, "seconds": time.monotonic() - start}


def _typed_lines() -> "list[str] | Any":
    say("Write a message; an empty line or Ctrl-D ends the conversation.")
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not text:
            return
        yield text


def _prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages) + "\n"
    return str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    )
