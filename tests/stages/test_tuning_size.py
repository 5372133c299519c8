"""What is said of a training run before its first step: kept activations of experts."""

from typing import Any

import pytest
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.meta import meta_model
from flanmoe.moe.compute import keep_activation
from flanmoe.stages.tuning_size import TuningSize, tuning_size
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig


def size_of(model: PreTrainedModel, **train: Any) -> TuningSize:
    return tuning_size(model, TuneConfig.parse({"length": 64, "micro_batch_rows": 2, **train}))


@pytest.mark.parametrize(("precision", "width"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("values", [{}, {"tuner": {"kind": "low_rank", "rank": 2}}])
def test_kept_activations_of_experts_are_planned(
    values: dict[str, Any], precision: str, width: int
) -> None:
    model = meta_model(tiny_model("mixtral").config)
    usual = size_of(model, rows_per_step=2, precision=precision, **values)
    kept = size_of(
        model, rows_per_step=2, precision=precision, keep_expert_activation=True, **values
    )
    # Two layers, two visits of each of 128 tokens, 64 units.
    grown = 2 * 2 * 128 * 64 * width
    assert kept.memory.activations - usual.memory.activations == grown
    assert kept.memory.allocator - usual.memory.allocator == grown // 4
    assert kept.parameters == usual.parameters
    assert kept.checkpoint_bytes == usual.checkpoint_bytes
    assert {keep_activation(block.experts) for block in moe_blocks(model)} == {False}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "llama",
            "`keep_expert_activation` needs a sparse model where it is true, but is true for ",
        ),
        ("gpt_oss", "`keep_expert_activation` needs experts whose activation has its derivative "),
    ],
)
def test_a_plan_refuses_kept_activations_as_a_run_would(name: str, sentence: str) -> None:
    model = meta_model(tiny_model(name).config)
    size_of(model)
    with pytest.raises(ModelError) as caught:
        size_of(model, keep_expert_activation=True)
    assert str(caught.value).startswith(sentence)


def test_experts_that_run_something_else_are_refused_where_they_compute() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    with pytest.raises(ModelError, match=r"^Keeping activations needs experts that run flanmoe's"):
        size_of(model, keep_expert_activation=True)
    size_of(meta_model(model.config), keep_expert_activation=True)
