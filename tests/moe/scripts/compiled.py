"""Compiled and plain functions side by side, in a process whose shapes are not checked.

    python compiled.py

Exits with an error where a compiled value or gradient differs. The backend traces and differentiates as
inductor does, and needs no C++ compiler.
"""

import torch
from torch import Tensor

from flanmoe.moe.layer import Experts, ExpertsConfig, SparseFFN
from flanmoe.moe.losses import balance_loss, importance_loss, z_loss
from flanmoe.moe.routers import parse_router
from flanmoe.moe.routing import Routing


def router_loss(logits: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
    routing = Routing.from_top_k(logits, expert_ids, gates)
    return balance_loss(routing) + importance_loss(routing) + z_loss(routing)


def compare_losses() -> None:
    logits = torch.randn(12, 4, requires_grad=True)
    gates, expert_ids = logits.detach().softmax(dim=1).topk(2)
    compiled = torch.compile(router_loss, backend="aot_eager")
    results = []
    for function in (router_loss, compiled):
        loss = function(logits, expert_ids, gates)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1])


def compare_block(kind: str) -> None:
    torch.manual_seed(0)
    router = parse_router({"kind": kind, "num_experts": 4}).build(hidden_size=8)
    experts = Experts(ExpertsConfig(num_experts=4, expert_width=6), hidden_size=8)
    block = SparseFFN(router, experts).eval()
    hidden = torch.randn(2, 7, 8)
    compiled = torch.compile(block, backend="aot_eager")
    results = []
    for module in (block, compiled):
        output = module(hidden)
        gradients = torch.autograd.grad(output.square().sum(), list(block.parameters()))
        results.append((output.detach(), *gradients))
    torch.testing.assert_close(results[0], results[1])


if __name__ == "__main__":
    compare_losses()
    for name in ("switch", "gshard", "top_k", "expert_choice"):
        compare_block(name)
