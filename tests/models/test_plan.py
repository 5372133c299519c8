"""Parameter counts against hand formulas; a configuration counts as its model."""

from fractions import Fraction

import pytest

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.expert_visits import visits_per_token
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config
from flanmoe.models.meta import meta_model
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.testing.tiny_models import (
    DENSE_NAMES,
    ENCODER_DECODER_NAMES,
    SPARSE_NAMES,
    tiny_model,
)

_EMBEDDING = 128 * 32
_ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32
_NORMS = 2 * 32


def _count(name: str, **options) -> ParameterCount:
    return count_parameters(tiny_model(name, **options).config)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_by_hand(tied: bool) -> None:
    body = 2 * (_ATTENTION + 3 * 32 * 64 + _NORMS) + 32
    total = (1 if tied else 2) * _EMBEDDING + body
    found = _count("llama", tie_word_embeddings=tied)
    assert found == ParameterCount(total=total, active=total, trainable=total)


def test_mixtral_by_hand() -> None:
    outside = 2 * _EMBEDDING + 2 * (_ATTENTION + _NORMS + 8 * 32) + 32
    expert = 3 * 32 * 64
    found = _count("mixtral")
    assert found.total == outside + 2 * 8 * expert
    assert found.active == outside + 2 * 2 * expert


def test_qwen2_moe_by_hand_with_its_shared_expert_active() -> None:
    biases = 32 + 2 * 16
    shared = 3 * 32 * 40 + 32
    outside = 2 * _EMBEDDING + 2 * (_ATTENTION + biases + _NORMS + 8 * 32 + shared) + 32
    expert = 3 * 32 * 24
    found = _count("qwen2_moe")
    assert found.total == outside + 2 * 8 * expert
    assert found.active == outside + 2 * 2 * expert


def test_deepseek_v3_by_hand_with_its_dense_layer_and_shared_experts_active() -> None:
    queries = 32 * 24 + 24 + 24 * 4 * 16
    keys_and_values = 32 * (16 + 8) + 16 + 16 * 4 * (8 + 8)
    attention = queries + keys_and_values + 4 * 8 * 32
    expert = 3 * 32 * 24
    dense_layer = 3 * 32 * 64
    sparse_layer = 8 * 32 + 2 * expert
    outside = 2 * _EMBEDDING + 3 * (attention + _NORMS) + 32 + dense_layer + 2 * sparse_layer
    found = _count("deepseek_v3")
    assert found.total == outside + 2 * 8 * expert
    assert found.active == outside + 2 * 2 * expert


def test_gpt_oss_expert_biases_follow_their_experts() -> None:
    expert = 3 * 32 * 64 + 2 * 64 + 32
    found = _count("gpt_oss")
    assert found.total - found.active == 2 * 6 * expert


@pytest.mark.parametrize("name", DENSE_NAMES + SPARSE_NAMES + ENCODER_DECODER_NAMES)
def test_a_configuration_counts_as_its_model(name: str) -> None:
    model = tiny_model(name)
    found = count_parameters(model)
    assert found == count_parameters(model.config) == count_parameters(meta_model(model.config))
    assert found.total == sum(parameter.numel() for parameter in model.parameters())


def test_frozen_parameters_are_not_trainable() -> None:
    model = tiny_model("mixtral")
    for block in moe_blocks(model):
        block.experts.requires_grad_(False)
    found = count_parameters(model)
    assert found.total - found.trainable == 2 * 8 * 3 * 32 * 64


def _t5(**options) -> FlanMoeT5Config:
    shape = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    return FlanMoeT5Config(**{**shape, "num_layers": 2, **options})


# Each router with the experts that a token visits on average.
_VISITS = [
    ({"kind": "top_k", "num_experts": 8, "top_k": 3}, Fraction(3)),
    ({"kind": "switch", "num_experts": 8}, Fraction(1)),
    ({"kind": "gshard", "num_experts": 8}, Fraction(2)),
    ({"kind": "st_moe", "num_experts": 8}, Fraction(2)),
    ({"kind": "expert_choice", "num_experts": 8}, Fraction(2)),
    ({"kind": "expert_choice", "num_experts": 8, "capacity_factor": 1.1}, Fraction(11, 10)),
    ({"kind": "expert_choice", "num_experts": 8, "capacity_factor": 99.0}, Fraction(8)),
]


@pytest.mark.parametrize(("router", "visits"), _VISITS)
def test_a_sparse_t5_by_hand(router: dict, visits: Fraction) -> None:
    attention = 4 * 32 * 32 + 32
    expert = 3 * 32 * 64
    dense = expert + 32
    head, biases, norms = _EMBEDDING, 2 * 32 * 4, 2 * 32
    outside = _EMBEDDING + head + 6 * attention + 3 * dense + 8 * 32 + 32 + biases + norms
    config = _t5(encoder_router=router)
    found = count_parameters(config)
    assert found.total == found.trainable == outside + 8 * expert
    assert found.active == outside + round(visits * expert)
    (block,) = moe_blocks(meta_model(config))
    assert visits_per_token(block) == visits


def test_an_extra_dense_ffn_is_active() -> None:
    router = {"kind": "st_moe", "num_experts": 8}
    plain = count_parameters(_t5(decoder_router=router))
    extra = count_parameters(_t5(decoder_router=router, extra_dense_ffn=True))
    assert extra.active - plain.active == extra.total - plain.total == 3 * 32 * 64 + 32


def test_transformers_switch_counts_as_ours() -> None:
    ours = _t5(
        encoder_router={"kind": "switch", "num_experts": 8},
        decoder_router={"kind": "switch", "num_experts": 8},
        feed_forward_proj="relu",
        tied_head=True,
    )
    found = count_parameters(ours)
    assert found == _count("switch_transformers")
    assert found.total - found.active == 2 * 7 * 2 * 32 * 64
