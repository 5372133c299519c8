"""What bfloat16 routers do to an upcycled model: logits against the dense model's in float32.

    python benchmarks/router_precision.py [MODEL]

Prints one JSON object: number of tokens, and for each way of computing the mean and the largest absolute
difference of logits.
"""

import json
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flanmoe.core.seeds import SeedTree
from flanmoe.models.loading import load_model, load_tokenizer
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.stages.upcycle import probe_tokens


def logits(model: PreTrainedModel, ids: torch.Tensor, *, bfloat16: bool) -> torch.Tensor:
    """Return float32 logits, computed with or without bfloat16 autocast."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        return model(input_ids=ids, use_cache=False).logits.float()


def main(reference: str) -> None:
    """Compare the ways of computing and print JSON."""
    dense = load_model(reference)
    ids = probe_tokens(load_tokenizer(reference))
    sparse = upcycle(dense, UpcycleConfig(), SeedTree(0).child("upcycle"))
    with tempfile.TemporaryDirectory() as folder:
        sparse.save_pretrained(folder)
        native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    exact = logits(dense, ids, bfloat16=False)
    found = {
        "dense, bfloat16": logits(dense, ids, bfloat16=True),
        "sparse, float32": logits(sparse, ids, bfloat16=False),
        "sparse, bfloat16, routers too": logits(native, ids, bfloat16=True),
        "sparse, bfloat16, routers float32": logits(sparse, ids, bfloat16=True),
    }
    differences = {name: (value - exact).abs() for name, value in found.items()}
    result = {
        name: {"mean": value.mean().item(), "largest": value.max().item()}
        for name, value in differences.items()
    }
    print(json.dumps({"benchmark": "router_precision", "tokens": ids.numel(), **result}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct")
