"""Exporting: what is written loads in transformers alone and gives the same logits, or nothing is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from flanmoe.core.errors import ModelError, RunError
from flanmoe.evaluation.results import read_training_hashes, write_training_hashes
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.stages import export
from flanmoe.stages.export import as_native, export_folder, probe_for, probe_logits
from flanmoe.testing.tiny_models import tiny_model, tiny_text_tokenizer, tiny_tokenizer

ROUTER: dict[str, Any] = {
    "kind": "switch.v1",
    "num_experts": 4,
    "capacity": {"train": None, "evaluation": None},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "feed_forward_proj": "relu",
}


def flan_moe_t5(**values: Any) -> FlanMoeT5ForConditionalGeneration:
    torch.manual_seed(0)
    return FlanMoeT5ForConditionalGeneration(FlanMoeT5Config(**{**SHAPE, **values})).eval()


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    decodes = not model.config.is_encoder_decoder
    (tiny_tokenizer() if decodes else tiny_text_tokenizer()).save_pretrained(folder)
    write_training_hashes(folder, frozenset({"a hash"}))
    return str(folder)


def test_a_sparse_model_becomes_a_switch(tmp_path: Path) -> None:
    ours = flan_moe_t5(encoder_router=ROUTER, decoder_router=ROUTER)
    said = export_folder(saved(ours, tmp_path / "ours"), tmp_path / "out")
    assert said["format"] == "SwitchTransformersForConditionalGeneration"
    assert not said["was_native"]
    assert said["largest_logit_difference"] < 1e-4
    assert said["deviations"] == []
    written = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    assert type(written).__name__ == said["format"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    probe = probe_for(written, tokenizer)
    found, expected = probe_logits(written, probe), probe_logits(ours, probe)
    assert said["num_logits"] == found.numel() > 1000
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tokenizer("apples").input_ids == tiny_text_tokenizer()("apples").input_ids
    assert read_training_hashes(tmp_path / "out") == {"a hash"}
    kept = json.loads((tmp_path / "out" / "export.json").read_text())
    assert kept == {**said, "from": str(tmp_path / "ours")}


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model_becomes_a_t5(tmp_path: Path, tied: bool) -> None:
    ours = flan_moe_t5(feed_forward_proj="gated-gelu", tied_head=tied, scale_decoder_outputs=tied)
    said = export_folder(saved(ours, tmp_path / "ours"), tmp_path / "out")
    assert said["format"] == "T5ForConditionalGeneration"
    assert said["largest_logit_difference"] == 0
    written = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    probe = probe_for(ours, tiny_text_tokenizer())
    assert torch.equal(probe_logits(written, probe), probe_logits(ours, probe))


@pytest.mark.parametrize("name", ["mixtral", "llama", "t5", "switch_transformers"])
def test_a_native_model_is_written_as_it_is(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    native = tiny_model(name)
    said = export_folder(saved(native, tmp_path / "native"), tmp_path / "out")
    assert said["was_native"]
    assert said["format"] == type(native).__name__
    assert said["largest_logit_difference"] < 1e-4
    assert "and so native already: it was written as it is" in capfd.readouterr().err
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("native", "out")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    auto_class = AutoModelForCausalLM if name in ("mixtral", "llama") else AutoModelForSeq2SeqLM
    assert type(auto_class.from_pretrained(tmp_path / "out")) is type(native)


def test_the_dtype_stays(tmp_path: Path) -> None:
    ours = flan_moe_t5(encoder_router=ROUTER, decoder_router=ROUTER)
    for name, parameter in ours.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    export_folder(saved(ours, tmp_path / "ours"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
    router = "encoder.block.1.layer.1.mlp.router"
    assert torch.equal(
        tensors[f"{router}.classifier.weight"], ours.get_parameter(f"{router}.weight")
    )


def test_training_that_differs_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    limited = {**ROUTER, "capacity": {"train": 1.25}}
    ours = flan_moe_t5(encoder_router=limited, decoder_router=ROUTER)
    said = export_folder(saved(ours, tmp_path / "ours"), tmp_path / "out")
    (deviation,) = said["deviations"]
    assert deviation.startswith("encoder: in training")
    assert deviation in capfd.readouterr().err


def test_every_reason_is_told_before_weights_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    gshard = {"kind": "gshard.v1", "num_experts": 4}
    config = FlanMoeT5Config(
        **{**SHAPE, "feed_forward_proj": "gated-gelu"}, encoder_router=gshard, decoder_router=ROUTER
    )
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match="2 things have no counterpart") as error:
        export_folder(str(folder), tmp_path / "out")
    assert "(1) `feed_forward_proj` is `gated-gelu`" in str(error.value)
    assert "(2) `encoder_router.kind` is `gshard.v1`" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_was_written_wrong_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bent(model: PreTrainedModel) -> tuple[PreTrainedModel, tuple[str, ...]]:
        native, deviations = as_native(model)
        with torch.no_grad():
            native.get_parameter("decoder.final_layer_norm.weight")[3] += 0.1
        return native, deviations

    monkeypatch.setattr(export, "as_native", bent)
    ours = flan_moe_t5(encoder_router=ROUTER, decoder_router=ROUTER)
    folder = saved(ours, tmp_path / "ours")
    with pytest.raises(ModelError, match="after reloading they differ by up to"):
        export_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_without_a_native_form_is_refused() -> None:
    class Other(torch.nn.Module):
        pass

    with pytest.raises(ModelError, match="there is none for Other"):
        as_native(Other())  # pyright: ignore[reportArgumentType]


def test_a_folder_that_holds_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(RunError, match="must be empty or new"):
        export_folder(str(tmp_path), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
