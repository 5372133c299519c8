"""Expert dropout in every native model: an explicit mask, replay, evaluation mode, every refusal."""

import copy

import pytest
import torch
from torch import nn

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.expert_dropout import check_expert_dropout, expert_dropout, set_expert_dropout
from flanmoe.models.experts_interface import fused_experts
from flanmoe.moe.compute import hidden_dropout
from flanmoe.moe.layer import Experts, ExpertsConfig, SparseFFN
from flanmoe.moe.routers import parse_router
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

_RATE = 0.4


def _tokens() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(3))


def _logits(model: nn.Module, *, seed: int = 0) -> torch.Tensor:
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        return model(_tokens(), use_cache=False).logits


def _gradients(model: nn.Module, *, seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model(_tokens(), use_cache=False).logits.square().mean().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def _rates(model: nn.Module) -> set[float]:
    return {hidden_dropout(block.experts) for block in moe_blocks(model)}


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_experts_apply_the_mask_that_the_generator_draws(name: str) -> None:
    model = tiny_model(name).double()
    set_expert_dropout(model, _RATE)
    block = moe_blocks(model)[-1]
    experts = fused_experts(block.experts)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, block.hidden_size, generator=generator, dtype=torch.float64)
    scores = torch.rand(9, block.num_experts, generator=generator)
    gates, expert_ids = scores.double().topk(2, dim=-1)
    block.experts.train()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(7)
        found = block.experts(hidden, expert_ids, gates)
        torch.manual_seed(7)
        expected = torch.zeros_like(hidden)
        for expert in range(block.num_experts):
            visits = (expert_ids == expert).nonzero().tolist()
            if not visits:
                continue
            shape = (len(visits), block.expert_width)
            kept = torch.empty(shape, dtype=torch.float64).bernoulli_(1 - _RATE)
            for (token, choice), mask in zip(visits, kept, strict=True):
                product = experts.gate_up[expert] @ hidden[token]
                if experts.gate_up_bias is not None:
                    product = product + experts.gate_up_bias[expert]
                output = experts.down[expert] @ (experts.combine(product) * mask / (1 - _RATE))
                if experts.down_bias is not None:
                    output = output + experts.down_bias[expert]
                expected[token] += gates[token, choice] * output
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, block.experts.eval()(hidden, expert_ids, gates))


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_it_acts_in_training_alone_and_repeats_with_the_seed(name: str) -> None:
    model = tiny_model(name)
    without = _logits(model)
    set_expert_dropout(model, _RATE)
    assert torch.equal(_logits(model.eval()), without)
    model.train()
    first = _logits(model)
    assert torch.equal(_logits(model), first)
    assert not torch.equal(first, without)
    assert not torch.equal(_logits(model, seed=1), first)
    set_expert_dropout(model, 0.0)
    assert torch.equal(_logits(model), without)


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_gradients_survive_activation_checkpointing(name: str) -> None:
    model = tiny_model(name).double().train()
    undropped = _gradients(model)
    set_expert_dropout(model, _RATE)
    expected = _gradients(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    found = _gradients(model)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-12, atol=1e-14)
    experts = [key for key in expected if ".experts." in key]
    assert all(not torch.allclose(expected[key], undropped[key]) for key in experts)


def test_a_shared_expert_keeps_all_its_units() -> None:
    model = tiny_model("qwen2_moe").train()
    set_expert_dropout(model, _RATE)
    zeros: list[int] = []
    for layer in model.model.layers:
        layer.mlp.shared_expert.down_proj.register_forward_pre_hook(
            lambda module, inputs: zeros.append(int((inputs[0] == 0).sum()))
        )
    _logits(model)
    assert zeros == [0, 0]


def test_the_models_own_dropout_is_another() -> None:
    plain = tiny_model("mixtral", attention_dropout=0.3).train()
    both = copy.deepcopy(plain)
    set_expert_dropout(both, _RATE)
    assert not torch.equal(_logits(plain), _logits(both))
    assert both.config.attention_dropout == 0.3
    # Off again, attention draws what it drew before.
    set_expert_dropout(both, 0.0)
    assert torch.equal(_logits(plain), _logits(both))


def test_it_is_as_before_afterwards() -> None:
    model = tiny_model("deepseek_v3")
    with expert_dropout(model, 0.2):
        assert _rates(model) == {0.2}
        with pytest.raises(RuntimeError, match=r"stop at \{0\.5\}"), expert_dropout(model, 0.5):
            raise RuntimeError(f"stop at {_rates(model)}")
        assert _rates(model) == {0.2}
        with expert_dropout(model, 0.0):
            assert _rates(model) == {0.0}
    assert _rates(model) == {0.0}


def test_a_copy_keeps_the_rate_and_a_file_does_not() -> None:
    model = tiny_model("mixtral")
    set_expert_dropout(model, _RATE)
    assert _rates(copy.deepcopy(model)) == {_RATE}
    assert "flanmoe" not in model.config.to_json_string()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ConfigError) as caught:
        set_expert_dropout(tiny_model("mixtral"), rate)
    assert str(caught.value) == (
        f"`expert_dropout` must be at least 0 and below 1, but is {rate}. Choose a rate such as 0.1."
    )


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_a_dense_model_has_no_experts(name: str) -> None:
    model = tiny_model(name)
    for refused in (set_expert_dropout, check_expert_dropout):
        with pytest.raises(ModelError) as caught:
            refused(model, 0.1)
        assert str(caught.value) == (
            "`expert_dropout` needs a sparse model where it is above 0, but is 0.1 for "
            f"{type(model).__name__}, which is dense. Set it to 0, or make the model sparse first "
            "with `flanmoe upcycle`."
        )
    set_expert_dropout(model, 0.0)


@pytest.mark.parametrize("implementation", ["eager", "flanmoe_triton"])
def test_experts_that_run_something_else(implementation: str) -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    with pytest.raises(ModelError) as caught:
        set_expert_dropout(model, 0.1)
    assert str(caught.value) == (
        "Expert dropout needs experts that run flanmoe's compute, but those of model.layers.0.mlp "
        f'run `{implementation}`. Call `model.set_experts_implementation("flanmoe")` first.'
    )
    assert _rates(model) == {0.0}


def test_our_own_block_drops_at_the_rate_that_is_set() -> None:
    router = parse_router({"kind": "top_k", "num_experts": 4}).build(hidden_size=8)
    config = ExpertsConfig(num_experts=4, expert_width=32, dropout=0.1)
    block = SparseFFN(router, Experts(config, hidden_size=8)).double()
    hidden = torch.randn(6, 8, dtype=torch.float64)
    model = nn.Sequential(block)
    with expert_dropout(model, _RATE):
        assert block.experts.fused().hidden_dropout == _RATE
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            dropped = block(hidden)
        assert not torch.allclose(dropped, block.eval()(hidden))
        assert torch.equal(block(hidden), block(hidden))
    assert hidden_dropout(block.experts) == 0.1
