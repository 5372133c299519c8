"""Models on the meta device have every shape, no memory, and leave their configuration alone."""

import pytest
from transformers import AutoModel

from flanmoe.core.errors import ModelError
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.meta import as_model, embedding_weight, head_weight, meta_model
from flanmoe.testing.tiny_models import (
    DENSE_NAMES,
    ENCODER_DECODER_NAMES,
    SPARSE_NAMES,
    tiny_model,
)


@pytest.mark.parametrize("name", DENSE_NAMES + SPARSE_NAMES + ENCODER_DECODER_NAMES)
def test_shapes_are_those_of_the_real_model(name: str) -> None:
    model = tiny_model(name)
    before = model.config.to_dict()
    empty = meta_model(model.config)
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert model.config.to_dict() == before


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_parameter(tied: bool) -> None:
    model = meta_model(tiny_model("llama", tie_word_embeddings=tied).config)
    assert (head_weight(model) is embedding_weight(model)) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder_decoder_of_ours(tied: bool) -> None:
    config = FlanMoeT5Config(
        vocab_size=128,
        d_model=32,
        num_layers=2,
        encoder_router={"kind": "expert_choice", "num_experts": 4},
        tied_head=tied,
    )
    empty = meta_model(config)
    real = FlanMoeT5ForConditionalGeneration(config)
    assert type(empty) is type(real)
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert (head_weight(empty) is embedding_weight(empty)) == tied
    for side in ("encoder", "decoder"):
        table = empty.get_submodule(f"{side}.embed_tokens").get_parameter("weight")
        assert table is embedding_weight(empty)


def test_a_model_is_taken_as_it_is() -> None:
    model = tiny_model("llama")
    assert as_model(model) is model


def test_a_model_without_a_head_is_refused() -> None:
    headless = AutoModel.from_config(tiny_model("llama").config)
    with pytest.raises(ModelError, match="must have a head over its vocabulary, but LlamaModel"):
        head_weight(headless)
