"""Likelihoods of an encoder-decoder against the definition, and against lm-eval's own `HFLM`."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from flanmoe.core.errors import ConfigError, DataError, ModelError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.tasks import Task
from flanmoe.evaluation.lm import DecoderLM, EncoderDecoderLM, build_lm
from flanmoe.evaluation.suites import SuiteConfig
from flanmoe.evaluation.suites.run import evaluate_tasks
from flanmoe.testing.tiny_models import (
    ENCODER_DECODER_NAMES,
    tiny_model,
    tiny_text_tokenizer,
    tiny_tokenizer,
)

from .encoder_decoders import (
    CONTEXTS,
    PAIRS,
    harness,
    likelihood,
    model_named,
    to_score,
    tokens_read,
)

text = st.text("abcXY (?.\n", min_size=1, max_size=24)
pairs = st.lists(st.tuples(text, text), min_size=1, max_size=9)


@pytest.mark.parametrize("name", ENCODER_DECODER_NAMES)
@pytest.mark.parametrize("batch_size", [None, 1, 2, 16])
def test_equals_the_definition_and_lm_evals_own_model(name: str, batch_size: int | None) -> None:
    model = model_named(name)
    lm = build_lm(model, tiny_text_tokenizer(), batch_size=batch_size)
    found = lm.loglikelihood(to_score(PAIRS))
    theirs = harness(model).loglikelihood(to_score(PAIRS), disable_tqdm=True)
    for expected in ([likelihood(model, *pair) for pair in PAIRS], theirs):
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
        assert [one[1] for one in found] == [one[1] for one in expected]


def test_an_answer_that_is_written_greedily_is_said_to_be_the_likeliest() -> None:
    model = model_named("t5")
    lm = build_lm(model, tiny_text_tokenizer())
    asked = Instance("generate_until", {}, (CONTEXTS[0], {"max_gen_toks": 4}), 0, ("task", 0, 1))
    (written,) = lm.generate_until([asked])
    answers = [written, written[:-1] + ("a" if written[-1] != "a" else "b"), "a" + written]
    found = lm.loglikelihood(to_score([(CONTEXTS[0], answer) for answer in answers]))
    assert [one[1] for one in found] == [True, False, False]


@settings(max_examples=25)
@given(pairs, st.integers(min_value=1, max_value=4))
def test_equals_the_definition_for_any_texts(pairs: list[tuple[str, str]], batch_size: int) -> None:
    model = model_named("t5")
    found = build_lm(model, tiny_text_tokenizer(), batch_size=batch_size).loglikelihood(
        to_score(pairs)
    )
    assert [one[0] for one in found] == pytest.approx(
        [likelihood(model, *pair)[0] for pair in pairs], abs=1e-4
    )


def test_a_context_gets_the_tokenizers_special_tokens_and_an_answer_none() -> None:
    lm = build_lm(tiny_model("t5"), tiny_text_tokenizer())
    encoded = lm.encode("ab", "cd")
    tokens = tiny_text_tokenizer().convert_ids_to_tokens
    assert tokens(list(encoded.context)) == ["a", "b", "</s>"]
    assert tokens(list(encoded.targets)) == ["c", "d"]
    with_end = lm.encode("ab", "cd</s>")
    assert tokens(list(with_end.targets)) == ["c", "d", "</s>"]
    assert with_end.num_scored == 3


def test_a_line_break_at_the_end_of_a_prompt_is_not_scored() -> None:
    model = model_named("t5")
    encoded = build_lm(model, tiny_text_tokenizer()).encode("Why?\n", "A")
    assert (len(encoded.context), encoded.num_scored) == (6, 1)
    # The reason why HFLM's own splitting is not used.
    assert len(harness(model)._encode_pair("Why?\n", "A")[1]) == 2


def test_the_beginning_of_a_text_stands_there_once() -> None:
    tokenizer = tiny_text_tokenizer()
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("<unk>", 2), ("</s>", 1)]
    )
    lm = build_lm(tiny_model("bart"), tokenizer)
    for context in ("ab", "<unk>ab"):
        kept = tokenizer.convert_ids_to_tokens(list(lm.encode(context, "c").context))
        assert kept == ["<unk>", "a", "b", "</s>"]


def test_an_empty_context_is_the_end_of_a_text_as_in_lm_eval() -> None:
    model = model_named("t5")
    lm = build_lm(model, tiny_text_tokenizer())
    assert lm.encode("", "ab").context == (1,)
    (found,) = lm.loglikelihood(to_score([("", "ab")]))
    (expected,) = harness(model).loglikelihood(to_score([("", "ab")]), disable_tqdm=True)
    assert found[0] == pytest.approx(expected[0], abs=1e-4)


def test_nothing_to_score_is_refused() -> None:
    lm = build_lm(tiny_model("t5"), tiny_text_tokenizer())
    with pytest.raises(
        DataError, match=r"An answer must be at least one token .* to the prompt 'a'"
    ):
        lm.loglikelihood(to_score([("a", "")]))


def test_every_distinct_context_is_encoded_once() -> None:
    model = model_named("t5")
    lm = build_lm(model, tiny_text_tokenizer(), batch_size=2)
    with tokens_read(model.get_encoder()) as encoded, tokens_read(model.get_decoder()) as decoded:
        lm.loglikelihood(to_score(PAIRS))
    lengths = sorted((len(context) + 1 for context in CONTEXTS), reverse=True)
    assert encoded == [(2, 50), (1, 34), (1, 22), (1, 13)]
    # The start; then, two at a time and longest first, what stands before the last token of " because."
    # (9 tokens), "yes</s>" (4), "(A)" and "(B)" (3).
    together, alone = [(2, 1), (2, 8), (2, 3), (2, 2), (2, 2)], [(1, 1), (1, 8), (2, 3), (1, 2)]
    assert decoded == together + 3 * alone
    read = sum(lengths) + 5 * (1 + 8 + 3 + 2 + 2)
    # The second of two contexts is 3 tokens shorter; "(A" stands beside "yes" three times.
    assert (lm.work.real_tokens, lm.work.padding_tokens) == (read, 3 + 3)
    assert lm.work.shared_tokens == 6 * sum(lengths)


def test_letters_of_a_question_cost_one_pass() -> None:
    model = model_named("t5")
    lm = build_lm(model, tiny_text_tokenizer())
    with tokens_read(model.get_encoder()) as encoded, tokens_read(model.get_decoder()) as decoded:
        lm.loglikelihood(to_score([("Which?", letter) for letter in "ABCDEFG"]))
    assert (encoded, decoded) == ([(1, 7)], [(1, 1)])


def test_only_the_logits_that_are_needed_are_made() -> None:
    model = model_named("t5")
    shapes: list[tuple[int, ...]] = []
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[:-1])))
    lm = build_lm(model, tiny_text_tokenizer())
    lm.loglikelihood(to_score([("Which?", "abcd"), ("Which?", "xyz"), ("Which?", "A")]))
    handle.remove()
    assert shapes == [(1, 1), (1, 3 + 2)]


@pytest.mark.parametrize("end", [511, 512, 600])
def test_a_context_that_is_too_long_loses_its_left_and_is_told(end: int) -> None:
    model = model_named("t5")
    lm = build_lm(model, tiny_text_tokenizer())
    context = "".join(chr(97 + place % 26) for place in range(end))
    encoded = lm.encode(context, "yes")
    assert encoded.truncated == lm.truncates(context, 500) == (end > 511)
    assert len(encoded.context) == 512
    assert encoded.context[-1] == 1
    (found,) = lm.loglikelihood(to_score([(context, "yes")]))
    assert found[0] == pytest.approx(likelihood(model, context[-511:], "yes")[0], abs=1e-4)


def test_an_answer_that_is_too_long_loses_its_right_and_is_told() -> None:
    encoded = build_lm(tiny_model("t5"), tiny_text_tokenizer()).encode("a", "b" * 512 + "c")
    assert encoded.truncated
    assert encoded.targets == 512 * (encoded.targets[0],)


def test_whole_texts_are_refused() -> None:
    lm = build_lm(tiny_model("t5"), tiny_text_tokenizer())
    asked = Instance("loglikelihood_rolling", {}, ("text",), 0, ("wiki", 0, 1))
    with pytest.raises(ModelError, match="task `wiki` asks for the likelihood of whole texts"):
        lm.loglikelihood_rolling([asked])
    assert lm.loglikelihood_rolling([]) == []


def test_a_likelihood_that_is_no_number_names_task_and_question() -> None:
    model = model_named("t5")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    asked = Instance("loglikelihood", {"key": "third"}, ("a", "b"), 0, ("sums", 7, 1))
    with pytest.raises(
        ModelError, match="for question `third` of task `sums` a log-likelihood is nan"
    ):
        build_lm(model, tiny_text_tokenizer()).loglikelihood([asked])


def test_the_configuration_chooses_the_language_model() -> None:
    assert isinstance(build_lm(tiny_model("t5"), tiny_text_tokenizer()), EncoderDecoderLM)
    assert isinstance(build_lm(tiny_model("llama"), tiny_tokenizer()), DecoderLM)


def test_a_decoder_without_a_start_is_refused() -> None:
    model = tiny_model("t5", decoder_start_token_id=None)
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="Set `decoder_start_token_id` in its config"):
        build_lm(model, tiny_text_tokenizer())


def test_experts_are_never_full() -> None:
    """What the model says with room for all, whatever room its configuration gives to an expert."""
    roomy, tight = (model_named("switch_transformers", expert_capacity=room) for room in (999, 1))
    expected = [likelihood(roomy, *pair)[0] for pair in PAIRS]
    dropping = [likelihood(tight, *pair)[0] for pair in PAIRS]
    assert max(abs(a - b) for a, b in zip(expected, dropping, strict=True)) > 0.1
    for batch_size in (1, 16):
        lm = build_lm(tight, tiny_text_tokenizer(), batch_size=batch_size)
        found = [one[0] for one in lm.loglikelihood(to_score(PAIRS))]
        assert found == pytest.approx(expected, abs=1e-4)
    # Asked for, tokens are dropped: texts that are read at once lose what the model itself loses.
    lm = build_lm(tight, tiny_text_tokenizer(), capacity_drops=True)
    lossy = [one[0] for one in lm.loglikelihood(to_score(PAIRS))]
    assert max(abs(a - b) for a, b in zip(expected, lossy, strict=True)) > 0.1
    # The model itself stays as it was.
    assert [likelihood(tight, *pair)[0] for pair in PAIRS] == dropping


def test_drops_of_a_model_without_capacity_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="`capacity_drops` needs experts that take a limited number"
    ):
        build_lm(model_named("t5"), tiny_text_tokenizer(), capacity_drops=True)


def test_bfloat16_runs_under_autocast_and_scores_in_float32() -> None:
    model = model_named("t5")
    types: list[torch.dtype] = []
    head: Any = model.get_output_embeddings()
    head.register_forward_hook(lambda *call: types.append(call[2].dtype))
    found: dict[str, list[float]] = {}
    for precision in ("float32", "bfloat16"):
        lm = build_lm(model, tiny_text_tokenizer(), precision=precision)
        found[precision] = [one[0] for one in lm.loglikelihood(to_score(PAIRS[:7]))]
    assert set(types) == {torch.float32, torch.bfloat16}
    assert found["float32"] != found["bfloat16"]
    assert found["float32"] == pytest.approx(found["bfloat16"], rel=0.05)


def test_a_listener_is_told_the_task_of_every_token() -> None:
    told: list[list[list[int]]] = []

    class Ear:
        def label(self, task: str) -> int:
            return {"sums": 4, "songs": 6}[task]

        def listening(self, labels: torch.Tensor) -> Any:
            told.append(labels.tolist())
            return nullcontext()

    lm = build_lm(tiny_model("t5"), tiny_text_tokenizer(), batch_size=2, listener=Ear())
    asked = [("songs", "x" * 11, "abc"), ("sums", "y" * 10, "ab"), ("sums", "y" * 10, "d")]
    lm.loglikelihood(
        [
            Instance("loglikelihood", {}, (context, answer), 0, (task, number, 1))
            for number, (task, context, answer) in enumerate(asked)
        ]
    )
    assert told == [[12 * [6], [*11 * [4], -1]], [[6], [4]], [[6, 6], [4, -1]]]


def test_tasks_are_evaluated_without_a_chat_template(quiz: Callable[..., Task]) -> None:
    model = model_named("t5")
    tasks = [quiz("one", 6), quiz("two", 3)]
    result = evaluate_tasks(
        model,
        tiny_text_tokenizer(),
        tasks,
        config=SuiteConfig(tasks=("one", "two")),
        seeds=SeedTree(0),
    )
    assert result.num_examples == 9
    for task in tasks:
        for record in (one for one in result.examples if one.task == task.name):
            assert len(record.choice_scores) == 4
            assert record.loss is not None
            assert 0 < record.loss < 40
    # Five requests an example share two contexts: the reference answer has one of its own.
    assert result.shared_tokens > result.tokens
