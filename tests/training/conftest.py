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
from flanmoe.data.example import Packed, PackedPair
from flanmoe.data.packing import TokenizedExample, pack
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
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


Pair = tuple[np.ndarray, np.ndarray]


def packed_pair(pairs: Sequence[Pair], *, input_length: int, target_length: int) -> PackedPair:
    """One row of pairs of an input and a target, written out position by position."""
    columns: dict[str, list[int]] = {name: [] for name in ("in", "in_s", "out", "out_s", "labels")}
    for number, (inputs, target) in enumerate(pairs, start=1):
        columns["in"] += inputs.tolist()
        columns["in_s"] += [number] * len(inputs)
        columns["out"] += [0, *target.tolist()[:-1]]
        columns["out_s"] += [number] * len(target)
        columns["labels"] += target.tolist()

    def filled(name: str, length: int, value: int) -> np.ndarray:
        missing = length - len(columns[name])
        assert missing >= 0
        return np.array(columns[name] + [value] * missing)

    return PackedPair(
        input_ids=filled("in", input_length, 0),
        segment_ids=filled("in_s", input_length, 0),
        decoder_input_ids=filled("out", target_length, 0),
        decoder_segment_ids=filled("out_s", target_length, 0),
        labels=filled("labels", target_length, -100),
        tasks=("random",) * len(pairs),
    )


@pytest.fixture(scope="session")
def pairs_in_rows() -> Callable[..., list[list[Pair]]]:
    """For each row one to three pairs of random tokens, of very different lengths on the two sides."""

    def drawn(number: int, *, most: int = 3, seed: int = 0) -> list[list[Pair]]:
        rng = np.random.default_rng(seed)
        return [
            [
                (rng.integers(3, 64, rng.integers(3, 8)), rng.integers(3, 64, rng.integers(1, 5)))
                for _ in range(rng.integers(1, most + 1))
            ]
            for _ in range(number)
        ]

    return drawn


@pytest.fixture(scope="session")
def pair_rows() -> Callable[..., list[PackedPair]]:
    """Rows of pairs, with padding on both sides."""

    def rows(
        rows_of_pairs: Sequence[Sequence[Pair]], *, input_length: int = 24, target_length: int = 14
    ) -> list[PackedPair]:
        return [
            packed_pair(pairs, input_length=input_length, target_length=target_length)
            for pairs in rows_of_pairs
        ]

    return rows


EXPERT_CHOICE = {"kind": "expert_choice", "num_experts": 4, "capacity_factor": 1.0, "init_std": 0.5}
TOP_TWO = {"kind": "top_k", "num_experts": 4, "top_k": 2, "init_std": 0.5}


@pytest.fixture(scope="session")
def tiny_t5() -> Callable[..., FlanMoeT5ForConditionalGeneration]:
    """A FlanMoeT5 without dropout: experts choose in the encoder, tokens in the decoder."""

    def build(*, seed: int = 0, **settings: Any) -> FlanMoeT5ForConditionalGeneration:
        values = {
            "vocab_size": 64,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "encoder_sparse_every": 1,
            "decoder_sparse_every": 1,
            "encoder_router": EXPERT_CHOICE,
            "decoder_router": TOP_TWO,
            **settings,
        }
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return FlanMoeT5ForConditionalGeneration(FlanMoeT5Config(**values))

    return build


class _KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: Gradients = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: parameter.grad.clone() for name, parameter in named})


@pytest.fixture
def gradients_of(tmp_path: Path) -> Callable[..., Gradients]:
    """Train and return the gradients of each step, before the optimizer sees them."""

    def run(
        model: PreTrainedModel, rows: Sequence[Packed | PackedPair], **settings: Any
    ) -> Gradients:
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
