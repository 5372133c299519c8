"""Dropout for the time of training: everywhere, and back afterwards."""

import pytest
import torch
from torch import nn

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.dropout import dropout
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.testing.tiny_models import tiny_model


def t5() -> FlanMoeT5ForConditionalGeneration:
    torch.manual_seed(0)
    router = {"kind": "top_k.v1", "num_experts": 4}
    shape = {
        "vocab_size": 31,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
    }
    config = FlanMoeT5Config(**shape, encoder_router=router, dropout_rate=0.0, expert_dropout=0.0)
    return FlanMoeT5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["flan_moe_t5", "llama"])
def test_passes_differ_inside_and_nowhere_else(name: str) -> None:
    model = t5() if name == "flan_moe_t5" else tiny_model("llama")
    model.train()
    tokens = torch.randint(2, 30, (2, 7))
    batch = {"input_ids": tokens, "labels": tokens}

    def differ() -> bool:
        first, second = (model(**batch).logits for _ in range(2))
        return not torch.equal(first, second)

    assert not differ()
    with dropout(model, 0.3):
        assert differ()
        model.eval()
        assert not differ()
        model.train()
    assert not differ()
    with dropout(model, None):
        assert not differ()


def test_every_rate_is_set_and_comes_back() -> None:
    model = t5()
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    layers[0].p = 0.125
    attention = model.encoder.block[0].layer[0].SelfAttention
    with dropout(model, 0.3):
        assert {layer.p for layer in layers} == {0.3}
        assert attention.dropout == 0.3
    assert {layer.p for layer in layers} == {0.0, 0.125}
    assert attention.dropout == 0.0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 0 and below 1"), dropout(t5(), 1.0):
        pass
    with pytest.raises(ModelError, match="but Linear has neither"), dropout(nn.Linear(2, 2), 0.1):
        pass
