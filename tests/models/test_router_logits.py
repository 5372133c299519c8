"""Routers keep their precision under autocast."""

import pytest
import torch

from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.router_precision import run_routers_outside_autocast
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.testing.tiny_models import tiny_model


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_logits_are_those_of_float32_hidden_states(name: str) -> None:
    model = tiny_model(name).eval()
    ids = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    run_routers_outside_autocast(model)
    block = moe_blocks(model)[0]
    seen: list[torch.Tensor] = []
    block.router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    recorder = RoutingRecorder(moe_blocks(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), recorder.recording() as layers:
        model(input_ids=ids)
    router = dict(block.router.named_parameters())
    hidden = seen[0].reshape(-1, seen[0].shape[-1]).float()
    expected = hidden @ router["weight"].T + router.get("bias", torch.zeros(()))
    assert layers[0].logits.dtype == torch.float32
    torch.testing.assert_close(layers[0].logits, expected)
    # The test can fail: bfloat16 products are far from these.
    rounded = (hidden.bfloat16() @ router["weight"].T.bfloat16()).float() + router.get(
        "bias", torch.zeros(())
    )
    assert not torch.allclose(rounded, expected, atol=1e-4)


def test_an_upcycled_model_stays_near_the_dense_one_in_bfloat16() -> None:
    dense = tiny_model("llama").eval()
    sparse = upcycle(dense, UpcycleConfig(num_experts=8, top_k=2), SeedTree(0)).eval()
    ids = torch.randint(3, 100, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = dense(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            errors = [
                (m(input_ids=ids).logits.float() - exact).abs().max() for m in (dense, sparse)
            ]
    assert errors[1] < 2 * errors[0]
