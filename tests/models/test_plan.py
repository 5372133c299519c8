"""Parameter counts against hand formulas; a configuration counts as its model."""

import pytest

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.meta import meta_model
from flanmoe.models.plan import ParameterCount, count_parameters
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

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


@pytest.mark.parametrize("name", DENSE_NAMES + SPARSE_NAMES)
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
