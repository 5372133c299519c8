"""Packed rows of random tokens, and one place that runs a trainer and looks at its gradients."""

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.data.packing import TokenizedExample, pack
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

Gradients = list[dict[str, torch.Tensor]]


@pytest.fixture(autouse=True, scope="session")
def _quick_collections() -> Iterator[None]:
    # Every trainer collects garbage twice, through all modules that were ever imported.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_examples(number: int, *, shortest: int, longest: int, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(number):
        length = int(rng.integers(shortest, longest + 1))
        mask = np.arange(length) >= max(1, length // 2)
        examples.append(
            TokenizedExample(
                input_ids=rng.integers(3, 128, length),
                loss_mask=mask,
                task="random",
                key=str(index),
                content_hash=str(index),
            )
        )
    return examples


@pytest.fixture(scope="session")
def packed_rows() -> Callable[..., list[Packed]]:
    """Rows of `length` tokens, each of one to three examples and a little padding."""

    def rows(
        number: int, *, length: int = 24, seed: int = 0, most_in_a_row: int | None = None
    ) -> list[Packed]:
        examples = random_examples(4 * number, shortest=length // 4, longest=length - 3, seed=seed)
        found = pack(examples, length=length, padding=0, most_in_a_row=most_in_a_row)
        order = np.random.default_rng(seed).permutation(len(found))
        return [found[index] for index in order[:number]]

    return rows


class _KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: Gradients = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: parameter.grad.clone() for name, parameter in named})


@pytest.fixture
def gradients_of(tmp_path: Path) -> Callable[..., Gradients]:
    """Train and return the gradients of each step, before the optimizer sees them."""

    def run(model: PreTrainedModel, rows: Sequence[Packed], **settings: Any) -> Gradients:
        values = {"precision": "float32", "max_grad_norm": 0.0, "steps": 1, **settings}
        config = TuneConfig.parse(values)
        trainer = SparseTrainer(
            model,
            training_arguments(config, tmp_path / "checkpoints", SeedTree(0)),
            stream=FixedRows(rows),
            router=config.router,
        )
        keeper = _KeepGradients()
        trainer.add_callback(keeper)
        trainer.train()
        trainer.close()
        return keeper.steps

    return run
