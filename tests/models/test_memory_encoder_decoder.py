"""The memory estimate of encoder-decoders against what autograd saves and the peak of a micro-batch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.activations_encoder_decoder import encoder_decoder_activations
from flanmoe.models.dropout import dropout
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config
from flanmoe.models.kept_activation import kept_activation
from flanmoe.models.memory import RUNTIME_BYTES, estimate_memory
from flanmoe.models.precision import Precision
from flanmoe.testing.tiny_models import tiny_model

_SHAPE = {"vocab_size": 8, "d_model": 64, "d_kv": 8, "d_ff": 160, "num_heads": 8, "num_layers": 2}
_INPUTS, _TARGETS = 288, 128
_OURS = {
    "dense": {"num_decoder_layers": 3, "feed_forward_proj": "relu"},
    "top_k": {
        "encoder_router": {"kind": "top_k", "num_experts": 4, "top_k": 2},
        "decoder_router": {"kind": "switch", "num_experts": 8},
        "feed_forward_proj": "relu",
    },
    "expert_choice": {
        "encoder_router": {"kind": "expert_choice", "num_experts": 8},
        "decoder_router": {"kind": "st_moe", "num_experts": 8},
        "extra_dense_ffn": True,
        "encoder_sparse_every": 1,
    },
}


def _model(name: str, rate: float) -> PreTrainedModel:
    if name not in _OURS:
        return tiny_model(name, **_SHAPE, dropout_rate=rate).train()
    torch.manual_seed(0)
    config = FlanMoeT5Config(**{**_SHAPE, **_OURS[name]}, dropout_rate=rate)
    return AutoModelForSeq2SeqLM.from_config(config).train()


def _batch(
    model: PreTrainedModel, inputs: int = _INPUTS, targets: int = _TARGETS
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batch = {
        name: torch.randint(3, 8, (1, length), generator=generator)
        for name, length in (("input_ids", inputs), ("decoder_input_ids", targets))
    }
    if isinstance(model.config, FlanMoeT5Config):
        # Two examples in a row.
        batch["segment_ids"] = 1 + (torch.arange(inputs) >= inputs // 2).long()[None]
        batch["decoder_segment_ids"] = 1 + (torch.arange(targets) >= targets // 3).long()[None]
    return batch


def _saved_by_autograd(model: PreTrainedModel, precision: Precision) -> int:
    """Return the bytes of every tensor that one forward pass saves, weights and logits left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {parameter.shape for parameter in model.parameters() if parameter.ndim > 1}
    sizes |= {s[1:] for s in sizes if len(s) == 3}
    sizes |= {s[::-1] for s in sizes}
    saved: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in sizes:
            # The tensor is held, so that its address is not given to another.
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        model(**_batch(model), use_cache=False)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["t5", "switch_transformers", *_OURS])
def test_activations_are_what_autograd_saves(name: str, precision: Precision, rate: float) -> None:
    model = _model(name, rate)
    found = encoder_decoder_activations(
        model, precision, rows=1, input_length=_INPUTS, target_length=_TARGETS
    )
    assert found.saved == pytest.approx(_saved_by_autograd(model, precision), rel=0.1)


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_kept_activations_of_experts_are_what_autograd_saves_more(
    precision: Precision, activation: str
) -> None:
    # No expert turns a token away, so that visits are as many as are asked for.
    routers = {
        "encoder_router": {"kind": "expert_choice", "num_experts": 8},
        "decoder_router": {"kind": "top_k", "num_experts": 4, "top_k": 2},
    }
    torch.manual_seed(0)
    # And no dropout, so that experts choose alike twice.
    config = FlanMoeT5Config(**_SHAPE, **routers, feed_forward_proj=activation, dropout_rate=0.0)
    model = AutoModelForSeq2SeqLM.from_config(config).train()

    def estimated() -> int:
        return encoder_decoder_activations(
            model, precision, rows=1, input_length=_INPUTS, target_length=_TARGETS
        ).saved

    estimate, saved = estimated(), _saved_by_autograd(model, precision)
    with kept_activation(model, True):
        grown = estimated() - estimate
        assert grown == _saved_by_autograd(model, precision) - saved
    visits = 2 * _INPUTS + 2 * _TARGETS
    assert grown == visits * 160 * (2 if precision == "bfloat16" else 4)


def _peak_of_a_micro_batch(
    model: PreTrainedModel, precision: Precision, batch: dict[str, Any]
) -> int:
    """Return the most bytes that tensors of one forward and backward pass hold at a time.

    Gradients are there before, as from the second micro-batch of a step on.
    """

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(**batch, use_cache=False).logits[0].float()
        torch.nn.functional.cross_entropy(logits, batch["decoder_input_ids"][0]).backward()

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
@pytest.mark.parametrize(
    ("name", "precision", "lengths"),
    [
        ("dense", "bfloat16", (192, 192)),
        ("top_k", "float32", (224, 32)),
        ("expert_choice", "bfloat16", (32, 224)),
    ],
)
def test_the_fullest_moment_is_what_tensors_hold(
    name: str, precision: Precision, lengths: tuple[int, int], checkpointing: bool
) -> None:
    model = _model(name, 0.1)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found = estimate_memory(
        model,
        rows=1,
        length=lengths[0],
        target_length=lengths[1],
        precision=precision,
        gradient_checkpointing=checkpointing,
    )
    measured = _peak_of_a_micro_batch(model, precision, _batch(model, *lengths))
    # Under checkpointing one layer's attention decides, whose temporary tensors are only roughly known.
    tolerance = 0.2 if checkpointing else 0.1
    assert found.weight_copies + found.activations == pytest.approx(measured, rel=tolerance)


def test_parts_by_hand() -> None:
    model = _model("expert_choice", 0.0)
    total = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    found = estimate_memory(model, rows=2, length=16, target_length=8)
    assert (found.weights, found.gradients, found.optimizer) == (4 * total, 4 * total, 8 * total)
    assert found.weight_copies == 2 * matrices
    assert found.runtime == RUNTIME_BYTES
    assert found.total == sum(found.parts.values())
    frozen = model.requires_grad_(False)
    frozen.lm_head.requires_grad_(True)
    less = estimate_memory(frozen, rows=2, length=16, target_length=8)
    assert (less.gradients, less.optimizer) == (4 * 8 * 64, 8 * 8 * 64)
    assert less.weights == found.weights


def test_logits_are_those_of_targets() -> None:
    model = _model("top_k", 0.0)
    model.resize_token_embeddings(5000)

    def activations(**options: Any) -> int:
        return estimate_memory(model, rows=2, length=16, target_length=8, **options).activations

    assert activations() == activations(loss_positions=16)
    assert activations() - activations(loss_positions=12) == 0
    most = {"loss_positions": 400}
    assert activations(**most) - activations(loss_positions=390) == 10 * 5000 * (2 + 12)


def test_what_changes_what() -> None:
    config = _model("expert_choice", 0.1).config
    usual = estimate_memory(config, rows=1, length=64, target_length=32)
    assert estimate_memory(config, rows=2, length=64, target_length=32).activations > (
        1.5 * usual.activations
    )
    longer = estimate_memory(config, rows=1, length=64, target_length=64)
    assert longer.activations > 1.3 * usual.activations
    exact = estimate_memory(config, rows=1, length=64, target_length=32, precision="float32")
    assert exact.weight_copies == 0


def test_dropout_is_that_of_the_training() -> None:
    def saved(model: PreTrainedModel) -> int:
        lengths = {"input_length": 64, "target_length": 32}
        return encoder_decoder_activations(model, "bfloat16", rows=1, **lengths).saved

    model = _model("top_k", 0.0)
    without = saved(model)
    with dropout(model, 0.1):
        assert saved(model) > 1.3 * without
    assert saved(model) == without


@pytest.mark.parametrize(
    ("name", "target_length", "message"),
    [
        ("t5", None, r"only `length: 16` is given\. Give `target_length` too\.$"),
        ("llama", 8, r"`target_length` is 8 for LlamaForCausalLM\. Leave it out\.$"),
        ("bart", 8, r"but the model is a BartForConditionalGeneration\. Take one of those\.$"),
    ],
)
def test_what_cannot_be_estimated(name: str, target_length: int | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        estimate_memory(tiny_model(name), rows=1, length=16, target_length=target_length)
