"""The expected load against what is then counted, and seconds against a clock that is told."""

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from flanmoe.evaluation.lm import build_lm, expectation
from flanmoe.evaluation.lm.expectation import Load, expected_seconds
from flanmoe.evaluation.lm.forward import Forward
from flanmoe.evaluation.lm.token_tree import Group, Prefix, Row, mean_before
from flanmoe.evaluation.lm.trial import Trial
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
    # Of the two kinds together, weighed by their tokens and steps.
    alone = [lm.load(kind) for kind in (scored, written)]
    assert load.before == pytest.approx(
        sum(one.tokens * one.before for one in alone) / sum(one.tokens for one in alone)
    )
    lengths = [len(tokenizer(context)["input_ids"]) for context in set(CONTEXTS)]
    assert load.context == alone[1].context == pytest.approx(sum(lengths) / len(lengths))
    # Nine contexts in batches of four.
    assert (load.steps, load.rows) == (3 * 5, 4)
    lm.loglikelihood(scored)
    lm.generate_until(written)
    assert lm.work.real_tokens == load.tokens
    assert lm.work.generated_tokens == 5 * len(CONTEXTS)


def test_seconds_are_those_of_reading_and_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    passes: list[tuple[int, int, int]] = []

    def run(rows: int, length: int, before: int) -> None:
        nonlocal now
        passes.append((rows, length, before))
        now += 5.12 + before / 100 if length > 1 else 0.5

    monkeypatch.setattr(expectation.time, "perf_counter", lambda: now)
    # 512 tokens in 5.12 seconds, behind 512 others in twice the time; 7 steps of half a second.
    load = Load(tokens=100, steps=7, rows=3, context=90.4)
    assert expected_seconds(load, run) == pytest.approx(1.0 + 3.5)
    assert (3, 1, 90) in passes
    assert expected_seconds(Load(tokens=100), run) == pytest.approx(1.0)
    assert expected_seconds(Load(tokens=100, before=512.0), run) == pytest.approx(2.0)


def test_tokens_before_rows_are_weighed_by_the_rows() -> None:
    first = Prefix((1, 2, 3))
    longer = Prefix((4, 5), parent=first)
    chain = Row((7, 8), (-1, 0), ((0, 1),))
    groups = [Group(None, (chain,)), Group(first, (chain, chain)), Group(longer, (chain,))]
    assert mean_before(groups) == (2 * 0 + 4 * 3 + 2 * 5) / 8


def test_a_trial_reads_what_stands_before_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Forward(tiny_model("llama"), "float32")
    read: list[tuple[int, ...]] = []
    logits = forward.logits

    def recorded(tokens: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        read.append(tuple(tokens.shape))
        return logits(tokens, *arguments, **options)

    monkeypatch.setattr(forward, "logits", recorded)
    trial = Trial(forward, sharing=True)
    trial.run(2, 3, 5)
    trial.run(2, 3, 5)
    trial.run(4, 1, 0)
    assert read == [(1, 5), (2, 3), (2, 3), (4, 1)]


def test_expected_seconds_are_positive() -> None:
    lm = build_lm(tiny_model("llama"), tiny_tokenizer())
    requests = [Instance("loglikelihood", {}, pair, 0, ("a", 0, 1)) for pair in few_shot(2)]
    assert 0 < lm.expected_seconds(requests) < 60
