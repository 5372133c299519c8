"""The expected load against what is then counted, and seconds against a clock that is told."""

import pytest
from lm_eval.api.instance import Instance

from flanmoe.evaluation.lm import build_lm, expectation
from flanmoe.evaluation.lm.expectation import Load, expected_seconds
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

from .test_generation import CONTEXTS
from .test_sharing import few_shot


def test_the_load_is_what_is_then_computed() -> None:
    model = tiny_model("mixtral")
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    lm = build_lm(model, tokenizer, batch_size=4)
    scored = [Instance("loglikelihood", {}, pair, 0, ("a", 0, 1)) for pair in few_shot(5)]
    written = [
        Instance("generate_until", {}, (context, {"max_gen_toks": 5}), 0, ("b", number, 1))
        for number, context in enumerate(CONTEXTS)
    ]
    load = lm.load([*written, *scored])
    # Nine contexts in batches of four.
    assert (load.steps, load.rows) == (3 * 5, 4)
    lm.loglikelihood(scored)
    lm.generate_until(written)
    assert lm.work.real_tokens == load.tokens
    assert lm.work.generated_tokens == 5 * len(CONTEXTS)


def test_seconds_are_those_of_reading_and_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    passes: list[tuple[int, int]] = []

    def run(rows: int, length: int) -> None:
        nonlocal now
        passes.append((rows, length))
        now += 5.12 if length > 1 else 0.5

    monkeypatch.setattr(expectation.time, "perf_counter", lambda: now)
    # 512 tokens in 5.12 seconds; 7 steps of half a second.
    assert expected_seconds(Load(tokens=100, steps=7, rows=3), run) == pytest.approx(1.0 + 3.5)
    assert (3, 1) in passes
    assert expected_seconds(Load(tokens=100), run) == pytest.approx(1.0)


def test_expected_seconds_are_positive() -> None:
    lm = build_lm(tiny_model("llama"), tiny_tokenizer())
    requests = [Instance("loglikelihood", {}, pair, 0, ("a", 0, 1)) for pair in few_shot(2)]
    assert 0 < lm.expected_seconds(requests) < 60
