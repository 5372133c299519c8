"""The memory estimate against what autograd saves, and against the peak of a real training step."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from flanmoe.core.seeds import SeedTree
from flanmoe.models.activations import saved_bytes_per_token
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.kept_activation import kept_activation
from flanmoe.models.memory import RUNTIME_BYTES, estimate_memory
from flanmoe.models.precision import Precision
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.testing.tiny_models import tiny_model

_LENGTH = 256
_WIDER = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8}


def _saved_by_autograd(model: PreTrainedModel, precision: Precision) -> int:
    """Return the bytes of every tensor that one packed forward pass saves, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {parameter.shape for parameter in model.parameters() if parameter.ndim > 1}
    sizes |= {s[1:] for s in sizes if len(s) == 3}
    sizes |= {s[::-1] for s in sizes}
    saved: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_weight = storage.data_ptr() in weights or tensor.shape in sizes
        if not is_weight:
            # The tensor is held, so that its address is not given to another.
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(8, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(100), torch.arange(_LENGTH - 100)])[None]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        model.model(tokens, position_ids=positions, use_cache=False)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen2_moe", "olmoe"])
def test_activations_are_what_autograd_saves(name: str, precision: Precision) -> None:
    model = tiny_model(name, **_WIDER, num_hidden_layers=4).train()
    estimate = _LENGTH * saved_bytes_per_token(model, precision, length=_LENGTH)
    assert estimate == pytest.approx(_saved_by_autograd(model, precision), rel=0.1)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
def test_kept_activations_of_experts_are_what_autograd_saves_more(
    name: str, precision: Precision
) -> None:
    model = tiny_model(name, **_WIDER, num_hidden_layers=4).train()
    estimate = _LENGTH * saved_bytes_per_token(model, precision, length=_LENGTH)
    saved = _saved_by_autograd(model, precision)
    with kept_activation(model, True):
        grown = _LENGTH * saved_bytes_per_token(model, precision, length=_LENGTH) - estimate
        assert grown == _saved_by_autograd(model, precision) - saved
    block, bytes_each = moe_blocks(model)[0], 2 if precision == "bfloat16" else 4
    assert grown == 4 * _LENGTH * block.top_k * block.expert_width * bytes_each


def _peak_of_a_micro_batch(model: PreTrainedModel, precision: Precision) -> int:
    """Return the most bytes that tensors of one forward and backward pass hold at a time.

    Gradients are there before, as from the second micro-batch of a step on.
    """
    tokens = torch.randint(8, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(100), torch.arange(_LENGTH - 100)])[None]

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(tokens, position_ids=positions, use_cache=False).logits[0].float()
        torch.nn.functional.cross_entropy(logits, tokens[0]).backward()

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events: list[Any] = list(record.profiler.kineto_results.experimental_event_tree())  # pyright: ignore
    held: list[tuple[int, int, int]] = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            held.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
    held.sort()
    _, first, size = held[0]
    return max(total for _, total, _ in held) - (first - size)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "olmoe"])
def test_the_fullest_moment_is_what_tensors_hold(
    name: str, precision: Precision, checkpointing: bool
) -> None:
    model = tiny_model(name, **_WIDER, num_hidden_layers=8).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found = estimate_memory(
        model, rows=1, length=_LENGTH, precision=precision, gradient_checkpointing=checkpointing
    )
    measured = _peak_of_a_micro_batch(model, precision)
    assert found.weight_copies + found.activations == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_fullest_moment_with_kept_activations_of_experts(
    precision: Precision, checkpointing: bool
) -> None:
    model = tiny_model("mixtral", **_WIDER, intermediate_size=256, num_hidden_layers=8).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with kept_activation(model, True):
        found = estimate_memory(
            model, rows=1, length=_LENGTH, precision=precision, gradient_checkpointing=checkpointing
        )
        measured = _peak_of_a_micro_batch(model, precision)
    assert found.weight_copies + found.activations == pytest.approx(measured, rel=0.1)


def test_parts_by_hand() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    vectors = 5 * 32
    found = estimate_memory(model, rows=2, length=16, loss_positions=20)
    assert (found.weights, found.gradients, found.optimizer) == (4 * total, 4 * total, 8 * total)
    assert found.weight_copies == 2 * (total - vectors)
    assert found.runtime == RUNTIME_BYTES
    saved = 32 * saved_bytes_per_token(model, "bfloat16", length=16)
    assert found.activations == saved + 20 * 128 * (2 + 12)
    assert found.allocator == (found.gradients + found.weight_copies + saved) // 4
    assert found.total == sum(found.parts.values())


def test_with_few_logits_the_gradient_of_the_head_counts() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    saved = 32 * saved_bytes_per_token(model, "bfloat16", length=16)
    found = estimate_memory(model, rows=2, length=16, loss_positions=1)
    assert found.activations == saved + 128 * 32 * (2 + 4)


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.model.norm.requires_grad_(True)
    found = estimate_memory(model, rows=1, length=16)
    assert (found.gradients, found.optimizer) == (4 * 32, 8 * 32)


def test_what_changes_what() -> None:
    # With so many words that nothing takes more than logits.
    config = tiny_model("mixtral", vocab_size=1024).config
    usual = estimate_memory(config, rows=1, length=64)
    rows = estimate_memory(config, rows=2, length=64)
    assert rows.activations > 1.5 * usual.activations
    fewer = estimate_memory(config, rows=1, length=64, loss_positions=32)
    assert usual.activations - fewer.activations == 32 * 1024 * 14
    exact = estimate_memory(config, rows=1, length=64, precision="float32")
    assert exact.weight_copies == 0
    assert estimate_memory(config, rows=1, length=64, optimizer="sgd").optimizer == 0


_TRAINING = """
import json, sys
import torch
from flanmoe.core.memory import peak_memory_bytes, reset_peak_memory
from flanmoe.models.loading import load_model
from flanmoe.models.memory import estimate_memory
import flanmoe.study.runner

model = load_model(sys.argv[1]).train()
length = 512
tokens = torch.randint(model.config.vocab_size, (1, length))
positions = torch.cat([torch.arange(300), torch.arange(length - 300)])[None]
kept = torch.arange(0, length, 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
reset_peak_memory()
for step in range(2):
    for micro_batch in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(
                tokens, position_ids=positions, use_cache=False, logits_to_keep=kept
            ).logits[0]
        torch.nn.functional.cross_entropy(logits.float(), tokens[0, kept]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
found = estimate_memory(model, rows=1, length=length, loss_positions=len(kept))
print(json.dumps([found.total, peak_memory_bytes()]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(sparse: bool, tmp_path: Path) -> None:
    # Between the tiny models and SmolLM2: large enough to stand out from what Python itself needs.
    options = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    dense = tiny_model(
        "llama", **options, vocab_size=32000, num_hidden_layers=12, num_key_value_heads=4
    )
    model = upcycle(dense, UpcycleConfig(), SeedTree(0)) if sparse else dense
    model.save_pretrained(tmp_path)
    finished = subprocess.run(
        [sys.executable, "-c", _TRAINING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    estimated, measured = json.loads(finished.stdout.splitlines()[-1])
    assert estimated == pytest.approx(measured, rel=0.1)
