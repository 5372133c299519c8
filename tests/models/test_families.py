"""What is carried over from a dense configuration, and what is refused in words."""

import dataclasses

import pytest
from transformers import BertConfig, GPT2Config, MixtralConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flanmoe.core.errors import ModelError
from flanmoe.models.families import FAMILIES, SparseShape, family_of
from flanmoe.testing.tiny_models import DENSE_NAMES, tiny_model

_SHAPE = SparseShape(num_experts=4, top_k=2, expert_width=32)

# Keys of a dense class that its sparse class does not declare, and why that loses nothing.
_ACCOUNTED = {
    "llama": {"pretraining_tp", "attention_bias", "mlp_bias"},  # no effect; refused unless False
    "mistral": set(),
    "qwen2": set(),
    "qwen3": {"head_dim", "layer_types", "max_window_layers"},  # read anyway; checked; folded in
}


def _sparse(config: PreTrainedConfig, shape: SparseShape = _SHAPE) -> PreTrainedConfig:
    return family_of(config).sparse_config(config, shape)


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_every_declared_option_is_carried_or_accounted_for(name: str) -> None:
    family = FAMILIES[name]
    dense = {field.name for field in dataclasses.fields(CONFIG_MAPPING[name])}
    sparse = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.sparse_type])}
    assert dense - sparse == _ACCOUNTED[name]


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_values_are_carried_over(name: str) -> None:
    unusual = {
        "rms_norm_eps": 3e-5,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
        "tie_word_embeddings": True,
        "head_dim": 24,
        "hidden_act": "gelu",
        "max_position_embeddings": 77,
        "attention_dropout": 0.125,
        "bos_token_id": 5,
        "eos_token_id": [6, 7],
        "pad_token_id": 8,
        "initializer_range": 0.5,
    }
    config = tiny_model(name, **unusual).config
    sparse = _sparse(config)
    for key, value in unusual.items():
        assert getattr(sparse, key) == value, key
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(sparse, key) == getattr(config, key), key
    assert sparse.num_key_value_heads == 2


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_the_auxiliary_loss_of_transformers_is_off(name: str) -> None:
    sparse = _sparse(tiny_model(name).config)
    assert sparse.output_router_logits is False
    assert sparse.router_aux_loss_coef == 0.0


def test_the_window_of_mistral_is_carried_and_llama_has_none() -> None:
    assert _sparse(tiny_model("mistral", sliding_window=33).config).sliding_window == 33
    assert _sparse(tiny_model("llama").config).sliding_window is None


def test_qwen2_keeps_its_own_choice_of_layers_with_a_window() -> None:
    config = tiny_model(
        "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ).config
    sparse = _sparse(config)
    # The sparse class would choose other layers from the same three options.
    assert sparse.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert sparse.sliding_window == 8


def test_qwen3_windows_are_all_or_nothing() -> None:
    unused = tiny_model("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=9)
    assert _sparse(unused.config).sliding_window is None
    everywhere = tiny_model("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert _sparse(everywhere.config).sliding_window == 8
    mixed = tiny_model("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ModelError) as caught:
        _sparse(mixed.config)
    assert str(caught.value) == (
        "To become a qwen3_moe model, all layers of a qwen3 model must attend alike, but its "
        "`layer_types` mix `full_attention`, `sliding_attention`: the sparse class has one window "
        "for all layers. Choose another base model."
    )


@pytest.mark.parametrize("option", ["attention_bias", "mlp_bias"])
def test_biases_of_llama_are_refused(option: str) -> None:
    with pytest.raises(ModelError) as caught:
        _sparse(tiny_model("llama", **{option: True}).config)
    assert str(caught.value) == (
        f"To become a mixtral model, a llama model must have `{option}` = False, but it is True: "
        "the sparse class has no such biases, so they would be lost. Choose another base model."
    )


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_mixtral_cannot_leave_layers_dense(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        _sparse(tiny_model(name).config, dataclasses.replace(_SHAPE, every=2))
    assert str(caught.value) == (
        f"`every` must be 1 for a {name} model, but is 2: the native class mixtral makes every "
        "layer sparse. Use `every: 1`, or a base model of type `qwen2`, `qwen3`."
    )


def test_every_beyond_the_last_layer() -> None:
    with pytest.raises(ModelError, match=r"at most the number of layers \(2\), but is 3"):
        _sparse(tiny_model("qwen3").config, dataclasses.replace(_SHAPE, every=3))


def test_unknown_types_are_named_with_the_known_ones() -> None:
    with pytest.raises(ModelError) as caught:
        family_of(GPT2Config())
    assert str(caught.value) == (
        "The base of upcycling must be a dense model of type `llama`, `mistral`, `qwen2`, `qwen3`, "
        "but its type is `gpt2`."
    )
    with pytest.raises(ModelError, match="its type is `bert`"):
        family_of(BertConfig())
    with pytest.raises(ModelError, match=r"`mixtral`\. It is sparse already; tune it"):
        family_of(MixtralConfig())


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_sites_are_the_models_own_matrices(name: str) -> None:
    model = tiny_model(name)
    sites = family_of(model).sites(model)
    assert [site.layer for site in sites] == [0, 1]
    own = model.model.layers[1].mlp
    assert sites[1].gate.data_ptr() == own.gate_proj.weight.data_ptr()
    assert sites[1].up.data_ptr() == own.up_proj.weight.data_ptr()
    assert sites[1].down.data_ptr() == own.down_proj.weight.data_ptr()
