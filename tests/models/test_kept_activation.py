"""Kept activations of experts: the same results, what they take, set and put back, every refusal."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models import experts_interface
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.experts_interface import fused_experts
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.kept_activation import kept_activation
from flanmoe.models.meta import meta_model
from flanmoe.moe import layer
from flanmoe.moe.compute import FusedExperts, expert_ffn, keep_activation, set_keep_activation
from flanmoe.moe.layer import Experts
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

_ROUTER = {"kind": "top_k", "num_experts": 4, "top_k": 2}
_TOKENS = 48
# Two layers of a Mixtral, one of each side of ours; two visits a token.
_UNITS = {"mixtral": 2 * 64, "gated-gelu": 2 * 40, "relu": 2 * 40}


def _model(name: str) -> PreTrainedModel:
    """A tiny Mixtral, or a FlanMoeT5 with that FFN."""
    if name == "mixtral":
        return tiny_model(name).train()
    config = FlanMoeT5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=40,
        num_heads=2,
        num_layers=2,
        feed_forward_proj=name,
        encoder_router=_ROUTER,
        decoder_router=_ROUTER,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return FlanMoeT5ForConditionalGeneration(config).train()


def _loss(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(3, 64, (2, _TOKENS // 2), generator=torch.Generator().manual_seed(3))
    return model(input_ids=tokens, labels=tokens.flip(1)).loss


def _gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = _loss(model)
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def _saved_bytes(model: PreTrainedModel, *, autocast: bool) -> int:
    """Return the bytes of every storage that autograd saves in a forward pass."""
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # It is held, so that its address is not given to another.
        saved[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        _loss(model)
    return sum(storage.nbytes() for storage in saved.values())


def _kept(model: PreTrainedModel) -> list[bool]:
    return [keep_activation(block.experts) for block in moe_blocks(model)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the views of experts said that went into the compute."""
    values: list[bool] = []

    def watched(hidden: Tensor, expert_ids: Tensor, gates: Tensor, experts: FusedExperts) -> Tensor:
        values.append(experts.keep_activation)
        return expert_ffn(hidden, expert_ids, gates, experts)

    for module in (experts_interface, layer):
        monkeypatch.setattr(module, "expert_ffn", watched)
    return values


@pytest.mark.parametrize("name", _UNITS)
def test_loss_and_gradients_are_the_same(name: str, seen: list[bool]) -> None:
    model = _model(name)
    loss, expected = _gradients(model)
    with kept_activation(model, True):
        found_loss, found = _gradients(model)
    assert seen == [False, False, True, True]
    torch.testing.assert_close(found_loss, loss)
    assert found.keys() == expected.keys()
    assert any(".experts." in key and gradient.any() for key, gradient in found.items())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", _UNITS)
def test_every_visit_keeps_a_number_a_unit(name: str, autocast: bool) -> None:
    model = _model(name)
    without = _saved_bytes(model, autocast=autocast)
    with kept_activation(model, True):
        kept = _saved_bytes(model, autocast=autocast)
    assert kept - without == _TOKENS * 2 * _UNITS[name] * (2 if autocast else 4)
    assert _saved_bytes(model, autocast=autocast) == without


@pytest.mark.parametrize("name", [name for name in SPARSE_NAMES if name != "gpt_oss"])
def test_every_native_model_with_a_known_activation(name: str) -> None:
    model = tiny_model(name).train()
    _, expected = _gradients(model)
    with kept_activation(model, True):
        assert all(fused_experts(block.experts).keep_activation for block in moe_blocks(model))
        _, found = _gradients(model)
    assert found.keys() == expected.keys()
    assert any(".experts." in key and gradient.any() for key, gradient in found.items())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=lambda m, key=key: f"{key}: {m}")


def test_our_own_view_says_so() -> None:
    experts = moe_blocks(_model("relu"))[0].experts
    assert isinstance(experts, Experts)
    assert not experts.fused().keep_activation
    set_keep_activation(experts, True)
    assert experts.fused().keep_activation


def test_it_is_as_before_afterwards() -> None:
    model = tiny_model("mixtral")
    set_keep_activation(moe_blocks(model)[1].experts, True)
    with kept_activation(model, True):
        assert _kept(model) == [True, True]
        with (
            pytest.raises(RuntimeError, match=r"^stop at \[False, False\]$"),
            kept_activation(model, False),
        ):
            raise RuntimeError(f"stop at {_kept(model)}")
        assert _kept(model) == [True, True]
    assert _kept(model) == [False, True]


def test_a_copy_keeps_it_and_a_file_does_not() -> None:
    model = tiny_model("mixtral")
    with kept_activation(model, True):
        assert _kept(copy.deepcopy(model)) == [True, True]
        assert "keep_activation" not in model.config.to_json_string()


def test_kernels_of_ours_keep_them_too() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("flanmoe_triton")
    with kept_activation(model, True):
        assert _kept(model) == [True, True]


def _refusal(model: PreTrainedModel) -> str:
    """Return what is said, having changed nothing."""
    with pytest.raises(ModelError) as caught, kept_activation(model, True):
        pass
    assert not any(_kept(model))
    return str(caught.value)


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_a_dense_model_has_no_experts(name: str) -> None:
    model = tiny_model(name)
    assert _refusal(model) == (
        "`keep_expert_activation` needs a sparse model where it is true, but is true for "
        f"{type(model).__name__}, which is dense. Set it to false, or make the model sparse first "
        "with `flanmoe upcycle`."
    )
    with kept_activation(model, False):
        pass


def test_experts_that_run_something_else() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    assert _refusal(model) == (
        "Keeping activations needs experts that run flanmoe's compute, but those of model.layers.0.mlp "
        'run `eager`. Call `model.set_experts_implementation("flanmoe")` first.'
    )
    with kept_activation(model, False):
        pass


@pytest.mark.parametrize("on_meta", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize(
    ("name", "values", "activation"),
    [
        ("gpt_oss", {}, "GptOssExperts._apply_gate"),
        ("mixtral", {"hidden_act": "gelu_fast"}, "FastGELUActivation"),
    ],
)
def test_an_activation_that_autograd_differentiates(
    name: str, values: dict[str, Any], activation: str, on_meta: bool
) -> None:
    model = tiny_model(name, **values)
    assert _refusal(meta_model(model.config) if on_meta else model) == (
        "`keep_expert_activation` needs experts whose activation has its derivative written out "
        "(relu, silu, gelu, gelu_tanh; gated or alone), but those of model.layers.0.mlp compute "
        f"`{activation}`, which is run again under autograd. Set it to false."
    )


def test_a_plan_needs_no_compute() -> None:
    model = meta_model(tiny_model("mixtral").config)
    with kept_activation(model, True):
        assert _kept(model) == [True, True]
    assert _kept(model) == [False, False]
