"""What a user is told of how experts compute."""

import pytest
import torch
from transformers import PreTrainedModel

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.expert_path import expert_path
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.moe.compute.products import ASKED_FOR, CHOICES
from flanmoe.testing.tiny_models import tiny_model

CPU = torch.device("cpu")


def flan_moe_t5() -> PreTrainedModel:
    """A tiny sparse T5 of ours."""
    router = {"kind": "switch", "num_experts": 4}
    config = FlanMoeT5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        num_heads=2,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        encoder_router=router,
        decoder_router=router,
    )
    return FlanMoeT5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["mixtral", "flan_moe_t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_of_the_table_that_is_taken_is_named_with_its_reason(
    dtype: torch.dtype, name: str
) -> None:
    model = tiny_model(name) if name == "mixtral" else flan_moe_t5()
    found = expert_path(moe_blocks(model), dtype=dtype, device=CPU)
    path = "rounded" if dtype == torch.bfloat16 else "expert"
    (reason,) = (choice.reason for choice in CHOICES if choice.path == path)
    assert found == f"{path}: {reason}"


def test_kernels_that_were_asked_for_are_named_with_what_is_known_of_them() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("flanmoe_triton")
    assert expert_path(moe_blocks(model), dtype=torch.float32, device=CPU) == (
        f"triton: {ASKED_FOR.reason}"
    )


def test_another_way_is_named_as_such() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    assert expert_path(moe_blocks(model), dtype=torch.float32, device=CPU) == (
        "transformers' eager"
    )


def test_a_dense_model_has_none() -> None:
    assert expert_path(moe_blocks(tiny_model("llama")), dtype=torch.float32, device=CPU) is None
