"""Loading and saving: everything comes back to the bit, every failure is one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    PreTrainedConfig,
    SwitchTransformersConfig,
    T5Config,
    T5EncoderModel,
)

from flanmoe.core.errors import ModelError
from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config
from flanmoe.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    resolve_reference,
    save_model,
)
from flanmoe.testing.tiny_models import (
    DENSE_NAMES,
    ENCODER_DECODER_NAMES,
    SPARSE_NAMES,
    tiny_model,
    tiny_text_tokenizer,
    tiny_tokenizer,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    save_model(tiny_model("llama"), tiny_tokenizer(), folder)
    return folder


def _tokens() -> torch.Tensor:
    return torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DENSE_NAMES + SPARSE_NAMES)
def test_a_model_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    save_model(model, tiny_tokenizer(), tmp_path)
    loaded = load_model(str(tmp_path))
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with torch.no_grad():
        assert torch.equal(loaded(_tokens()).logits, model(_tokens()).logits)
    assert not loaded.training
    uses_ours = loaded.config._experts_implementation == EXPERTS_IMPLEMENTATION
    assert uses_ours == (name in SPARSE_NAMES)


@pytest.mark.parametrize("name", ENCODER_DECODER_NAMES)
def test_an_encoder_decoder_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    save_model(model, tiny_text_tokenizer(), tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    read = {"input_ids": _tokens(), "decoder_input_ids": _tokens()[:, :5]}
    with torch.no_grad():
        # Weights lie in the file at other addresses than in memory, and sums over them end differently.
        assert torch.allclose(loaded(**read).logits, model(**read).logits, atol=1e-5)
    assert not loaded.training
    assert load_tokenizer(str(tmp_path))("ab")["input_ids"][-1] == loaded.config.eos_token_id


def test_an_encoder_decoder_without_a_weight_is_refused(tmp_path: Path) -> None:
    save_model(tiny_model("t5"), tiny_text_tokenizer(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.block.1.layer.1.EncDecAttention.k.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path))
    assert "T5ForConditionalGeneration, but 1 are missing" in str(caught.value)
    assert "decoder.block.1.layer.1.EncDecAttention.k.weight" in str(caught.value)


def test_half_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = tiny_model("t5").config
    assert isinstance(config, T5Config)
    T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is T5EncoderModel\."):
        load_model(str(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists its maps")
@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_a_sparse_model_does_not_keep_its_file_in_memory(name: str, tmp_path: Path) -> None:
    """Experts that are put side by side would stand in memory twice."""
    save_model(tiny_model(name), tiny_tokenizer(), tmp_path)
    loaded = load_model(str(tmp_path))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert loaded.num_parameters() > 0


def test_the_dtype_is_the_one_asked_for(saved: Path) -> None:
    assert load_model(str(saved)).dtype == torch.float32
    assert load_model(str(saved), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_tokenizer_comes_back(saved: Path) -> None:
    tokenizer = load_tokenizer(str(saved))
    text = "Is 3 < 4?\nYes."
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_no_place_of_this_machine_gets_into_a_checkpoint(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    save_model(load_model(str(saved)), load_tokenizer(str(saved)), again)
    for path in again.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./nowhere", "The model folder ./nowhere does not exist. Name a folder, a hub id, or "),
        ("/no/such/model", "The model folder /no/such/model does not exist."),
        ("a/b/c", "The model folder a/b/c does not exist."),
    ],
)
def test_folders_that_are_not_there(reference: str, message: str) -> None:
    for load in (resolve_reference, load_config, load_model, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load(reference)
        assert str(caught.value).startswith(message)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("x")
    with pytest.raises(ModelError, match=r"is a file\. Name a folder, a hub id, or "):
        load_model(str(path))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path))
    assert str(caught.value) == (
        f"A model folder must hold a config.json, but {tmp_path} has none. Name a folder that "
        "`save_pretrained` or flanmoe wrote."
    )


def test_a_hub_id_that_cannot_be_reached() -> None:
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load("nobody/nothing")
        message = str(caught.value)
        assert "of the model nobody/nothing cannot be read: " in message
        assert message.endswith("a hub id that this machine can reach, or `smollm2-135m-instruct`.")
        assert "\n" not in message


def test_the_embedded_name_misspelt() -> None:
    with pytest.raises(ModelError, match=r"Did you mean `smollm2-135m-instruct`\?$"):
        load_model("smollm2-135-instruct")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (T5Config(architectures=["T5EncoderModel"]), "T5EncoderModel"),
        (
            BartConfig(architectures=["BartForSequenceClassification"]),
            "BartForSequenceClassification",
        ),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (BertConfig(), "a model of type `bert`"),
    ],
)
def test_models_that_do_not_write(config, found: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_config(str(tmp_path))
    assert str(caught.value) == (
        "flanmoe works with causal language models and with encoder-decoders that write text, but "
        f"{tmp_path} is {found}. Choose a decoder-only model (Llama, Mistral, Qwen, Mixtral, OLMoE, ...) or an "
        "encoder-decoder (T5, Switch, BART, ...)."
    )


@pytest.mark.parametrize(
    "config",
    [
        T5Config(),
        T5Config(architectures=["T5ForConditionalGeneration"]),
        SwitchTransformersConfig(architectures=["SwitchTransformersForConditionalGeneration"]),
        FlanMoeT5Config(architectures=["FlanMoeT5ForConditionalGeneration"]),
    ],
)
def test_the_configuration_of_an_encoder_decoder_is_read(
    config: PreTrainedConfig, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    found = load_config(str(tmp_path))
    assert type(found) is type(config)
    assert found.is_encoder_decoder


def test_a_real_encoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is BertForMaskedLM"):
        load_model(str(tmp_path))


def test_a_missing_weight_is_an_error_and_not_a_random_one(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(str(saved))
    assert str(caught.value) == (
        f"The model {saved} must hold every weight of LlamaForCausalLM, but 1 are missing or of "
        "another shape, the first model.layers.1.mlp.up_proj.weight. Get a complete checkpoint."
    )


def test_a_weight_of_another_shape(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ModelError) as caught:
        load_model(str(saved))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 20, 2000])
def test_torn_weights(saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ModelError, match=r"^The weights of the model .* cannot be read: "
    ) as caught:
        load_model(str(saved))
    assert "\n" not in str(caught.value)


def test_a_torn_configuration(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(ModelError, match=r"^The configuration of the model .* cannot be read: "):
        load_model(str(saved))


def test_a_configuration_of_an_unknown_type(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "quantum"}')
    with pytest.raises(ModelError, match=r"cannot be read: .*quantum"):
        load_config(str(saved))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^The tokenizer of the model .* cannot be read: "):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end(saved: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(saved)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(saved))
    assert str(caught.value) == (
        f"A tokenizer needs an end-of-text token, but that of {saved} has none. Set `eos_token` in "
        "its tokenizer_config.json."
    )
