"""A dense FlanMoeT5 against transformers' T5, through memory and through files of every layout of the head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, T5ForConditionalGeneration

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.t5 import from_t5, load_t5, reasons_against_t5, to_t5
from flanmoe.testing.tiny_models import tiny_model

HEAD = "lm_head.weight"


def t5(**overrides: Any) -> Any:
    return tiny_model("t5", **{"num_layers": 3, "num_decoder_layers": 2, **overrides})


def logits(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(2, 128, (2, 12), generator=generator)
    mask = torch.ones_like(inputs)
    mask[1, -4:] = 0
    labels = torch.randint(2, 128, (2, 7), generator=generator)
    with torch.no_grad():
        return model(input_ids=inputs, attention_mask=mask, labels=labels).logits


def published(folder: Path, *, version: str) -> Tensor:
    """Write a checkpoint as the Hub has it and return its logits; FLAN-T5's head is a matrix of its own."""
    projection = "relu" if version == "1.0" else "gated-gelu"
    model = t5(feed_forward_proj=projection, tie_word_embeddings=version == "1.0")
    model.save_pretrained(folder)
    if version == "1.1":
        head = torch.randn(128, 32, generator=torch.Generator().manual_seed(1))
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, HEAD: head}, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        # Written by versions before 5, which had no other word for it.
        del settings["scale_decoder_outputs"]
        settings["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(settings))
        model.lm_head.weight = nn.Parameter(head)
    return logits(model)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_published_checkpoint_is_loaded_and_written_exactly(tmp_path: Path, version: str) -> None:
    expected = published(tmp_path / "hub", version=version)
    ours = load_t5(str(tmp_path / "hub"))
    tied = version == "1.0"
    assert ours.config.tied_head == ours.config.scale_decoder_outputs == tied
    assert (ours.lm_head.weight is ours.shared.weight) == tied
    assert torch.equal(logits(ours), expected)
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert isinstance(again, FlanMoeT5ForConditionalGeneration)
    assert torch.equal(logits(again), expected)
    native = to_t5(again)
    assert torch.equal(logits(native), expected)
    native.save_pretrained(tmp_path / "native")
    settings = json.loads((tmp_path / "native" / "config.json").read_text())
    assert settings["tie_word_embeddings"] == tied
    read = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "native").eval()
    assert isinstance(read, T5ForConditionalGeneration)
    assert torch.equal(logits(read), expected)
    assert load_file(tmp_path / "native" / "model.safetensors").keys() == (
        load_file(tmp_path / "hub" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("projection", ["relu", "gated-silu", "gelu_new"])
def test_every_head_is_written_exactly(
    tmp_path: Path, tied: bool, scaled: bool, projection: str
) -> None:
    torch.manual_seed(0)
    ours = FlanMoeT5ForConditionalGeneration(
        FlanMoeT5Config(
            vocab_size=128,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_heads=4,
            num_layers=2,
            feed_forward_proj=projection,
            tied_head=tied,
            scale_decoder_outputs=scaled,
        )
    ).eval()
    ours.generation_config.num_beams = 3
    to_t5(ours).save_pretrained(tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(theirs), logits(ours))
    assert theirs.generation_config.num_beams == 3
    back = load_t5(str(tmp_path))
    assert (back.config.tied_head, back.config.scale_decoder_outputs) == (tied, scaled)
    assert torch.equal(logits(back), logits(ours))


def test_weights_are_copies_in_their_dtype() -> None:
    native = t5().to(torch.bfloat16)
    ours = from_t5(native)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    kept = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    back = to_t5(ours)
    with torch.no_grad():
        for parameter in (*native.parameters(), *ours.parameters()):
            parameter.zero_()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in kept.items())


def test_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path)
    lost, found = "decoder.block.1.layer.0.layer_norm.weight", "encoder.final.bias"
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    tensors[found] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load_t5(str(tmp_path))
    assert f"1 missing (`{lost}`) and 1 foreign (`{found}`)" in str(error.value)


def test_the_unread_bias_of_old_checkpoints_is_no_foreign_tensor(tmp_path: Path) -> None:
    native = t5()
    native.save_pretrained(tmp_path)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors = load_file(tmp_path / "model.safetensors") | {name: torch.ones(32, 4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_t5(str(tmp_path))), logits(native))


def test_foreign_tensors_of_a_model_are_named() -> None:
    native = t5()
    native.decoder.adapter = nn.Linear(2, 2, bias=False)
    with pytest.raises(ModelError, match=r"1 foreign \(`decoder.adapter.weight`\)"):
        from_t5(native)
    ours = from_t5(t5())
    ours.encoder.adapter = nn.Linear(2, 2, bias=False)
    with pytest.raises(ModelError, match=r"1 foreign \(`encoder.adapter.weight`\)"):
        to_t5(ours)


def test_what_is_no_t5_is_refused(tmp_path: Path) -> None:
    tiny_model("switch_transformers").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"`t5` is needed, but .* `switch_transformers`"):
        load_t5(str(tmp_path))
    with pytest.raises(ConfigError, match="`feed_forward_proj`"):
        from_t5(t5(feed_forward_proj="gated-tanh"))


def test_sparse_layers_are_the_reason() -> None:
    values: dict[str, Any] = {"num_layers": 4, "num_decoder_layers": 2, "d_model": 16}
    assert reasons_against_t5(FlanMoeT5Config(**values)) == ()
    router = {"kind": "top_k.v1", "num_experts": 4}
    config = FlanMoeT5Config(**values, encoder_router=router, decoder_router=router)
    encoder, decoder = reasons_against_t5(config)
    assert "2 of the 4 layers of the encoder are sparse" in encoder
    assert "1 of the 2 layers of the decoder are sparse" in decoder
    small = FlanMoeT5Config(
        **values, vocab_size=9, d_ff=8, num_heads=2, d_kv=4, encoder_router=router
    )
    with pytest.raises(ModelError, match="2 of the 4 layers of the encoder"):
        to_t5(FlanMoeT5ForConditionalGeneration(small))
