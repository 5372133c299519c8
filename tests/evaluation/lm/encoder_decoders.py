"""What the tests of encoder-decoders share: tiny models, requests, and what they are compared with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from flanmoe.evaluation.lm import quiet_lm_eval
from flanmoe.testing.tiny_models import tiny_model, tiny_text_tokenizer

# The two longest contexts are close enough in length to be encoded together.
PAIRS = [
    (f"Why {'so ' * number}{number}? It is", answer)
    for number in (3, 11, 0, 7, 12)
    for answer in ("A", "B", " because.", "yes</s>", "(A)", "(B)", "A")
]
CONTEXTS = list(dict.fromkeys(context for context, _ in PAIRS))


def model_named(name: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model with a head of its own, which writes one character a token.

    Tied to the embeddings, it would write its start token again and again.
    """
    model = tiny_model(name, **overrides)
    head: Any = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(head.weight.shape, generator=generator)
    weight[:3] = weight[len(tiny_text_tokenizer()) :] = 0
    head.weight = torch.nn.Parameter(weight)
    # HFLM ties weights once more where the configuration asks for it.
    model.config.tie_word_embeddings = False
    return model


def to_score(pairs: Sequence[tuple[str, str]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, 0, ("task", number, 1))
        for number, pair in enumerate(pairs)
    ]


def to_write(contexts: Sequence[str], **options: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, dict(options)), 0, ("task", number, 1))
        for number, context in enumerate(contexts)
    ]


def harness(model: PreTrainedModel, batch_size: int = 4, tokenizer: Any = None) -> Any:
    """lm-eval's own language model."""
    with quiet_lm_eval():
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer or tiny_text_tokenizer(),
            backend="seq2seq",
            batch_size=batch_size,
        )


def likelihood(model: PreTrainedModel, context: str, answer: str) -> tuple[float, bool]:
    """The definition, one text at a time: sum of log p(token | context, tokens before), in float64."""
    tokenizer = tiny_text_tokenizer()
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([tokenizer(context)["input_ids"]]),
            decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]]),
            use_cache=False,
        ).logits[0]
    terms = logits.double().log_softmax(-1)
    total = sum(float(terms[place, token]) for place, token in enumerate(tokens))
    return total, logits.argmax(-1).tolist() == tokens


def generated(model: PreTrainedModel, context: str, most: int) -> str:
    """What transformers writes greedily."""
    tokenizer = tiny_text_tokenizer()
    tokens = model.generate(
        torch.tensor([tokenizer(context)["input_ids"]]),
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@contextmanager
def tokens_read(module: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Record the shape of every batch of tokens that goes into an encoder or a decoder."""
    shapes: list[tuple[int, int]] = []
    handle = module.register_forward_pre_hook(
        lambda _, __, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()
