"""Stopped half-way, memory that runs out: the same numbers in the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from flanmoe.core.errors import UserError
from flanmoe.evaluation.lm import DecoderLM, Journal, build_lm
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

from .test_generation import CONTEXTS
from .test_sharing import few_shot


class Stopped(Exception):
    """The process is killed."""


def scored() -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, 0, ("task", number, 1))
        for number, pair in enumerate(few_shot(9))
    ]


def written() -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, {"max_gen_toks": 6}), 0, ("task", number, 1))
        for number, context in enumerate(CONTEXTS)
    ]


def both(lm: DecoderLM) -> tuple[Any, Any]:
    return lm.loglikelihood(scored()), lm.generate_until(written())


def stop_after(model: Any, num_passes: int) -> Any:
    passes = iter(range(num_passes))

    def count(*_: Any) -> None:
        if next(passes, None) is None:
            raise Stopped

    return model.register_forward_pre_hook(count)


@pytest.mark.parametrize("num_passes", [1, 3, 5, 8, 11])
def test_going_on_gives_the_same_numbers_to_the_last_bit(tmp_path: Path, num_passes: int) -> None:
    model, tokenizer = tiny_model("mixtral"), tiny_tokenizer()
    expected = both(build_lm(model, tokenizer, batch_size=2))
    path = tmp_path / "requests.jsonl"
    with Journal(path, identity={}) as journal:
        lm = build_lm(model, tokenizer, batch_size=2, journal=journal)
        hook = stop_after(model, num_passes)
        with pytest.raises(Stopped):
            both(lm)
        hook.remove()
    with Journal(path, identity={}) as journal:
        assert both(build_lm(model, tokenizer, batch_size=2, journal=journal)) == expected
    # Everything is there now: not one pass is made.
    with Journal(path, identity={}) as journal:
        lm = build_lm(model, tokenizer, batch_size=2, journal=journal)
        hook = stop_after(model, 0)
        assert both(lm) == expected
        hook.remove()


def test_a_batch_that_does_not_fit_is_halved(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_model("mixtral"), tiny_tokenizer()
    scores, texts = both(build_lm(model, tokenizer, batch_size=8))

    def refuse(_: Any, __: Any, options: dict[str, Any]) -> None:
        if len(options["input_ids"]) > 3:
            raise torch.OutOfMemoryError

    lm = build_lm(model, tokenizer, batch_size=8)
    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    found_scores, found_texts = both(lm)
    hook.remove()
    assert [one[0] for one in found_scores] == pytest.approx([one[0] for one in scores], abs=1e-4)
    assert found_texts == texts
    warned = capsys.readouterr().err
    assert "Memory ran out with 8 rows in a batch; going on with 4." in warned
    assert "going on with 2" in warned


def test_memory_for_one_row_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    lm = build_lm(model, tiny_tokenizer(), batch_size=2)

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    hook = model.register_forward_pre_hook(refuse)
    with pytest.raises(UserError, match="needs room for one row at least"):
        lm.loglikelihood(scored())
    hook.remove()


def test_other_errors_pass() -> None:
    model = tiny_model("llama")
    lm = build_lm(model, tiny_tokenizer())

    def refuse(*_: Any) -> None:
        raise RuntimeError("something else")

    hook = model.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="something else"):
        lm.loglikelihood(scored())
    hook.remove()
