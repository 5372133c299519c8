"""The memory estimate against what autograd saves, and against the peak of a real training step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.seeds import SeedTree
from flanmoe.models.memory import RUNTIME_BYTES, estimate_memory, saved_bytes_per_token
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.testing.tiny_models import tiny_model

_LENGTH = 256
_WIDER = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8}


def _saved_by_autograd(model: PreTrainedModel, precision: str) -> int:
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
def test_activations_are_what_autograd_saves(name: str, precision: str) -> None:
    model = tiny_model(name, **_WIDER, num_hidden_layers=4).train()
    estimate = _LENGTH * saved_bytes_per_token(model, precision, length=_LENGTH)
    assert estimate == pytest.approx(_saved_by_autograd(model, precision), rel=0.1)


def test_parts_by_hand() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    vectors = 5 * 32
    found = estimate_memory(model, rows=2, length=16, loss_positions=10)
    assert (found.weights, found.gradients, found.optimizer) == (4 * total, 4 * total, 8 * total)
    assert found.weight_copies == 2 * (total - vectors)
    assert found.runtime == RUNTIME_BYTES
    saved = 32 * saved_bytes_per_token(model, "bfloat16", length=16)
    assert found.activations == saved + 10 * 128 * (2 + 12) + 4 * 128 * 32
    assert found.total == sum(found.parts.values())


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.model.norm.requires_grad_(True)
    found = estimate_memory(model, rows=1, length=16)
    assert (found.gradients, found.optimizer) == (4 * 32, 8 * 32)


def test_what_changes_what() -> None:
    config = tiny_model("mixtral").config
    usual = estimate_memory(config, rows=1, length=64)
    rows = estimate_memory(config, rows=2, length=64)
    assert rows.activations > 1.5 * usual.activations
    fewer = estimate_memory(config, rows=1, length=64, loss_positions=32)
    assert usual.activations - fewer.activations == 32 * 128 * 14
    exact = estimate_memory(config, rows=1, length=64, precision="float32")
    assert exact.weight_copies == 0
    assert estimate_memory(config, rows=1, length=64, optimizer="sgd").optimizer == 0


_TRAINING = """
import json, sys
import torch
from flanmoe.core.memory import peak_memory_bytes, reset_peak_memory
from flanmoe.models.loading import load_model
from flanmoe.models.memory import estimate_memory
import flanmoe.stages.tune

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
