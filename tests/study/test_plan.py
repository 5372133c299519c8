"""What a plan says of a tuning, against the ledger's own way of counting and the model's sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core.errors import ConfigError
from flanmoe.models.flops import count_flops
from flanmoe.models.loading import load_config
from flanmoe.models.plan import count_parameters
from flanmoe.study.machine import Machine
from flanmoe.study.plan import ArmPlan, plan_study
from flanmoe.study.study_file import study_from_mapping

_TOKENS = 3 * 4 * 64


@pytest.fixture(scope="module")
def models(saved: Callable[..., Path]) -> dict[str, Path]:
    """A dense and a sparse model of four layers on disk."""
    return {name: saved(name, num_hidden_layers=4) for name in ("llama", "mixtral")}


def plan(model: Path, sums_file: Path, **train: Any) -> ArmPlan:
    """The plan of one tuning: three steps of four rows of 64 tokens."""
    settings = {"length": 64, "steps": 3, "rows_per_step": 4, **train}
    stage = {
        "stage": "tune",
        "data": {"tasks": [{"name": str(sums_file)}]},
        "packing": {"length": 64},
        "train": settings,
    }
    values = {"name": "planned", "model": str(model), "arms": {"arm": {"stages": [stage]}}}
    return plan_study(study_from_mapping(values), None).arms["arm"]


@pytest.mark.parametrize(
    ("model", "train", "passes"),
    [
        ("mixtral", {"router": {"scope": "global"}}, 4),
        ("mixtral", {"router": {"scope": "global"}, "micro_batch_rows": 2}, 4),
        ("mixtral", {"router": {"scope": "global"}, "micro_batch_rows": 4}, 3),
        ("mixtral", {"router": {"scope": "global", "balance_coefficient": 0}}, 3),
        ("mixtral", {"router": {"scope": "lagged"}}, 3),
        ("llama", {"router": {"scope": "global"}}, 3),
    ],
)
def test_counting_experts_beforehand_costs_a_forward_pass(
    model: str, train: dict[str, Any], passes: int, models: dict[str, Path], sums_file: Path
) -> None:
    found = plan(models[model], sums_file, **train)
    forward = count_flops(load_config(str(models[model])), context_length=64).total
    assert found.tokens == _TOKENS
    assert found.training_flops == pytest.approx(passes * forward * _TOKENS)


def test_counting_takes_time(
    models: dict[str, Path], sums_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(cores=1, memory_bytes=2**40, disk_bytes=2**40, flops_per_second=1e9)
    monkeypatch.setattr("flanmoe.study.plan.this_machine", lambda *_, **__: machine)
    counting = plan(models["mixtral"], sums_file, router={"scope": "global"})
    free = plan(models["mixtral"], sums_file, router={"scope": "lagged"})
    assert counting.seconds == pytest.approx(free.seconds * 4 / 3)


def test_gradient_checkpointing_saves_activations(models: dict[str, Path], sums_file: Path) -> None:
    usual = plan(models["mixtral"], sums_file, precision="float32").memory
    saving = plan(
        models["mixtral"], sums_file, precision="float32", gradient_checkpointing=True
    ).memory
    assert usual is not None
    assert saving is not None
    assert saving.activations < 0.6 * usual.activations
    assert (saving.weights, saving.gradients, saving.optimizer) == (
        usual.weights,
        usual.gradients,
        usual.optimizer,
    )


def test_an_evaluation_costs_as_much_as_it_asks(
    models: dict[str, Path], sums_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(cores=1, memory_bytes=2**40, disk_bytes=2**40, flops_per_second=1e9)
    monkeypatch.setattr("flanmoe.study.plan.this_machine", lambda *_, **__: machine)

    def seconds(**settings: Any) -> float:
        stage = {"stage": "evaluate", "tasks": [{"name": str(sums_file)}], **settings}
        values = {"name": "planned", "model": str(models["llama"]), "stages": [stage]}
        return plan_study(study_from_mapping(values), None).arms["planned"].seconds

    num_sums = len(sums_file.read_text().splitlines())
    assert num_sums > 10
    assert seconds() == pytest.approx(seconds(limit=10) * num_sums / 10)
    assert seconds(limit=10 * num_sums) == seconds()


def test_a_recipe_is_not_sharded(models: dict[str, Path], sums_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(models["llama"], sums_file, sharding="fsdp")
    assert "`train.sharding` must be `none` in a recipe" in str(caught.value)


def test_a_t5_is_planned_with_its_routers(saved: Callable[..., Path]) -> None:
    router = {"kind": "top_k", "num_experts": 8}
    arms = {
        "decoder": {"decoder_router": router},
        "both": {"encoder_router": router, "decoder_router": router, "extra_dense_ffn": True},
    }
    values = {
        "name": "planned",
        "model": str(saved("t5")),
        "arms": {
            name: {"stages": [{"stage": "upcycle_t5", **settings}]}
            for name, settings in arms.items()
        },
    }
    plans = plan_study(study_from_mapping(values), None).arms
    dense = count_parameters(load_config(values["model"])).total
    # Gated FFNs of 32 channels and 64 units in one of two layers a side; a router has a row an expert.
    ffn = 3 * 32 * 64
    sparse = 7 * ffn + 8 * 32
    assert plans["decoder"].parameters.total == dense + sparse
    assert plans["both"].parameters.total == dense + 2 * (sparse + ffn + 32)
    assert plans["both"].disk_bytes == 4 * plans["both"].parameters.total
    assert plans["both"].stages == ("upcycle",)
