"""Greedy answers against the definition: one text at a time, read whole for every token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from flanmoe.core.errors import DataError, ModelError, UserError
from flanmoe.evaluation.lm import DecoderLM, build_lm, generation, quiet_lm_eval
from flanmoe.evaluation.lm.requests import Generation
from flanmoe.evaluation.lm.stopping import Answers
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

from .test_sharing import NAMES, model_named

SHOTS = "".join(f"Q: {number} plus {number}? A: {2 * number}. " for number in range(6))
CONTEXTS = [f"{SHOTS}Q: {'so ' * (number % 5)}{number}? A: " for number in range(9)]


def requests(contexts: list[str], **options: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, dict(options)), 0, ("task", number, 1))
        for number, context in enumerate(contexts)
    ]


def defined(model: PreTrainedModel, context: str, stops: tuple[str, ...], most: int) -> str:
    """Take the likeliest token, read everything again, until a stop, the end, or the limit."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(context, add_special_tokens=False)["input_ids"]
    written: list[int] = []
    while len(written) < most:
        with torch.no_grad():
            chosen = int(model(torch.tensor([tokens + written])).logits[0, -1].argmax())
        if chosen == tokenizer.eos_token_id:
            break
        written.append(chosen)
        text = tokenizer.decode(written, skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return text[: min(text.find(stop) for stop in stops if stop in text)]
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
def test_equals_writing_one_text_at_a_time(name: str) -> None:
    model = model_named(name)
    if name == "olmoe":
        with torch.no_grad():  # its random weights would write nothing but special tokens
            model.get_output_embeddings().weight[:4] = 0
    expected = [defined(model, context, (), 20) for context in CONTEXTS]
    # The random weights of one of them end most answers early.
    assert len(set(expected)) > (1 if name == "olmoe" else 3)
    for batch_size in (None, 1, 4):
        lm = build_lm(model, tiny_tokenizer(), batch_size=batch_size)
        assert lm.generate_until(requests(CONTEXTS, until=[], max_gen_toks=20)) == expected


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma2"])
def test_rows_behind_different_prefixes_are_written_together(name: str) -> None:
    model = model_named(name)
    subjects = ["law", "mathematics and logic", "us history", "art"]
    contexts = [
        f"Questions about {subject}. {SHOTS}Q: {number}? A: "
        for subject in subjects
        for number in range(3)
    ]
    contexts.append("A context by itself. A: ")
    expected = [defined(model, context, (), 8) for context in contexts]
    lm = build_lm(model, tiny_tokenizer())
    passes: list[torch.Size] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, options: passes.append(options["input_ids"].shape), with_kwargs=True
    )
    assert lm.generate_until(requests(contexts, max_gen_toks=8)) == expected
    handle.remove()
    steps = [shape for shape in passes if shape[1] == 1]
    assert steps[0][0] == len(contexts)
    # The last token of each answer is not read.
    assert len(steps) == 7
    assert lm.work.shared_tokens > 8 * len(SHOTS)


def test_prefixes_of_one_batch_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    contexts = [f"{n % 3} {SHOTS} Q: {n}? A: " for n in range(9)]
    expected = build_lm(model, tiny_tokenizer()).generate_until(requests(contexts, max_gen_toks=4))
    monkeypatch.setattr(generation, "_MOST_PREFIX_TOKENS", len(SHOTS) + 10)
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, options: rows.append(options["input_ids"].shape[0]), with_kwargs=True
    )
    lm = build_lm(model, tiny_tokenizer())
    assert lm.generate_until(requests(contexts, max_gen_toks=4)) == expected
    handle.remove()
    assert max(rows) == 3


def test_stops_end_an_answer_and_are_not_part_of_it() -> None:
    model = tiny_model("mixtral")
    whole = [defined(model, context, (), 24) for context in CONTEXTS]
    longest = max(whole, key=len)
    stops = (whole[0][7:11], longest[-4:-1])
    expected = [defined(model, context, stops, 24) for context in CONTEXTS]
    assert expected[0] == whole[0][:7]
    assert len({len(text) for text in expected}) > 2
    lm = build_lm(model, tiny_tokenizer())
    found = lm.generate_until(requests(CONTEXTS, until=list(stops), max_gen_toks=24))
    assert found == expected


def test_agrees_with_lm_evals_own_model() -> None:
    model = tiny_model("mixtral")
    with quiet_lm_eval():
        theirs = HFLM(
            pretrained=model,
            tokenizer=tiny_tokenizer(),
            backend="causal",
            batch_size=4,
            add_bos_token=False,
        )
    asked = requests(CONTEXTS, until=["e", "<|im_end|>"], max_gen_toks=16, do_sample=False)
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert build_lm(model, tiny_tokenizer()).generate_until(asked) == expected


def test_a_batch_shrinks_as_answers_end() -> None:
    model = tiny_model("llama")
    whole = defined(model, CONTEXTS[0], (), 24)
    widths: list[int] = []
    lm = build_lm(model, tiny_tokenizer())
    handle = model.register_forward_pre_hook(
        lambda _, __, options: widths.append(len(options["input_ids"])), with_kwargs=True
    )
    asked = [
        Instance("generate_until", {}, (context, {"max_gen_toks": most}), 0, ("task", number, 1))
        for number, (context, most) in enumerate(
            zip(CONTEXTS, (1, 2, 2, 3, 3, 4, 4, 5, 24), strict=True)
        )
    ]
    found = lm.generate_until(asked)
    handle.remove()
    assert widths[-1] == 1
    assert widths[-20:] == sorted(widths[-20:], reverse=True)
    assert found[0] == whole[:1]
    assert found[-1] == defined(model, CONTEXTS[-1], (), 24)
    assert lm.work.generated_tokens >= sum((1, 2, 2, 3, 3, 4, 4, 5, 24))


def test_an_end_token_ends_an_answer() -> None:
    model = tiny_model("llama")
    whole = defined(model, CONTEXTS[0], (), 24)
    tokens = tiny_tokenizer()(whole, add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [tokens[7]]
    found = build_lm(model, tiny_tokenizer()).generate_until(
        requests(CONTEXTS[:1], max_gen_toks=24)
    )
    assert found == [whole[: tokens.index(tokens[7])]]


def test_equal_requests_are_written_once() -> None:
    lm = build_lm(tiny_model("llama"), tiny_tokenizer())
    found = lm.generate_until(requests([CONTEXTS[0]] * 5, max_gen_toks=6))
    assert len(set(found)) == 1
    assert lm.work.generated_tokens <= 6


def test_a_context_that_is_too_long_loses_its_left_and_is_told() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    lm = build_lm(model, tokenizer)
    positions = model.config.max_position_embeddings
    context = "".join(chr(97 + number % 26) for number in range(positions - 9))
    assert not lm.truncates(context[: positions - 10], 10)
    assert lm.truncates(context, 10)
    found = lm.generate_until(requests([context], max_gen_toks=10))
    assert found == [defined(model, context[1:], (), 10)]


def test_an_answer_that_leaves_no_room_is_refused() -> None:
    lm = build_lm(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(
        DataError, match="up to 512 tokens needs a context before it and 512 positions"
    ):
        lm.generate_until(requests(["a"], max_gen_toks=512))


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"num_beams": 4}, {"num_return_sequences": 2}]
)
def test_what_is_not_greedy_is_refused(options: dict[str, Any]) -> None:
    lm = build_lm(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(UserError, match="Answers are written greedily here"):
        lm.generate_until(requests(["a"], max_gen_toks=4, **options))


def test_logits_that_are_no_numbers_name_task_and_question() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    lm = build_lm(model, tiny_tokenizer())
    asked = [
        Instance("generate_until", {"key": f"key-{number}"}, request.args, 0, ("sums", number, 1))
        for number, request in enumerate(requests(CONTEXTS[:2], max_gen_toks=4))
    ]
    no_logits = r"for question `key-[01]` of task `sums` logits are no numbers"
    with pytest.raises(ModelError, match=no_logits):
        lm.generate_until(asked)
    scored = Instance("loglikelihood", {}, ("a", "b"), 0, ("sums", 7, 1))
    with pytest.raises(ModelError, match="for question `7` of task `sums` a log-likelihood is nan"):
        lm.loglikelihood([scored])


def test_a_model_that_cannot_share_is_written_with_by_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    expected = build_lm(model, tiny_tokenizer()).generate_until(requests(CONTEXTS, max_gen_toks=8))
    lm = build_lm(model, tiny_tokenizer())
    monkeypatch.setattr(lm, "shares", False)
    assert isinstance(lm, DecoderLM)
    assert lm.generate_until(requests(CONTEXTS, max_gen_toks=8)) == expected


@settings(max_examples=50)
@given(
    st.text("abc", min_size=1, max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
    st.integers(1, 30),
)
def test_stops_are_found_wherever_they_end(text: str, stops: list[str], most: int) -> None:
    """Fed character by character, an answer ends with the first stop that is complete."""
    answers = Answers([Generation((1,), tuple(stops), most)], tiny_tokenizer(), frozenset())
    fed = ""
    for token in tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]:
        if not answers.live:
            break
        answers.add({0: token})
        fed = text[: len(fed) + 1]
    ended = next(
        (
            n
            for n in range(1, len(text) + 1)
            if n == most or any(stop in text[:n] for stop in stops)
        ),
        len(text),
    )
    assert len(fed) == ended
    places = [text[:ended].find(stop) for stop in stops if stop in text[:ended]]
    assert answers.texts() == [text[: min(places, default=ended)]]
