"""Our balance loss of one layer against the function that transformers' decoders share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from flanmoe.moe.losses import balance_loss, router_probabilities
from flanmoe.moe.routing import Routing


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    num_experts=st.integers(2, 6),
    top_k=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_one_layer_scores_the_same_with_padding(
    rows: int, length: int, num_experts: int, top_k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows * length, num_experts, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[0, 0] = True
    gates, expert_ids = router_probabilities(logits).topk(top_k)
    ours = balance_loss(Routing.from_top_k(logits, expert_ids, gates, valid=mask.flatten()))
    theirs = load_balancing_loss_func((logits,), num_experts, top_k, mask.long())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
