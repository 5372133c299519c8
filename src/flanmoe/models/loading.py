"""Loading and saving: one way in and out for every model, with every failure said in one sentence.

A reference is `smollm2-135m-instruct` (see `embedded`), a folder, or a hub id.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.embedded import EMBEDDED_NAME, embedded_model_path
from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config
from flanmoe.models.meta import auto_class
from flanmoe.models.router_precision import run_routers_outside_autocast

# A folder without it is no model, so whoever saves one writes it last.
MODEL_MARKER = "config.json"
# What transformers and safetensors raise for files that are missing, torn, foreign or unreachable.
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def resolve_reference(reference: str) -> str:
    """Return a folder or a hub id for a reference; the embedded model becomes its cache folder.

    Raises:
        ModelError: if the reference reads like a folder that is not there, or is a folder
            without a model.
    """
    if reference == EMBEDDED_NAME:
        return str(embedded_model_path())
    path = Path(reference)
    if path.is_dir():
        if not (path / MODEL_MARKER).exists():
            raise ModelError(
                f"A model folder must hold a {MODEL_MARKER}, but {reference} has none. Name a folder "
                "that `save_pretrained` or flanmoe wrote."
            )
        return reference
    reads_like_a_path = path.is_absolute() or reference.startswith(".") or reference.count("/") > 1
    if reads_like_a_path or path.is_file():
        raise ModelError(
            f"The model folder {reference} {'is a file' if path.is_file() else 'does not exist'}. "
            f"Name a folder, a hub id, or `{EMBEDDED_NAME}`."
        )
    return reference


def load_config(reference: str) -> PreTrainedConfig:
    """Read the configuration of a causal language model or an encoder-decoder.

    Raises:
        ModelError: if it cannot be read, or is of neither of the two.
    """
    place = resolve_reference(reference)
    with loading_errors(reference, "configuration"):
        config = AutoConfig.from_pretrained(place)
    if not _writes_answers(config):
        _check_causal(reference, config)
    return config


def load_model(reference: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal language model or an encoder-decoder on the CPU, in evaluation mode.

    Experts run flanmoe's compute, and routers stay in float32 under autocast; where experts are not fused, as
    in transformers' Switch, they run as transformers runs them.

    Raises:
        ModelError: if it cannot be loaded, is neither of the two, or its files lack weights.
    """
    config = load_config(reference)
    written_in = config.dtype
    with loading_errors(reference, "weights"):
        loaded: Any = auto_class(config).from_pretrained(
            resolve_reference(reference), config=config, dtype=dtype, output_loading_info=True
        )
    model, report = loaded
    # transformers only warns, and goes on with random values.
    if lacking := sorted({*report["missing_keys"], *_names(report["mismatched_keys"])}):
        raise ModelError(
            f"The model {reference} must hold every weight of {type(model).__name__}, but "
            f"{len(lacking)} are missing or of another shape, the first {lacking[0]}. Get a "
            "complete checkpoint."
        )
    # Of transformers' classes it ignores what older versions wrote; ours has no older versions.
    foreign = report["unexpected_keys"] if config.model_type == FlanMoeT5Config.model_type else ()
    if foreign:
        raise ModelError(
            f"The model {reference} must hold the weights of {type(model).__name__} and no others, but holds "
            f"{listing(sorted(foreign))}. Get a checkpoint that belongs to its configuration."
        )
    if moe_blocks(model):
        if written_in == dtype:
            _let_go_of_the_file(model)
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        run_routers_outside_autocast(model)
    return model.eval()


def _let_go_of_the_file(model: PreTrainedModel) -> None:
    """Copy weights that look into the checkpoint's file, so that it need not stay in memory.

    transformers maps the file, uses it in place where no other dtype is asked for, and copies
    experts out of it that have to be put side by side. The other weights would keep the whole file
    mapped and, once read, resident beside those copies.
    """
    for weight in model.parameters():
        weight.data = weight.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # A loaded buffer is a view, and holds what it is a view of.
            setattr(module, name, buffer.clone())


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Raises:
        ModelError: if it cannot be loaded, or has no end-of-text token.
    """
    place = resolve_reference(reference)
    with loading_errors(reference, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"A tokenizer needs an end-of-text token, but that of {reference} has none. Set "
            "`eos_token` in its tokenizer_config.json."
        )
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint that `load_model` and transformers' AutoModel read, with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _writes_answers(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is that of an encoder-decoder with a head for text."""
    if not config.is_encoder_decoder or type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return False
    found: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
    known = {kind.__name__ for kind in (found if isinstance(found, tuple) else (found,))}
    return not config.architectures or bool(known.intersection(config.architectures))


def _check_causal(reference: str, config: PreTrainedConfig) -> None:
    # Encoders such as BERT have a causal class too; their configuration says whether it is meant.
    decodes = getattr(config, "is_decoder", True) and not config.is_encoder_decoder
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    written = config.architectures or []
    if (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and decodes
        and (not written or known.intersection(written))
    ):
        return
    found = written[0] if written else f"a model of type `{config.model_type}`"
    raise ModelError(
        "flanmoe works with causal language models and with encoder-decoders that write text, but "
        f"{reference} is {found}. Choose a decoder-only model (Llama, Mistral, Qwen, Mixtral, OLMoE, "
        "...) or an encoder-decoder (T5, Switch, BART, ...)."
    )


def _names(mismatched: set[tuple] | list[tuple]) -> set[str]:
    return {entry[0] for entry in mismatched}


@contextmanager
def loading_errors(reference: str, part: str) -> Iterator[None]:
    """Say in one sentence why a part of a model (`weights`, `tokenizer`) cannot be read.

    Raises:
        ModelError: for whatever transformers and safetensors raise inside the `with` block.
    """
    try:
        yield
    except _LOADING_ERRORS as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ModelError(
            f"The {part} of the model {reference} cannot be read: {reason}. Name a folder, a hub "
            "id that this machine can reach, or "
            f"`{EMBEDDED_NAME}`.{nearest_name_hint(reference, [EMBEDDED_NAME])}"
        ) from error
