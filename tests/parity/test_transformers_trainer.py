"""What transformers' own Trainer and models make of the auxiliary loss, beside what ours makes of it.

The tests about transformers assert its present behaviour. Once that is right they fail, and say which
sentences of ours are out of date.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from flanmoe.core.seeds import SeedTree
from flanmoe.data.packing import TokenizedExample, pack
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.losses import balance_loss
from flanmoe.moe.routing import Routing
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

NUM_ROWS = 4
LENGTH = 16
WHERE_WE_SAY_SO = "the section `What others do` of docs/guide/router_losses.md"


def token_ids() -> np.ndarray:
    return np.random.default_rng(1).integers(3, 128, LENGTH)


def report_if_fixed(what: str, *, is_fixed: bool) -> None:
    """Fail with what there is to do once transformers does the right thing."""
    if is_fixed:
        pytest.fail(
            f"transformers {transformers.__version__} has fixed this: {what}. Delete this test, and "
            f"what says otherwise in {WHERE_WE_SAY_SO}."
        )


class KeepGateGradients(TrainerCallback):
    """Keeps the gradient of every router, one after the other."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        blocks = moe_blocks(kwargs["model"])
        gates = [next(block.router.parameters()).grad for block in blocks]
        self.gradient = torch.stack([gate for gate in gates if gate is not None])


def sparse_model(**settings: Any) -> PreTrainedModel:
    return tiny_model("mixtral", **settings).double()


def their_gradient(folder: Path, *, coefficient: float, at_once: int, layers: int) -> torch.Tensor:
    """Gradient of the routers in a step of four equal rows, some at once in each process."""
    model = sparse_model(
        num_hidden_layers=layers, output_router_logits=True, router_aux_loss_coef=coefficient
    )
    row = {"input_ids": torch.tensor(token_ids()), "labels": torch.tensor(token_ids())}
    keep = KeepGateGradients()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=at_once,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    arguments.gradient_accumulation_steps = NUM_ROWS // (at_once * arguments.world_size)
    trainer = Trainer(model, arguments, train_dataset=[row] * NUM_ROWS, callbacks=[keep])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return keep.gradient


def our_gradient(folder: Path, *, coefficient: float, at_once: int, layers: int) -> torch.Tensor:
    """The same with our trainer."""
    example = TokenizedExample(
        input_ids=token_ids(),
        loss_mask=np.ones(LENGTH, dtype=bool),
        task="random",
        key="0",
        content_hash="0",
    )
    rows = pack([example], length=LENGTH, padding=0) * NUM_ROWS
    config = TuneConfig.parse(
        {
            "steps": 1,
            "rows_per_step": NUM_ROWS,
            "micro_batch_rows": at_once,
            "precision": "float32",
            "max_grad_norm": 0.0,
            "router": {"balance_coefficient": coefficient, "z_coefficient": 0.0},
        }
    )
    arguments = training_arguments(config, folder, SeedTree(0))
    trainer = SparseTrainer(
        sparse_model(num_hidden_layers=layers),
        arguments,
        stream=FixedRows(rows[arguments.process_index :: arguments.world_size]),
        router=config.router,
    )
    keep = KeepGateGradients()
    trainer.add_callback(keep)
    trainer.train()
    trainer.close()
    return keep.gradient


def auxiliary(run: Any, folder: Path, *, at_once: int, layers: int = 2) -> torch.Tensor:
    """What the auxiliary loss alone gives the routers: with it minus without it."""
    on, off = (run(folder, coefficient=c, at_once=at_once, layers=layers) for c in (1.0, 0.0))
    assert float((on - off).abs().max()) > 1e-3
    return on - off


def ratio(one: torch.Tensor, other: torch.Tensor) -> float:
    """How many times the first is the second; they must point the same way."""
    torch.testing.assert_close(
        F.normalize(one.flatten(), dim=0), F.normalize(other.flatten(), dim=0)
    )
    return float(one.norm() / other.norm())


def test_their_auxiliary_gradient_grows_with_accumulation(tmp_path: Path) -> None:
    found = ratio(*(auxiliary(their_gradient, tmp_path, at_once=rows) for rows in (1, 4)))
    report_if_fixed(
        "its Trainer no longer multiplies the auxiliary loss by the number of accumulation steps",
        is_fixed=abs(found - 1) < 1e-6,
    )
    assert found == pytest.approx(4.0, abs=1e-6)


def test_ours_does_not(tmp_path: Path) -> None:
    found = ratio(*(auxiliary(our_gradient, tmp_path, at_once=rows) for rows in (1, 4)))
    assert found == pytest.approx(1.0, abs=1e-6)


@pytest.mark.exhaustive
def test_their_auxiliary_gradient_grows_with_processes_and_ours_does_not(
    tmp_path: Path, in_two_processes: Callable[..., None]
) -> None:
    in_two_processes(Path(__file__).parent / "scripts" / "routers_of_two.py", tmp_path)
    two = torch.load(tmp_path / "out.pt")
    theirs, ours = (
        ratio(two[name], auxiliary(run, tmp_path, at_once=4))
        for name, run in (("theirs", their_gradient), ("ours", our_gradient))
    )
    assert ours == pytest.approx(1.0, abs=1e-6)
    report_if_fixed(
        "its Trainer no longer multiplies the auxiliary loss by the number of processes",
        is_fixed=abs(theirs - 1) < 1e-6,
    )
    assert theirs == pytest.approx(2.0, abs=1e-6)


def test_for_one_layer_in_one_batch_both_are_the_same(tmp_path: Path) -> None:
    # One layer, so that pooling layers makes no difference, and no accumulation.
    theirs, ours = (
        auxiliary(run, tmp_path, at_once=4, layers=1) for run in (their_gradient, our_gradient)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def collapsed(experts: Sequence[int], *, num_experts: int = 4, num_tokens: int = 64) -> Any:
    """Logits of layers that send every token to one expert with certainty."""
    certain = 50.0 * F.one_hot(torch.tensor(experts), num_experts).double()
    return tuple(layer.expand(num_tokens, -1) for layer in certain)


def per_layer(layers: Sequence[torch.Tensor]) -> float:
    """Our loss of a top-1 model: layer by layer, then the mean."""
    losses = [
        balance_loss(
            Routing.from_top_k(logits, logits.argmax(1, keepdim=True), logits.amax(1, True))
        )
        for logits in layers
    ]
    return float(torch.stack(losses).mean())


def test_their_loss_does_not_see_layers_collapse_onto_different_experts() -> None:
    different, same = collapsed([0, 1, 2, 3]), collapsed([0, 0, 0, 0])
    theirs = [float(load_balancing_loss_func(layers, 4, 1)) for layers in (different, same)]
    report_if_fixed(
        "its load-balancing loss no longer pools the layers, and scores collapse of layers onto "
        "different experts like collapse onto one",
        is_fixed=abs(theirs[0] - theirs[1]) < 1e-6,
    )
    # Perfect balance of a top-1 model scores 1.
    assert theirs == pytest.approx([1.0, 4.0], abs=1e-6)


@pytest.mark.parametrize("experts", [[0, 1, 2, 3], [0, 0, 0, 0]])
def test_ours_sees_every_layer(experts: list[int]) -> None:
    assert per_layer(collapsed(experts)) == pytest.approx(4.0, abs=1e-6)
