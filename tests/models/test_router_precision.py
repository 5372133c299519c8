"""Routers outside autocast: full-precision logits, and groups that stay whole."""

import copy

import torch

from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.router_precision import run_routers_outside_autocast
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.testing.tiny_models import tiny_model

_CONFIG = UpcycleConfig(num_experts=32, top_k=2)


def _split_groups(model) -> int:
    """Count (token, layer) pairs whose two choices are not the two slices of one group."""
    seen = []
    for block in moe_blocks(model):
        block.router.register_forward_hook(lambda m, a, returned: seen.append(returned[2]))
    tokens = torch.randint(128, (64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens, use_cache=False)
    return sum(int((ids[:, 0] // 2 != ids[:, 1] // 2).sum()) for ids in seen)


def test_groups_stay_whole_under_autocast() -> None:
    sparse = upcycle(tiny_model("llama"), _CONFIG, SeedTree(0))
    plain = copy.deepcopy(sparse)
    for block in moe_blocks(plain):
        block.router.__class__ = type(block.router).__mro__[2]
    # The plain routers show that the case is a hard one.
    assert _split_groups(plain) > 10
    assert _split_groups(sparse) == 0


def test_a_copy_uses_its_own_weights() -> None:
    model = tiny_model("mixtral")
    twin = copy.deepcopy(model)
    router = moe_blocks(twin)[0].router
    hidden = torch.randn(3, 32)
    before = router(hidden)[0]
    moe_blocks(model)[0].router.get_parameter("weight").data.zero_()
    assert torch.equal(router(hidden)[0], before)


def test_weights_of_lower_precision_stay_in_use() -> None:
    model = tiny_model("qwen3_moe").bfloat16()
    logits = model(torch.arange(8)[None], use_cache=False).logits
    assert logits.dtype == torch.bfloat16


def test_doing_it_twice_is_once() -> None:
    model = tiny_model("mixtral")
    kind = type(moe_blocks(model)[0].router)
    run_routers_outside_autocast(model)
    assert type(moe_blocks(model)[0].router) is kind
    assert kind.__name__ == "MixtralTopKRouter"
