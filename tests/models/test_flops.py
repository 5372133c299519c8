"""FLOPs against hand formulas and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flanmoe.models.flops import FlopCount, attention_widths, count_flops
from flanmoe.models.meta import meta_model
from flanmoe.models.upcycle import UpcycleConfig, sparse_config
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

_LENGTH = 12


def _counted_by_torch(name: str, **options) -> int:
    # Eager attention: torch's counter does not see into the fused kernels on the CPU.
    model = tiny_model(name, attn_implementation="eager", **options)
    tokens = torch.randint(128, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    return counter.get_total_flops()


def _square(name: str, **options) -> int:
    """Return what the full L by L square of scores costs a token;
    eager attention computes it all."""
    widths = attention_widths(tiny_model(name, **options))
    return sum(2 * (keys + values) * _LENGTH for keys, values in widths)


@pytest.mark.parametrize("name", DENSE_NAMES + SPARSE_NAMES)
def test_equals_torchs_counter(name: str) -> None:
    count = count_flops(tiny_model(name), context_length=_LENGTH)
    expected = _LENGTH * (count.body + count.head + _square(name))
    assert _counted_by_torch(name) == expected


def test_equals_torchs_counter_where_some_layers_are_dense() -> None:
    options = {"num_hidden_layers": 3, "decoder_sparse_step": 2}
    count = count_flops(tiny_model("qwen3_moe", **options), context_length=_LENGTH)
    expected = _LENGTH * (count.body + count.head + _square("qwen3_moe", **options))
    assert _counted_by_torch("qwen3_moe", **options) == expected


def test_llama_by_hand() -> None:
    count = count_flops(tiny_model("llama").config, context_length=100)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    assert count.body == 2 * 2 * (attention + 3 * 32 * 64)
    assert count.head == 2 * 128 * 32
    assert count.router == 0
    assert count.attention_scores == 2 * (2 * 2 * 4 * 8 * 50.5)
    assert count.total == count.body + count.head + count.attention_scores
    assert count.training == 3 * count.total


def test_qwen2_moe_by_hand() -> None:
    count = count_flops(tiny_model("qwen2_moe").config, context_length=_LENGTH)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    router = 8 * 32
    shared = 3 * 32 * 40 + 32
    assert count.router == 2 * 2 * router
    assert count.body == 2 * 2 * (attention + router + shared + 2 * 3 * 32 * 24)


@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_windows_limit_the_keys_that_a_token_sees(length: int) -> None:
    # GPT-OSS: 2 layers, the first with a window of 16; 4 heads of 16.
    keys = [sum(min(i + 1, 16) for i in range(length)), sum(i + 1 for i in range(length))]
    count = count_flops(tiny_model("gpt_oss").config, context_length=length)
    assert count.attention_scores == pytest.approx(sum(2 * 2 * 4 * 16 * k / length for k in keys))


def test_a_window_of_the_whole_model_applies_to_every_layer() -> None:
    count = count_flops(tiny_model("mistral", sliding_window=4).config, context_length=10)
    average = (1 + 2 + 3 + 7 * 4) / 10
    assert count.attention_scores == pytest.approx(2 * 2 * 2 * 4 * 8 * average)


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_a_granular_twin_costs_its_dense_model_and_the_routers(name: str) -> None:
    dense = tiny_model(name).config
    config = UpcycleConfig(num_experts=16, top_k=4, granularity=4)
    twin = count_flops(sparse_config(dense, config), context_length=_LENGTH)
    original = count_flops(dense, context_length=_LENGTH)
    # Qwen2-MoE cannot do without a shared expert; it is one unit wide, with its gate.
    shared = 2 * 2 * (3 * 32 + 32) if name == "qwen2" else 0
    assert twin.router == 2 * 2 * 16 * 32
    assert twin.body - twin.router - shared == original.body
    assert (twin.head, twin.attention_scores) == (original.head, original.attention_scores)


def test_weights_do_not_matter() -> None:
    model = tiny_model("deepseek_v3")
    empty = meta_model(model.config)
    assert count_flops(model, context_length=7) == count_flops(empty, context_length=7)


def test_projections_with_other_names_have_the_hidden_width() -> None:
    from_hidden = FlopCount(context_length=3, body=0, router=0, head=0, attention_scores=0)
    assert from_hidden.total == 0
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.out = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    assert attention_widths(model) == [(32, 32), (32, 32)]
