"""What a user is told of how experts compute."""

import pytest
import torch

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.expert_path import expert_path
from flanmoe.moe.compute.products import CHOICES
from flanmoe.testing.tiny_models import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_of_the_table_that_is_taken_is_named_with_its_reason(dtype: torch.dtype) -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("flanmoe")
    found = expert_path(model, moe_blocks(model), dtype=dtype, device=CPU)
    name = "rounded" if dtype == torch.bfloat16 else "expert"
    (reason,) = (choice.reason for choice in CHOICES if choice.path == name)
    assert found == f"{name}: {reason}"


def test_another_way_is_named_as_such() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    assert expert_path(model, moe_blocks(model), dtype=torch.float32, device=CPU) == (
        "transformers' eager"
    )


def test_a_dense_model_has_none() -> None:
    model = tiny_model("llama")
    assert expert_path(model, [], dtype=torch.float32, device=CPU) is None
