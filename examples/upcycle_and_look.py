"""Upcycle a dense model, check that it is still the same function, and see who goes to which expert.

    python examples/upcycle_and_look.py [MODEL]

MODEL is a folder, a hub id, or smollm2-135m-instruct (the default; README says how to install it).
"""

import sys

import torch

import flanmoe
from flanmoe.core.seeds import SeedTree
from flanmoe.models.upcycle import step0_max_abs_diff
from flanmoe.moe.routing_measures import routing_measures
from flanmoe.moe.routing_sums import RoutingSums


def main(reference: str) -> None:
    """Upcycle, compare, and print the share of tokens of every expert."""
    dense = flanmoe.load_model(reference)
    tokenizer = flanmoe.load_tokenizer(reference)
    sparse = flanmoe.upcycle(dense, flanmoe.UpcycleConfig(num_experts=8, top_k=2), SeedTree(0))
    ids = tokenizer("Why is the sky blue, and the sunset red?", return_tensors="pt")["input_ids"]
    print(f"largest logit difference: {step0_max_abs_diff(dense, sparse, ids):.1e}")
    for name, model in (("dense", dense), ("sparse", sparse)):
        count = flanmoe.count_parameters(model)
        print(f"{name}: {count.total:,} parameters, {count.active:,} active for a token")

    blocks = flanmoe.moe_blocks(sparse)
    with torch.no_grad(), flanmoe.RoutingRecorder(blocks).recording() as layers:
        sparse(input_ids=ids, use_cache=False)
    for block, routing in zip(blocks, layers, strict=True):
        (measured,) = routing_measures(RoutingSums.of(routing))
        shares = " ".join(f"{100 * share:3.0f}" for share in measured.load)
        print(f"layer {block.layer:2d}, % of assignments: {shares}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct")
