"""Shared beginnings and branches against plain passes, in every architecture that attends differently."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconMambaConfig,
    Gemma2Config,
    PreTrainedModel,
    Qwen3NextConfig,
)

from flanmoe.evaluation.lm import build_lm
from flanmoe.testing.tiny_models import VOCABULARY_SIZE, tiny_model, tiny_tokenizer

NAMES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "granitemoe",
    "deepseek_v3",
    "gemma2",
)

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
}


def model_named(name: str) -> PreTrainedModel:
    """A tiny model; of Gemma 2 too, which bounds its scores and attends in windows."""
    if name != "gemma2":
        return tiny_model(name)
    config = Gemma2Config(
        **_SMALL,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=False,
    )
    return random_model(config)


def random_model(config: Any) -> PreTrainedModel:
    """A model whose every parameter is random."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    """Requests for log-likelihoods."""
    return [
        Instance("loglikelihood", {}, pair, index, ("task", index, 1))
        for index, pair in enumerate(pairs)
    ]


def direct(model: PreTrainedModel, context: str, continuation: str) -> float:
    """The definition, one text at a time: the sum of log p(token | everything before)."""
    tokens = tiny_tokenizer()(context + continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    start = len(tokens) - len(continuation)
    return float(sum(logits[place - 1, tokens[place]] for place in range(start, len(tokens))))


def few_shot(num_questions: int) -> Iterator[tuple[str, str]]:
    """Questions after the same 120 tokens, longer than any window here, with choices that part late."""
    shots = "".join(f"Q: {number} plus {number}? A: {2 * number}. " for number in range(6))
    for number in range(num_questions):
        for choice in ("yes it is", "yes it was", "no", "A", "B"):
            yield f"{shots}Q: is {'so ' * (number % 4)}{number} even? A: ", choice


@pytest.mark.parametrize("name", NAMES)
def test_equals_plain_passes_one_text_at_a_time(name: str) -> None:
    model = model_named(name)
    pairs = list(few_shot(7))
    expected = [direct(model, *pair) for pair in pairs]
    for batch_size in (None, 1, 3):
        lm = build_lm(model, tiny_tokenizer(), batch_size=batch_size)
        assert lm.shares
        found = [answer[0] for answer in lm.loglikelihood(requests(pairs))]
        assert found == pytest.approx(expected, abs=2e-4)
        # The shots are read once, and each question once for its five choices.
        assert lm.work.shared_tokens > 4 * lm.work.real_tokens


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_batches_of_1_and_16_agree(name: str) -> None:
    model, pairs = model_named(name), list(few_shot(20))
    one, many = (
        [
            answer[0]
            for answer in build_lm(model, tiny_tokenizer(), batch_size=size).loglikelihood(
                requests(pairs)
            )
        ]
        for size in (1, 16)
    )
    assert one == pytest.approx(many, abs=1e-4)


parts = st.text("ab", min_size=1, max_size=3)


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.lists(parts, min_size=1, max_size=5), parts), min_size=1, max_size=12),
    st.sampled_from([1, 30]),
    st.sampled_from([None, 2]),
)
def test_equals_plain_passes_whatever_is_shared(
    asked: list[tuple[list[str], str]], times: int, batch_size: int | None
) -> None:
    model = tiny_model("gpt_oss")
    pairs = [("".join(part * times for part in context), answer) for context, answer in asked]
    lm = build_lm(model, tiny_tokenizer(), batch_size=batch_size)
    found = [answer[0] for answer in lm.loglikelihood(requests(pairs))]
    assert found == pytest.approx([direct(model, *pair) for pair in pairs], abs=2e-4)


def test_the_models_own_attention_comes_back() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    build_lm(model, tiny_tokenizer()).loglikelihood(requests([("a", "b")]))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["llama", "mixtral", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_types_do_not_stand_in_the_way(name: str, precision: Any, dtype: torch.dtype) -> None:
    model = model_named(name).to(dtype)
    assert build_lm(model, tiny_tokenizer(), precision=precision).shares


def test_weights_in_bfloat16_stay_near_plain_passes() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    pairs = list(few_shot(3))
    lm = build_lm(model, tiny_tokenizer())
    assert lm.shares
    found = [answer[0] for answer in lm.loglikelihood(requests(pairs))]
    assert found == pytest.approx([direct(model, *pair) for pair in pairs], rel=0.05, abs=0.3)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        # Its bias depends on a mask that transformers makes.
        (BloomConfig(**_SMALL, n_head=4), "attention interface"),
        # A state in place of keys.
        (FalconMambaConfig(**_SMALL, state_size=4), "of their spread|attention interface"),
        (
            Qwen3NextConfig(
                **_SMALL,
                intermediate_size=32,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                num_experts=4,
                num_experts_per_tok=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                linear_num_value_heads=2,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
            ),
            "of their spread|attention interface",
        ),
    ],
    ids=["bloom", "falcon_mamba", "qwen3_next"],
)
def test_a_model_that_cannot_share_is_read_text_by_text(
    config: Any, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(config)
    pairs = [(f"Is {number} even? ", answer) for number in range(3) for answer in ("yes", "no")]
    lm = build_lm(model, tiny_tokenizer(), batch_size=2)
    assert not lm.shares
    warned = capsys.readouterr().err
    assert "every text is read whole" in warned
    assert any(part in warned for part in why.split("|"))
    found = [answer[0] for answer in lm.loglikelihood(requests(pairs))]
    assert found == pytest.approx([direct(model, *pair) for pair in pairs], abs=1e-3)
