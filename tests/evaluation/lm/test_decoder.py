"""The language model against a direct computation and against lm-eval's own `HFLM`."""

import contextlib
import logging
import socket
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flanmoe.core.errors import DataError
from flanmoe.evaluation.lm import build_lm, encode_pair, quiet_lm_eval
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

NAMES = ("llama", "mistral", "qwen2", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe")

text = st.text("abcXY (?.\n", min_size=1, max_size=24)
pairs = st.lists(st.tuples(text, text), min_size=1, max_size=9)


def _requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, index, ("task", index, 1))
        for index, pair in enumerate(pairs)
    ]


def _direct(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, continuation: str
) -> tuple[float, bool]:
    """The definition, one text at a time: sum of log p(token | everything before)."""
    tokens = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        probabilities = model(torch.tensor([tokens])).logits[0].double().softmax(-1)
    terms = [probabilities[place - 1, tokens[place]].log() for place in range(start, len(tokens))]
    likeliest = [int(probabilities[place - 1].argmax()) for place in range(start, len(tokens))]
    return float(sum(terms)), likeliest == tokens[start:]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_direct_computation_in_batches_of_any_size(name: str) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    asked = [
        (f"Question {'x' * length}?\nThe answer is (", continuation)
        for length in (0, 30, 7)
        for continuation in ("A", "B", "a long one.", "A")
    ]
    expected = [_direct(model, tokenizer, *pair) for pair in asked]
    for batch_size in (1, 2, 8):
        lm = build_lm(model, tokenizer, batch_size=batch_size, precision="float32")
        found = lm.loglikelihood(_requests(asked))
        assert [answer[0] for answer in found] == pytest.approx(
            [answer[0] for answer in expected], abs=1e-4
        )
        assert [answer[1] for answer in found] == [answer[1] for answer in expected]


@settings(max_examples=25)
@given(pairs, st.integers(min_value=1, max_value=4))
def test_equals_the_direct_computation_for_any_texts(
    pairs: list[tuple[str, str]], batch_size: int
) -> None:
    model, tokenizer = tiny_model("mixtral"), tiny_tokenizer()
    lm = build_lm(model, tokenizer, batch_size=batch_size, precision="float32")
    found = [answer[0] for answer in lm.loglikelihood(_requests(pairs))]
    assert found == pytest.approx([_direct(model, tokenizer, *pair)[0] for pair in pairs], abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_agrees_with_lm_evals_own_model(name: str) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    # No line break at the end of a context: HFLM would count it as part of the answer.
    asked = [
        (f"Why {number}? It is (", continuation)
        for number in range(5)
        for continuation in ("A", "B", "because.")
    ]
    with quiet_lm_eval():
        theirs = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=4,
            add_bos_token=False,
        )
    ours = build_lm(model, tokenizer, batch_size=4, precision="float32")
    expected = theirs.loglikelihood(_requests(asked), disable_tqdm=True)
    found = ours.loglikelihood(_requests(asked))
    assert [answer[0] for answer in found] == pytest.approx(
        [answer[0] for answer in expected], abs=1e-4
    )
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]


def test_the_line_break_of_the_prompt_is_not_scored() -> None:
    encoded = encode_pair(tiny_tokenizer(), "<|im_start|>assistant\n", "Yes", max_length=99)
    assert encoded.num_scored == 3
    tokenizer = tiny_tokenizer()
    with quiet_lm_eval():
        theirs = HFLM(pretrained=tiny_model("llama"), tokenizer=tokenizer, backend="causal")
    # The reason why HFLM's own splitting is not used.
    assert len(theirs._encode_pair("<|im_start|>assistant\n", "Yes")[1]) == 4


def test_no_special_token_is_added() -> None:
    tokenizer = _with_bos(tiny_tokenizer())
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    encoded = encode_pair(tokenizer, "<|im_start|>a", "b<|im_end|>", max_length=99)
    assert tokenizer.convert_ids_to_tokens(list(encoded.tokens)) == [
        "<|im_start|>",
        "a",
        "b",
        "<|im_end|>",
    ]
    assert encoded.num_scored == 2


def test_letters_share_one_forward_pass() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    lm = build_lm(model, tokenizer, batch_size=8, precision="float32")
    context = "The answer is ("
    lm.loglikelihood(_requests([(context, letter) for letter in "ABCDEFG"]))
    assert lm.work.real_tokens == len(context)
    assert lm.work.padding_tokens == 0


def test_only_the_logits_that_are_needed_are_made() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    lm = build_lm(model, tokenizer, batch_size=2, precision="float32")
    made: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *call: made.append(call[2].shape[:-1].numel()))
    lm.loglikelihood(
        _requests([("x" * 50, "yes"), ("z" * 48, "no"), ("y" * 40, "A"), ("y" * 40, "B")])
    )
    handle.remove()
    assert sum(made) == 3 + 2 + 1


def test_padding_is_counted() -> None:
    lm = build_lm(tiny_model("llama"), tiny_tokenizer(), batch_size=2, precision="float32")
    lm.loglikelihood(_requests([("x" * 20, "yes"), ("y" * 18, "yes")]))
    assert (lm.work.real_tokens, lm.work.padding_tokens) == (22 + 20, 2)


@given(st.lists(st.integers(min_value=1, max_value=120), min_size=1, max_size=20))
@settings(max_examples=10)
def test_padding_stays_below_a_tenth(lengths: list[int]) -> None:
    lm = build_lm(tiny_model("llama"), tiny_tokenizer(), batch_size=8, precision="float32")
    lm.loglikelihood(_requests([("x" * length, "yes") for length in lengths]))
    assert lm.work.padding_tokens <= 0.1 * (lm.work.real_tokens + lm.work.padding_tokens)


def test_an_answer_of_several_tokens_is_summed() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    lm = build_lm(model, tokenizer, batch_size=8, precision="float32")
    asked = [("The answer is (", choice) for choice in ("AB", "AC", "B")]
    found = [answer[0] for answer in lm.loglikelihood(_requests(asked))]
    assert found == pytest.approx([_direct(model, tokenizer, *pair)[0] for pair in asked], abs=1e-4)


def test_a_letter_merged_with_the_bracket_is_scored_as_one_token() -> None:
    tokenizer = _merging(("(", "A"), ("(", "B"))
    encoded = [encode_pair(tokenizer, "is (", letter, max_length=99) for letter in "AB"]
    assert [request.num_scored for request in encoded] == [1, 1]
    assert encoded[0].inputs == encoded[1].inputs
    assert encoded[0].tokens[-1] != encoded[1].tokens[-1]
    merged = tokenizer.convert_ids_to_tokens([request.tokens[-1] for request in encoded])
    assert merged == ["(A", "(B"]


def test_a_text_that_is_too_long_loses_its_left_and_says_so() -> None:
    tokenizer = tiny_tokenizer()
    kept = encode_pair(tokenizer, "a" * 9, "bc", max_length=10)
    cut = encode_pair(tokenizer, "a" * 10, "bc", max_length=10)
    assert (len(kept.tokens), kept.truncated) == (11, False)
    assert (len(cut.tokens), cut.truncated, cut.num_scored) == (11, True, 2)
    long_answer = encode_pair(tokenizer, "a", "b" * 30, max_length=10)
    assert (len(long_answer.inputs), long_answer.num_scored) == (10, 10)


@pytest.mark.parametrize(("context", "continuation"), [("", "a"), ("a", "")])
def test_nothing_to_score_is_refused(context: str, continuation: str) -> None:
    with pytest.raises(DataError, match=r"both must be at least one token, but found the prompt"):
        encode_pair(tiny_tokenizer(), context, continuation, max_length=10)


def test_bfloat16_runs_under_autocast_and_scores_in_float32() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    types: list[torch.dtype] = []
    found: dict[str, list[float]] = {}
    for precision in ("float32", "bfloat16"):
        lm = build_lm(model, tokenizer, batch_size=4, precision=precision)
        head = model.get_output_embeddings()
        handle = head.register_forward_hook(lambda *call: types.append(call[2].dtype))
        answers = lm.loglikelihood(_requests([("Why? ", "So it is."), ("Who? ", "It was me.")]))
        handle.remove()
        found[precision] = [answer[0] for answer in answers]
    assert set(types[: len(types) // 2]) == {torch.float32}
    assert set(types[len(types) // 2 :]) == {torch.bfloat16}
    assert found["float32"] != found["bfloat16"]
    assert found["float32"] == pytest.approx(found["bfloat16"], rel=0.02)
    assert next(model.parameters()).dtype == torch.float32


def test_the_tokenizer_of_the_caller_stays_as_it_was() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    size = len(tokenizer)
    build_lm(tiny_model("llama"), tokenizer, batch_size=1, precision="float32")
    assert tokenizer.pad_token is None
    assert len(tokenizer) == size


def test_nothing_is_printed_on_stdout_and_no_network_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    lm = build_lm(tiny_model("llama"), tiny_tokenizer(), batch_size=1, precision="float32")
    lm.loglikelihood(_requests([("a", "b")]))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("evaluating: 1/1 tokens")


def test_lm_evals_log_level_comes_back_after_an_error() -> None:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    levels: list[int] = []
    with contextlib.suppress(ValueError), quiet_lm_eval():
        levels.append(logger.getEffectiveLevel())
        raise ValueError
    assert levels == [logging.ERROR]
    assert logger.level == before


def _with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def _merging(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    tokens = ["<|pad|>", *"is (AB", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>")
