"""Tiny models and rows for the probes, built with the configurations of the installed transformers."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY_SIZE = 64
NUM_EXPERTS = 8
NUM_LAYERS = 2
# Ids below are padding, beginning, end and unknown.
_FIRST_TOKEN = 4

_SHARED: Mapping[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Sparse decoders by transformers' model type: what each calls its number of experts, and what else it needs
# to be small.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("num_local_experts", {}),
    "qwen2_moe": (
        "num_experts",
        {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("num_experts", {"moe_intermediate_size": 16, "head_dim": 16}),
    "olmoe": ("num_experts", {}),
    "granitemoe": ("num_local_experts", {}),
    "gpt_oss": (
        "num_local_experts",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
_ENCODER_DECODERS: Mapping[str, Mapping[str, Any]] = {
    "switch_transformers": {
        "d_kv": 8,
        "d_ff": 32,
        "num_heads": 4,
        "num_layers": NUM_LAYERS,
        "num_decoder_layers": NUM_LAYERS,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
    "nllb-moe": {
        "encoder_layers": NUM_LAYERS,
        "decoder_layers": NUM_LAYERS,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "decoder_start_token_id": 2,
    },
}


def tiny_config(family: str, **values: Any) -> Any:
    """Return the configuration of a tiny sparse decoder of a family; `values` replace ours."""
    key, own = FAMILIES[family]
    return CONFIG_MAPPING[family](**{**_SHARED, key: NUM_EXPERTS, **own, **values})


def tiny_decoder(family: str = "mixtral", **values: Any) -> PreTrainedModel:
    """Build a tiny sparse decoder, float32, in evaluation mode, always with the same weights."""
    return _seeded(AutoModelForCausalLM, tiny_config(family, **values))


def tiny_encoder_decoder(family: str, **values: Any) -> PreTrainedModel:
    """Build a tiny sparse encoder-decoder of transformers in the same way."""
    shared = {"vocab_size": VOCABULARY_SIZE, "d_model": 32, "num_experts": NUM_EXPERTS}
    given = {**shared, "pad_token_id": 0, "eos_token_id": 2, **_ENCODER_DECODERS[family], **values}
    return _seeded(AutoModelForSeq2SeqLM, CONFIG_MAPPING[family](**given))


def _seeded(auto_class: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return auto_class.from_config(copy.deepcopy(config)).eval()


def token_rows(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Return random token ids of shape (rows, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_FIRST_TOKEN, VOCABULARY_SIZE, (rows, length), generator=generator)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer for these models; trainers ask for one, whatever the rows hold."""
    words = {f"w{number}": number for number in range(VOCABULARY_SIZE)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
        unk_token="w3",
    )
