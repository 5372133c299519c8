"""Encoder-decoders: the loss of a step against one written out, and gradients that do not depend on the cut."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from flanmoe.core.errors import ConfigError, DataError, ModelError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed, PackedPair
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.routing import Routing
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.testing.tuning import tune_rows
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.report import StepReport
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

pytestmark = pytest.mark.slow

Gradients = list[dict[str, torch.Tensor]]
Runner = Callable[..., Gradients]
Builder = Callable[..., PreTrainedModel]
Pair = tuple[np.ndarray, np.ndarray]
Drawn = Callable[..., list[list[Pair]]]
Rows = Callable[..., list[PackedPair]]

# Large, so that the router losses are a fair part of the gradient.
EVERY_LOSS = {"balance_coefficient": 0.5, "importance_coefficient": 0.3, "z_coefficient": 0.1}
CUTS = (1, 2, 8)
INVARIANT = ("sequence", "global", "lagged")
SWITCH = {
    "kind": "switch",
    "num_experts": 4,
    "init_std": 0.5,
    "capacity": {"train": 0.6, "minimum": 1, "group": "segment"},
}


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference in any tensor, over the largest entry of that tensor."""
    assert one.keys() == other.keys()
    return max(
        float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-300))
        for name in one
    )


class Reports(StepCallback):
    name = "reports"

    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def after_step(self, report: StepReport) -> None:
        self.steps.append(report)


def reports_of(
    folder: Path, model: PreTrainedModel, rows: Sequence[Packed | PackedPair], **settings: Any
) -> list[StepReport]:
    config = TuneConfig.parse({"precision": "float32", "steps": 1, **settings})
    reports = Reports()
    trainer = SparseTrainer(
        model,
        training_arguments(config, folder, SeedTree(0)),
        stream=FixedRows(rows),
        router=config.router,
        callbacks=[reports],
    )
    trainer.train()
    return reports.steps


def read_alone(model: PreTrainedModel, pair: Pair) -> tuple[torch.Tensor, list[Routing]]:
    """The summed cross-entropy of a pair without neighbours or padding, and what routers decided."""
    inputs, target = (torch.tensor(side) for side in pair)
    seen: list[Routing] = []
    hooks = [
        block.router.register_forward_hook(lambda module, given, routing: seen.append(routing))
        for block in moe_blocks(model)
    ]
    logits = model(
        input_ids=inputs.unsqueeze(0),
        decoder_input_ids=F.pad(target[:-1], (1, 0)).unsqueeze(0),
        use_cache=False,
    ).logits
    for hook in hooks:
        hook.remove()
    return F.cross_entropy(logits[0], target, reduction="sum"), seen


def written_out_loss(
    model: PreTrainedModel, pairs: Sequence[Pair], *, balance: float, importance: float, z: float
) -> torch.Tensor:
    """Each pair by itself, then every mean by the book, over the tokens that its own layer sees."""
    found = [read_alone(model, pair) for pair in pairs]
    loss = torch.stack([one for one, _ in found]).sum() / sum(len(target) for _, target in pairs)
    layers = list(zip(*(routings for _, routings in found), strict=True))
    for routings in layers:
        logits = torch.cat([routing.logits for routing in routings])
        mean = logits.softmax(dim=1).mean(dim=0)
        num_experts = logits.shape[1]
        asked = torch.cat([routing.choices.expert_ids for routing in routings])
        # Where experts choose nobody asks, and the layer counts in the mean with a loss of 0.
        chosen = F.one_hot(asked, num_experts).sum(dim=1).double().mean(dim=0)
        loss = loss + balance * num_experts * (chosen * mean).sum() / len(layers)
        loss = loss + importance * (num_experts * mean.square().sum() - 1) / len(layers)
        loss = loss + z * logits.logsumexp(dim=1).square().mean() / len(layers)
    return loss


@pytest.mark.parametrize("decoder", ["top_k", "switch"])
def test_gradients_equal_those_of_the_written_out_loss(
    decoder: str, gradients_of: Runner, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    settings = {"decoder_router": SWITCH} if decoder == "switch" else {}
    model, drawn = tiny_t5(**settings).double().train(), pairs_in_rows(8)
    pairs = [pair for row in drawn for pair in row]
    assert len(pairs) > 8
    written_out_loss(model, pairs, balance=0.5, importance=0.3, z=0.1).backward()
    expected = {key: value.grad.clone() for key, value in model.named_parameters()}
    model.zero_grad()
    (found,) = gradients_of(
        model, pair_rows(drawn), rows_per_step=8, micro_batch_rows=2, router=EVERY_LOSS
    )
    assert relative_difference(found, expected) < 1e-9


@pytest.mark.parametrize(
    ("scope", "convention"), [*((scope, "t5x") for scope in INVARIANT), ("global", "mesh_tf")]
)
def test_gradients_do_not_depend_on_how_a_step_is_cut(
    scope: str,
    convention: str,
    gradients_of: Runner,
    tiny_t5: Builder,
    pairs_in_rows: Drawn,
    pair_rows: Rows,
) -> None:
    rows = pair_rows(pairs_in_rows(16))
    router = {**EVERY_LOSS, "scope": scope, "convention": convention}
    runs = [
        gradients_of(
            tiny_t5().double(), rows, steps=2, rows_per_step=8, micro_batch_rows=cut, router=router
        )
        for cut in CUTS
    ]
    for run in runs[1:]:
        for step in range(2):
            assert relative_difference(run[step], runs[0][step]) < 1e-10


def test_the_micro_batch_scope_does_depend_on_it(
    gradients_of: Runner, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    rows, router = pair_rows(pairs_in_rows(8)), {**EVERY_LOSS, "scope": "micro_batch"}
    one, eight = (
        gradients_of(
            tiny_t5().double(), rows, rows_per_step=8, micro_batch_rows=cut, router=router
        )[0]
        for cut in (1, 8)
    )
    for side in ("encoder", "decoder"):
        routers = [name for name in one if name.startswith(side) and "router" in name]
        assert len(routers) == 2
        for name in routers:
            assert relative_difference({name: one[name]}, {name: eight[name]}) > 1e-2


@pytest.mark.parametrize("scope", [*INVARIANT, "micro_batch"])
def test_padding_changes_no_gradient(
    scope: str, gradients_of: Runner, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    drawn, router = pairs_in_rows(8), {**EVERY_LOSS, "scope": scope}
    settings = {"steps": 2, "rows_per_step": 4, "micro_batch_rows": 2, "router": router}
    expected = gradients_of(tiny_t5().double(), pair_rows(drawn), **settings)
    longer = pair_rows(drawn, input_length=33, target_length=19)
    found = gradients_of(tiny_t5().double(), longer, **settings)
    for step in range(2):
        assert relative_difference(found[step], expected[step]) < 1e-10


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_packing_changes_no_gradient(
    scope: str, gradients_of: Runner, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    drawn, router = pairs_in_rows(4), {**EVERY_LOSS, "scope": scope}
    alone = pair_rows([[pair] for row in drawn for pair in row])
    assert len(alone) > 4
    (expected,) = gradients_of(
        tiny_t5().double(), alone, rows_per_step=len(alone), micro_batch_rows=1, router=router
    )
    (found,) = gradients_of(
        tiny_t5().double(), pair_rows(drawn), rows_per_step=4, micro_batch_rows=2, router=router
    )
    assert relative_difference(found, expected) < 1e-10


def test_what_a_step_reports(
    tmp_path: Path, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    drawn = pairs_in_rows(4)
    pairs = [pair for row in drawn for pair in row]
    read, written = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    model = tiny_t5(decoder_router=SWITCH)
    (report,) = reports_of(tmp_path, model, pair_rows(drawn), rows_per_step=4)
    totals = report.totals
    assert (totals.rows, totals.micro_batches, totals.examples) == (4, 4, len(pairs))
    assert totals.real_tokens == read + written
    assert totals.padding_tokens == 4 * (24 + 14) - read - written
    assert totals.loss_tokens == written
    # Experts are counted beforehand, over both sides.
    assert report.counted_tokens == 4 * (24 + 14)
    assert report.router is not None
    # In the encoder each expert takes a quarter of an example's tokens; in the decoder a token asks for one.
    taken = sum(4 * max(1, round(len(inputs) / 4)) for inputs, _ in pairs)
    sums = [sum(layer.counts) for layer in report.router.measures]
    assert sums[:2] == [taken, taken]
    assert all(total < written for total in sums[2:])
    assert report.router.balance_per_layer[:2] == (0.0, 0.0)
    assert all(loss > 0.5 for loss in report.router.balance_per_layer[2:])
    found = [
        [int(getattr(layer, name)) for name in ("asked", "dropped", "tokens", "unserved")]
        for layer in report.router.routing
    ]
    for asked, dropped, tokens, unserved in found[:2]:
        assert (asked, dropped, tokens) == (0, 0, read)
        assert 0 < unserved < read
    for layer, total in zip(found[2:], sums[2:], strict=True):
        assert layer == [written, written - total, written, written - total]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_copy_task_is_learned(
    optimizer: str, tmp_path: Path, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    drawn = [[(inputs[:3], inputs[:3]) for inputs, _ in row] for row in pairs_in_rows(8)]
    result = tune_rows(
        tiny_t5(),
        pair_rows(drawn),
        tmp_path,
        steps=25,
        target_length=14,
        micro_batch_rows=4,
        optimizer=optimizer,
        learning_rate=1e-2 if optimizer == "adamw" else 5e-2,
        schedule="constant",
    )
    assert result.final_loss < 0.5 * result.loss_history[0].loss
    assert result.expert_load is not None
    assert result.expert_load.layers == (0, 1, 0, 1)
    assert [name.split(".")[0] for name in result.expert_load.names] == ["encoder"] * 2 + [
        "decoder"
    ] * 2
    assert result.drops is not None
    assert result.drops.dropped_share == (0.0,) * 4
    assert all(share > 0 for share in result.drops.unserved_share[:2])
    assert result.drops.unserved_share[2:] == (0.0, 0.0)
    (row, *_) = RunDir(tmp_path).rows("routing.jsonl")
    assert [layer["name"] for layer in row["layers"]] == list(result.expert_load.names)
    assert [layer["unserved_share"] > 0 for layer in row["layers"]] == [True, True, False, False]


def dense_t5() -> PreTrainedModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
        config = T5Config(
            vocab_size=64,
            decoder_start_token_id=0,
            dropout_rate=0.0,
            initializer_factor=2.0,
            **shape,
        )
        return T5ForConditionalGeneration(config)


def test_transformers_own_t5(gradients_of: Runner, pairs_in_rows: Drawn, pair_rows: Rows) -> None:
    model, drawn = dense_t5().double(), pairs_in_rows(8, most=1)
    pairs = [pair for row in drawn for pair in row]
    written_out_loss(model, pairs, balance=0, importance=0, z=0).backward()
    expected = {key: value.grad.clone() for key, value in model.named_parameters()}
    model.zero_grad()
    for cut in CUTS:
        (found,) = gradients_of(
            dense_t5().double(), pair_rows(drawn), rows_per_step=8, micro_batch_rows=cut
        )
        assert relative_difference(found, expected) < 1e-9


def test_transformers_own_t5_with_shared_rows_is_refused(
    tmp_path: Path, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    with pytest.raises(ModelError) as caught:
        reports_of(tmp_path, dense_t5(), pair_rows(pairs_in_rows(4)), rows_per_step=4)
    assert str(caught.value) == (
        "Examples that share a row must not see each other, but T5ForConditionalGeneration is not "
        "told where one begins: it has no `segment_ids`. Put one example into each row with "
        "`packing: {examples_per_row: 1}`."
    )


def test_routers_that_know_no_padding_are_refused(
    tmp_path: Path, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, num_experts=4
    )
    model = SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(ModelError, match=r"SwitchTransformersForConditionalGeneration has others"):
        reports_of(tmp_path, model, pair_rows(pairs_in_rows(4, most=1)), rows_per_step=4)


def test_rows_of_the_other_kind_are_refused(
    tmp_path: Path,
    tiny_t5: Builder,
    pairs_in_rows: Drawn,
    pair_rows: Rows,
    packed_rows: Callable[..., list[Packed]],
) -> None:
    with pytest.raises(DataError) as caught:
        reports_of(tmp_path, tiny_t5(), packed_rows(2), rows_per_step=2)
    assert str(caught.value) == (
        "An encoder-decoder is trained on rows of the kind PackedPair, but the stream gives Packed. "
        "Pack the data for this kind of model."
    )
    with pytest.raises(DataError, match="A decoder is trained on rows of the kind Packed, but the"):
        reports_of(tmp_path, tiny_model("llama"), pair_rows(pairs_in_rows(2)), rows_per_step=2)


def test_target_length_belongs_to_encoder_decoders(
    tmp_path: Path,
    tiny_t5: Builder,
    pairs_in_rows: Drawn,
    pair_rows: Rows,
    packed_rows: Callable[..., list[Packed]],
) -> None:
    with pytest.raises(ConfigError, match="An encoder-decoder needs `target_length`"):
        tune_rows(tiny_t5(), pair_rows(pairs_in_rows(4)), tmp_path)
    with pytest.raises(ConfigError, match="is for encoder-decoders, but is 14 and the model is a"):
        tune_rows(tiny_model("llama"), packed_rows(4), tmp_path, target_length=14)


def test_an_encoder_decoder_is_not_sharded(
    tmp_path: Path, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    with pytest.raises(ConfigError) as caught:
        SparseTrainer(
            tiny_t5(),
            training_arguments(TuneConfig(), tmp_path, SeedTree(0)),
            stream=FixedRows(pair_rows(pairs_in_rows(2))),
            sharding="fsdp",
        )
    assert str(caught.value) == (
        "`sharding: fsdp` spreads decoders, but FlanMoeT5ForConditionalGeneration is an encoder-decoder. Set "
        "`sharding: none`."
    )


def test_flops_count_the_tokens_of_both_sides(
    tmp_path: Path, tiny_t5: Builder, pairs_in_rows: Drawn, pair_rows: Rows
) -> None:
    rows = pair_rows(pairs_in_rows(4))
    values = {"steps": 2, "target_length": 14, "router": {"scope": "sequence"}}
    ledger = tune_rows(tiny_t5(), rows, tmp_path, **values).ledger
    assert ledger.flops == pytest.approx(2 * 4 * (24 + 14) * 300)
    assert ledger.sequences == 8
    assert ledger.real_tokens == 2 * sum(row.num_real_tokens for row in rows)
    assert ledger.loss_tokens == 2 * sum(row.num_loss_tokens for row in rows)
