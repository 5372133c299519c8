"""Greedy answers of an encoder-decoder against transformers' `generate`; stopped evaluations that go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from flanmoe.core.errors import DataError, ModelError, UserError
from flanmoe.evaluation.lm import Journal, build_lm
from flanmoe.testing.tiny_models import ENCODER_DECODER_NAMES, tiny_model, tiny_text_tokenizer

from .encoder_decoders import (
    CONTEXTS,
    PAIRS,
    generated,
    harness,
    model_named,
    to_score,
    to_write,
    tokens_read,
)


@pytest.mark.parametrize("name", ENCODER_DECODER_NAMES)
def test_equals_what_transformers_writes(name: str) -> None:
    model = model_named(name)
    expected = [generated(model, context, 20) for context in CONTEXTS]
    assert len(set(expected)) > 3
    for batch_size in (None, 1, 3):
        lm = build_lm(model, tiny_text_tokenizer(), batch_size=batch_size)
        assert lm.generate_until(to_write(CONTEXTS, until=[], max_gen_toks=20)) == expected


def test_an_end_token_ends_an_answer() -> None:
    model = model_named("t5")
    whole = generated(model, CONTEXTS[0], 20)
    model.generation_config.eos_token_id = tiny_text_tokenizer().convert_tokens_to_ids(whole[7])
    expected = [generated(model, context, 20) for context in CONTEXTS]
    expected = [text.removesuffix(whole[7]) for text in expected]
    assert expected[0] == whole[: whole.index(whole[7])]
    lm = build_lm(model, tiny_text_tokenizer())
    assert lm.generate_until(to_write(CONTEXTS, max_gen_toks=20)) == expected


def test_stops_end_an_answer_and_are_not_part_of_it() -> None:
    model = model_named("t5")
    whole = [generated(model, context, 24) for context in CONTEXTS]
    stops = [whole[0][5:7], whole[1][9], whole[2][15:]]
    expected = [
        text[: min([text.find(stop) for stop in stops if stop in text], default=24)]
        for text in whole
    ]
    assert len({len(text) for text in expected}) > 1
    lm = build_lm(model, tiny_text_tokenizer())
    assert lm.generate_until(to_write(CONTEXTS, until=stops, max_gen_toks=24)) == expected
    theirs = harness(model).generate_until(
        to_write(CONTEXTS, until=stops, max_gen_toks=24), disable_tqdm=True
    )
    # Where a stop comes, theirs is the same; where none does, theirs goes on by the context's length.
    assert all(long.startswith(short) for long, short in zip(theirs, expected, strict=True))


def test_max_gen_toks_is_the_limit_whatever_the_context() -> None:
    model = model_named("t5")
    asked = to_write(CONTEXTS[1:2], until=["\x00"], max_gen_toks=5)
    (ours,) = build_lm(model, tiny_text_tokenizer()).generate_until(asked)
    (theirs,) = harness(model).generate_until(asked, disable_tqdm=True)
    assert len(ours) == 5
    assert len(theirs) > 5
    assert theirs.startswith(ours)


def test_requests_with_one_context_share_its_answer() -> None:
    model = model_named("t5")
    whole = generated(model, CONTEXTS[0], 12)
    lm = build_lm(model, tiny_text_tokenizer())
    options = [
        {"max_gen_toks": 3},
        {"max_gen_toks": 12},
        {"max_gen_toks": 12, "until": [whole[5]]},
        {"max_gen_toks": 3},
    ]
    asked = [
        Instance("generate_until", {}, (CONTEXTS[0], one), 0, ("task", number, 1))
        for number, one in enumerate(options)
    ]
    with tokens_read(model.get_encoder()) as encoded, tokens_read(model.get_decoder()) as decoded:
        found = lm.generate_until(asked)
    assert found == [whole[:3], whole, whole[: whole.index(whole[5])], whole[:3]]
    assert encoded == [(1, len(CONTEXTS[0]) + 1)]
    assert decoded == 12 * [(1, 1)]
    assert lm.work.generated_tokens == 12
    assert lm.work.shared_tokens == 3 * (len(CONTEXTS[0]) + 1)


def test_a_batch_shrinks_as_answers_end() -> None:
    model = model_named("t5")
    most = (2, 9, 1, 2, 4)
    asked = [
        Instance("generate_until", {}, (context, {"max_gen_toks": limit}), 0, ("task", number, 1))
        for number, (context, limit) in enumerate(zip(CONTEXTS, most, strict=True))
    ]
    lm = build_lm(model, tiny_text_tokenizer())
    with tokens_read(model.get_decoder()) as decoded:
        found = lm.generate_until(asked)
    # Four of five go on (more than three quarters of a batch, so nothing is moved), then two, then one.
    assert [rows for rows, _ in decoded] == [5, 5, 2, 2, 1, 1, 1, 1, 1]
    assert found == [
        generated(model, context, n) for context, n in zip(CONTEXTS, most, strict=True)
    ]
    assert lm.work.generated_tokens == sum(most)


def test_contexts_of_any_lengths_are_encoded_in_parts_that_fit() -> None:
    model = model_named("t5")
    contexts = [*CONTEXTS, "x" * 400]
    lm = build_lm(model, tiny_text_tokenizer())
    expected = [generated(model, context, 6) for context in contexts]
    lm._writer._size._tokens = 500
    with tokens_read(model.get_encoder()) as encoded, tokens_read(model.get_decoder()) as decoded:
        assert lm.generate_until(to_write(contexts, max_gen_toks=6)) == expected
    assert encoded == [(1, 401), (5, 50)]
    assert decoded[0] == (6, 1)


def test_an_answer_takes_no_room_from_its_context() -> None:
    lm = build_lm(tiny_model("t5"), tiny_text_tokenizer())
    assert not lm.truncates("a" * 511, 512)
    with pytest.raises(DataError, match="the 512 positions of the decoder, but up to 513 tokens"):
        lm.generate_until(to_write(["a"], max_gen_toks=513))


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 4}])
def test_what_is_not_greedy_is_refused(options: dict[str, Any]) -> None:
    lm = build_lm(tiny_model("t5"), tiny_text_tokenizer())
    with pytest.raises(UserError, match="Answers are written greedily here"):
        lm.generate_until(to_write(["a"], max_gen_toks=4, **options))


def test_logits_that_are_no_numbers_name_task_and_question() -> None:
    model = model_named("t5")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    asked = Instance("generate_until", {"key": "k"}, ("a", {"max_gen_toks": 4}), 0, ("sums", 0, 1))
    with pytest.raises(ModelError, match="for question `k` of task `sums` logits are no numbers"):
        build_lm(model, tiny_text_tokenizer()).generate_until([asked])


def test_a_forced_first_token_is_written_first() -> None:
    model = model_named("bart")
    model.generation_config.forced_bos_token_id = tiny_text_tokenizer().convert_tokens_to_ids("g")
    expected = [generated(model, context, 8) for context in CONTEXTS]
    assert {text[0] for text in expected} == {"g"}
    lm = build_lm(model, tiny_text_tokenizer())
    assert lm.generate_until(to_write(CONTEXTS, max_gen_toks=8)) == expected


def test_settings_without_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_named("t5")
    lm = build_lm(model, tiny_text_tokenizer())
    lm.generate_until(to_write(["a"], max_gen_toks=1))
    assert "Warning" not in capsys.readouterr().err
    model.generation_config.no_repeat_ngram_size = 3
    model.generation_config.min_length = 2
    lm.generate_until(to_write(["a"], max_gen_toks=1))
    assert "have no effect: `min_length=2`, `no_repeat_ngram_size=3`." in capsys.readouterr().err


def test_the_load_counts_contexts_once() -> None:
    lm = build_lm(tiny_model("t5"), tiny_text_tokenizer(), batch_size=2)
    scored = to_score([("abc", "xy"), ("abc", "z"), ("d", "z")])
    most = (("abc", 5), ("abc", 7), ("de", 3), ("f", 4))
    written = [to_write([context], max_gen_toks=limit)[0] for context, limit in most]
    load = lm.load([*scored, *written])
    # Contexts with their ends: 4 + 2 to score and 4 + 3 + 2 to answer; answers to score: 2 + 1 + 1.
    assert load.tokens == 6 + 9 + 4
    # Two contexts at a time, longest first: up to 7 tokens, then 4.
    assert (load.steps, load.rows) == (7 + 4, 2)
    assert 0 < lm.expected_seconds([*scored, *written]) < 60


class Stopped(Exception):
    """The process is killed."""


def both(lm: Any) -> tuple[Any, Any]:
    scores = lm.loglikelihood(to_score(PAIRS))
    return scores, lm.generate_until(to_write(CONTEXTS, max_gen_toks=6))


def stop_after(model: Any, num_passes: int) -> Any:
    passes = iter(range(num_passes))

    def count(*_: Any) -> None:
        if next(passes, None) is None:
            raise Stopped

    return model.get_encoder().register_forward_pre_hook(count)


@pytest.mark.parametrize("num_passes", [1, 4, 5, 6])
def test_going_on_gives_the_same_numbers_to_the_last_bit(tmp_path: Path, num_passes: int) -> None:
    model, tokenizer = model_named("switch_transformers"), tiny_text_tokenizer()
    expected = both(build_lm(model, tokenizer, batch_size=2))
    path = tmp_path / "requests.jsonl"
    with Journal(path, identity={}) as journal:
        hook = stop_after(model, num_passes)
        with pytest.raises(Stopped):
            both(build_lm(model, tokenizer, batch_size=2, journal=journal))
        hook.remove()
    with Journal(path, identity={}) as journal:
        assert both(build_lm(model, tokenizer, batch_size=2, journal=journal)) == expected
    # Everything is there now: not one pass is made.
    with Journal(path, identity={}) as journal:
        lm = build_lm(model, tokenizer, batch_size=2, journal=journal)
        hook = stop_after(model, 0)
        assert both(lm) == expected
        hook.remove()
    assert lm.work.real_tokens == 0


def test_a_batch_that_does_not_fit_is_halved(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = model_named("t5"), tiny_text_tokenizer()
    scores, texts = both(build_lm(model, tokenizer, batch_size=8))

    def refuse(_: Any, __: Any, options: dict[str, Any]) -> None:
        if len(options["decoder_input_ids"]) > 2:
            raise torch.OutOfMemoryError

    lm = build_lm(model, tokenizer, batch_size=8)
    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    found_scores, found_texts = both(lm)
    hook.remove()
    assert [one[0] for one in found_scores] == pytest.approx([one[0] for one in scores], abs=1e-4)
    assert found_texts == texts
    assert "Memory ran out with" in capsys.readouterr().err
