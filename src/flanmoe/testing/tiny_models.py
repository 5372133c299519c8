"""Tiny random models of every architecture that flanmoe reads, and a tokenizer that fits them.

They need no files and build in milliseconds. Every parameter holds random values, norms and biases
too, so that a test which copies weights notices what was left behind.
"""

import string
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.models.router_precision import run_routers_outside_autocast

VOCABULARY_SIZE = 128

_SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unknown|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SHARED: Mapping[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Far above the usual 0.02: with so few channels the routers would otherwise hardly tell
    # tokens apart.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 256},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 24},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_mtp_layers": 0,
    },
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True},
}

_ENCODER_DECODERS: Mapping[str, Mapping[str, Any]] = {
    "t5": {
        "d_kv": 8,
        "d_ff": 64,
        "num_heads": 4,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
    },
    "switch_transformers": {
        "d_kv": 8,
        "d_ff": 64,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 8,
    },
    "bart": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 512,
        "init_std": 0.2,
        "bos_token_id": None,
        "forced_eos_token_id": None,
    },
}
# As in T5, the decoder starts with the padding token.
_SHARED_BY_ENCODER_DECODERS: Mapping[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

ENCODER_DECODER_NAMES = tuple(_ENCODER_DECODERS)
DENSE_NAMES = ("llama", "mistral", "qwen2", "qwen3")
SPARSE_NAMES = tuple(name for name in _MODELS if name not in DENSE_NAMES)


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a tiny random language model in evaluation mode, float32, on the CPU.

    Sparse causal models run flanmoe's expert compute and float32 routers, as loaded models do.

    Args:
        name: transformers' model type: a causal model of `DENSE_NAMES` or `SPARSE_NAMES`, or one of
            `ENCODER_DECODER_NAMES`.
        seed: seed of the weights; the global generator is left as it was.
        overrides: configuration values that replace the tiny ones.

    Raises:
        KeyError: if the name is not one of them.
    """
    settings = {name: {**_SHARED, **own} for name, own in _MODELS.items()} | {
        name: {**_SHARED_BY_ENCODER_DECODERS, **own} for name, own in _ENCODER_DECODERS.items()
    }
    if name not in settings:
        raise KeyError(
            f"No tiny model is called `{name}`.{nearest_name_hint(name, settings)} "
            f"There are {listing(settings)}."
        )
    config = CONFIG_MAPPING[name](**{**settings[name], **overrides})
    build = AutoModelForSeq2SeqLM if name in ENCODER_DECODER_NAMES else AutoModelForCausalLM
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = build.from_config(config)
        _disturb_vectors(model)
    if name in SPARSE_NAMES:
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        run_routers_outside_autocast(model)
    return model.eval()


def _disturb_vectors(model: nn.Module) -> None:
    """Move norms away from 1 and biases away from 0: a copy that forgets one then shows."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.ndim == 1 or name.endswith("bias")):
                tensor.add_(torch.randn_like(tensor), alpha=0.1)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a fast tokenizer with one token per printable ASCII character (102 tokens).

    Anything else becomes `<|unknown|>`. Ids 0, 1 and 2 are padding, start of turn (also the
    beginning of a text) and end of turn (also the end of a text), as the tiny models'
    configurations say. Nothing is added around a text; the chat template wraps turns as
    `<|im_start|>role ... <|im_end|>`.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_of_characters(_SPECIAL_TOKENS, unknown="<|unknown|>"),
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|unknown|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def tiny_text_tokenizer() -> PreTrainedTokenizerFast:
    """Build a fast tokenizer for tiny encoder-decoders: one token per printable ASCII character.

    As T5's it puts `</s>` behind every text, knows no beginning of a text and no chat template, and has the
    ids 0, 1 and 2 for `<pad>`, `</s>` and `<unk>`.
    """
    tokenizer = _of_characters(("<pad>", "</s>", "<unk>"), unknown="<unk>")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _of_characters(special: tuple[str, ...], *, unknown: str) -> Tokenizer:
    characters = sorted(string.printable.rstrip("\x0b\x0c"))
    tokens = [*special, *characters]
    tokenizer = Tokenizer(
        BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token=unknown)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
