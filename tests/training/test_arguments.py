"""What users may say about a tuning run, and what transformers is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from flanmoe.core.errors import ConfigError
from flanmoe.core.seeds import SeedTree
from flanmoe.training.arguments import TuneConfig, _micro_batches, training_arguments


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    return training_arguments(TuneConfig.parse(values), folder, SeedTree(0))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"rows_per_step": 6, "micro_batch_rows": 4},
            "micro_batch_rows: must divide `rows_per_step` (6) without remainder, but is 4; "
            "an optimizer step is made of whole micro-batches",
        ),
        (
            {"steps": 10, "warmup_steps": 11},
            "warmup_steps: must be at most `steps` (10), but is 11; "
            "the learning rate would never be reached",
        ),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1, but is 0."),
        ({"learning_rate": 0}, "learning_rate: Input should be greater than 0, but is 0."),
        (
            {"schedule": "step"},
            "schedule: Input should be 'constant', 'linear', 'cosine' or 'inverse_sqrt'",
        ),
        (
            {"schedule": "inverse_sqrt"},
            "schedule: must not be `inverse_sqrt` with `warmup_steps: 0`; the learning rate falls "
            "with the steps as multiples of the warm-up, so set `warmup_steps`",
        ),
        ({"optimizer": "sgd"}, "optimizer: Input should be 'adamw' or 'adafactor', but is 'sgd'."),
        (
            {"optimizer": "adafactor", "sharding": "fsdp"},
            "sharding: must be `none` with `optimizer: adafactor`, but is `fsdp`; its statistics are "
            "taken over whole weights",
        ),
        ({"target_length": 1}, "target_length: Input should be greater than or equal to 2"),
        ({"precision": "float16"}, "precision: Input should be 'bfloat16' or 'float32'"),
        ({"router": {"scope": "all"}}, "router.scope: Input should be 'sequence', 'global'"),
        ({"router": {"z_coefficient": -1}}, "router.z_coefficient: Input should be greater than"),
        ({"freeze": ["gates"]}, "freeze.0: Input should be 'gate', 'experts', 'moe', 'non_moe' or"),
        ({"freeze": ["moe", "moe"]}, "freeze: must name each preset once, but found `moe` more"),
        ({"expert_dropout": 1}, "expert_dropout: Input should be less than 1, but is 1."),
        ({"expert_dropout": -0.1}, "expert_dropout: Input should be greater than or equal to 0"),
        (
            {"keep_expert_activation": "all"},
            "keep_expert_activation: Input should be a valid boolean",
        ),
        ({"learning_rat": 1}, "learning_rat: unknown key `learning_rat`. Did you mean `learning_"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TuneConfig.parse(values)
    assert str(caught.value).startswith("configuration has 1 problem:\n")
    assert sentence in str(caught.value)


def test_several_mistakes_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        TuneConfig.parse({"steps": 0, "router": {"balance_coefficient": -1}})
    assert str(caught.value).startswith("configuration has 2 problems:\n")


def test_rows_must_fit_the_processes() -> None:
    config = TuneConfig(rows_per_step=6, micro_batch_rows=2)
    assert _micro_batches(config, 1) == 3
    assert _micro_batches(config, 3) == 1
    with pytest.raises(ConfigError) as caught:
        _micro_batches(config, 2)
    assert str(caught.value) == (
        "`rows_per_step` must be a multiple of `micro_batch_rows` (2) times the number of "
        "processes (2), but is 6. Set it to a multiple of 4."
    )


def test_a_step_is_cut_into_micro_batches(tmp_path: Path) -> None:
    made = arguments(tmp_path, rows_per_step=12, micro_batch_rows=3)
    assert made.per_device_train_batch_size == 3
    assert made.gradient_accumulation_steps == 4


def test_nothing_is_reported_to_others_or_filtered(tmp_path: Path) -> None:
    made = arguments(tmp_path)
    assert made.report_to == []
    assert made.disable_tqdm
    assert not made.logging_nan_inf_filter
    assert made.use_cpu == (not torch.accelerator.is_available())


def test_precision(tmp_path: Path) -> None:
    assert arguments(tmp_path).bf16
    assert not arguments(tmp_path, precision="float32").bf16
    assert arguments(tmp_path).tf32 is False


def test_seed_varies_the_draws_of_the_trainer_alone(tmp_path: Path) -> None:
    assert arguments(tmp_path).seed == arguments(tmp_path).seed
    assert arguments(tmp_path).seed != arguments(tmp_path, seed=1).seed
    other = training_arguments(TuneConfig(), tmp_path, SeedTree(1))
    assert arguments(tmp_path).seed != other.seed


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 0.853553, 0.5, 0.146447]),
        ("inverse_sqrt", [0.5, 1.0, (2 / 3) ** 0.5, 0.5**0.5, 0.4**0.5]),
    ],
)
def test_learning_rates(schedule: str, expected: list[float], tmp_path: Path) -> None:
    from_transformers = arguments(tmp_path, steps=6, warmup_steps=2, schedule=schedule)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    factor = _scheduler(from_transformers, optimizer)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        factor.step()
    assert rates[0] == 0.0
    assert rates[1:] == pytest.approx(expected, abs=1e-6)


def _scheduler(made: TrainingArguments, optimizer: torch.optim.Optimizer) -> Any:
    return get_scheduler(
        made.lr_scheduler_type,
        optimizer,
        num_warmup_steps=made.get_warmup_steps(made.max_steps),
        num_training_steps=made.max_steps,
    )
