"""Weights kept in bfloat16 lose updates; the same checkpoint loaded in float32 does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flanmoe.stages.doctor.check import Finding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "status"), [(torch.bfloat16, "defect"), (torch.float32, "ok")], ids=str
)
def test_what_a_checkpoint_is_loaded_in_decides(
    dtype: torch.dtype,
    status: str,
    ask: Callable[[str], Finding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def in_that(place: Any) -> Any:
        return load(place, dtype=dtype)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", in_that)
    found = ask("bfloat16_weights")
    assert found.status == status, found.detail
    assert found.figure is not None
    # Of normal weights of spread 0.02, 65 to 80 % lie where half the distance between two bfloat16
    # numbers exceeds 2e-5.
    assert 0.6 < found.figure < 0.8 if status == "defect" else found.figure < 0.01
