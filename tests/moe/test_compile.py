"""`torch.compile` takes losses and sparse blocks, where shapes are not checked; with checks they are."""

import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from flanmoe.moe.losses import router_probabilities
from flanmoe.moe.routers import parse_router

SCRIPT = Path(__file__).parent / "scripts" / "compiled.py"


@pytest.mark.slow
def test_compiled_equals_plain() -> None:
    environment = {**os.environ, "FLANMOE_CHECK_SHAPES": "0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_tests_check_shapes() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        router_probabilities(torch.zeros(2, 3, 4))
    router = parse_router({"kind": "top_k", "num_experts": 2}).build(hidden_size=3)
    # As many flags as tokens.
    with pytest.raises(jaxtyping.TypeCheckError):
        router(torch.zeros(4, 3), valid=torch.ones(5, dtype=torch.bool))
