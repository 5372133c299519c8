"""The recorder sees every routing decision once, with its gradient, whatever checkpointing does."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.losses import balance_loss, z_loss
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.moe.routing import Routing
from flanmoe.testing.tiny_models import tiny_model

TOKENS = torch.arange(20).reshape(2, 10) + 3


def forward(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def router_loss(layers: list[Routing]) -> torch.Tensor:
    return torch.stack([balance_loss(layer) + 0.1 * z_loss(layer) for layer in layers]).mean()


def test_records_what_the_routers_returned_in_layer_order() -> None:
    model = tiny_model("mixtral", num_hidden_layers=3)
    blocks = moe_blocks(model)
    returned: list[tuple[torch.Tensor, ...]] = []
    for block in blocks:
        block.router.register_forward_hook(lambda module, inputs, output: returned.append(output))
    with torch.no_grad(), RoutingRecorder(blocks).recording() as layers:
        forward(model)
    assert len(layers) == 3
    for layer, (logits, gates, expert_ids) in zip(layers, returned, strict=True):
        torch.testing.assert_close(layer.logits, logits)
        assert layer.expert_ids.tolist() == expert_ids.reshape(-1).tolist()
        torch.testing.assert_close(layer.gates, gates.reshape(-1))
        assert layer.token_ids.tolist() == [token for token in range(20) for _ in range(2)]


def test_order_is_that_of_the_blocks_not_of_running() -> None:
    model = tiny_model("mixtral")
    first, second = moe_blocks(model)
    with RoutingRecorder([second, first]).recording() as layers:
        forward(model)
    with RoutingRecorder([first, second]).recording() as usual:
        forward(model)
    torch.testing.assert_close(layers[0].logits, usual[1].logits)
    torch.testing.assert_close(layers[1].logits, usual[0].logits)


def test_padding_and_examples_are_carried_along() -> None:
    model = tiny_model("mixtral")
    valid = torch.arange(20) % 10 < 7
    segments = torch.arange(20) // 5
    with RoutingRecorder(moe_blocks(model)).recording(valid=valid, segments=segments) as layers:
        forward(model)
    for layer in layers:
        assert layer.expert_counts().sum() == 2 * valid.sum()
        assert set(layer.token_ids.tolist()) == set(valid.nonzero().flatten().tolist())
        assert layer.segments.equal(segments)


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = tiny_model("mixtral")
    blocks = moe_blocks(model)
    with RoutingRecorder(blocks).recording():
        forward(model)
    with pytest.raises(KeyError), RoutingRecorder(blocks).recording():
        raise KeyError("unrelated")
    assert not any(block.router._forward_hooks for block in blocks)


def test_a_dense_model_records_nothing() -> None:
    model = tiny_model("llama")
    with RoutingRecorder(moe_blocks(model)).recording() as layers:
        forward(model)
    assert layers == []


def gradients_of_router_losses(model: PreTrainedModel, *, backward_inside: bool) -> list:
    recorder = RoutingRecorder(moe_blocks(model))
    model.train()
    model.zero_grad()
    with recorder.recording() as layers:
        output = forward(model)
        if backward_inside:
            (output.square().mean() + router_loss(layers)).backward()
            assert len(layers) == 2
    if not backward_inside:
        (output.square().mean() + router_loss(layers)).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("backward_inside", [True, False])
def test_activation_checkpointing_changes_no_gradient(backward_inside: bool) -> None:
    model = tiny_model("mixtral").double()
    expected = gradients_of_router_losses(model, backward_inside=False)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    found = gradients_of_router_losses(model, backward_inside=backward_inside)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_router_losses_reach_the_layers_below_under_checkpointing() -> None:
    model = tiny_model("mixtral").double().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with RoutingRecorder(moe_blocks(model)).recording() as layers:
        forward(model)
    router_loss(layers).backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert moe_blocks(model)[0].experts.down_proj.grad.abs().sum() > 0


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_model("mixtral").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with (
        pytest.raises(ModelError) as caught,
        RoutingRecorder(moe_blocks(model)).recording(),
    ):
        forward(model)
    assert str(caught.value) == (
        "Router losses need gradients through the recorded logits, but the router of "
        "model.layers.0.mlp ran without them, as under reentrant activation checkpointing. "
        "Enable it with `use_reentrant=False`."
    )


def test_checkpointing_without_gradients_records_too() -> None:
    model = tiny_model("mixtral").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with torch.no_grad(), RoutingRecorder(moe_blocks(model)).recording() as layers:
        forward(model)
    assert len(layers) == 2


def test_a_recompute_does_not_replace_what_was_recorded() -> None:
    model = tiny_model("mixtral").train()
    blocks = moe_blocks(model)
    with RoutingRecorder(blocks).recording() as layers:
        output = checkpoint(lambda: forward(model), use_reentrant=False)
        before = [layer.logits for layer in layers]
        output.sum().backward()
        assert all(layer.logits is old for layer, old in zip(layers, before, strict=True))


def test_two_passes_in_one_recording_are_refused() -> None:
    model = tiny_model("mixtral")
    with RoutingRecorder(moe_blocks(model)).recording():
        forward(model)
        with pytest.raises(ModelError) as caught:
            forward(model)
    assert str(caught.value) == (
        "A recording holds one forward pass, but the router of model.layers.0.mlp ran twice in it. "
        "Open a recording for each pass."
    )


def test_a_router_that_does_not_run_is_reported() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ModelError) as caught, RoutingRecorder(moe_blocks(model)).recording():
        pass
    assert str(caught.value) == (
        "A recording needs one forward pass through all 2 routers, but model.layers.0.mlp, "
        "model.layers.1.mlp did not run. Run the model inside the recording."
    )


def test_a_recorder_used_twice_at_once_is_refused() -> None:
    model = tiny_model("mixtral")
    recorder = RoutingRecorder(moe_blocks(model))
    with recorder.recording() as layers:
        with pytest.raises(ModelError) as caught, recorder.recording():
            pass
        forward(model)
    assert str(caught.value) == (
        "A RoutingRecorder holds one recording at a time, but one of the blocks from model.layers.0.mlp "
        "on is still open. End it first, or make a second RoutingRecorder of the same blocks."
    )
    assert len(layers) == 2


def test_a_recorder_can_be_used_again_also_after_an_error() -> None:
    model = tiny_model("mixtral")
    recorder = RoutingRecorder(moe_blocks(model))
    with pytest.raises(KeyError), recorder.recording():
        raise KeyError("unrelated")
    with recorder.recording() as first:
        forward(model)
    with recorder.recording() as second:
        forward(model)
    torch.testing.assert_close(first[1].logits, second[1].logits)


def test_two_recorders_of_the_same_blocks_see_the_same() -> None:
    model = tiny_model("mixtral")
    blocks = moe_blocks(model)
    with RoutingRecorder(blocks).recording() as one, RoutingRecorder(blocks).recording() as other:
        forward(model)
    assert [layer.logits.sum() for layer in one] == [layer.logits.sum() for layer in other]
