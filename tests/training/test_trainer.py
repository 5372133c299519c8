"""The trainer's loss against one written out, and gradients that do not depend on how a step is cut."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from flanmoe.core.errors import DataError, FlanmoeError, ModelError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.collate import collate
from flanmoe.data.example import Packed
from flanmoe.data.packing import TokenizedExample, pack
from flanmoe.models.blocks import moe_blocks
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.cross_entropy import summed_cross_entropy
from flanmoe.training.report import StepReport
from flanmoe.training.router_losses import RouterLossConfig
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

Gradients = list[dict[str, torch.Tensor]]
Runner = Callable[..., Gradients]
Rows = Callable[..., list[Packed]]

# Large, so that the router losses are a fair part of the gradient.
ROUTER = {"balance_coefficient": 0.5, "z_coefficient": 0.1}
EVERY_LOSS = {**ROUTER, "importance_coefficient": 0.3}
CUTS = (1, 2, 8)
INVARIANT = ("sequence", "global", "lagged")


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference in any tensor, over the largest entry of that tensor."""
    assert one.keys() == other.keys()
    return max(
        float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-300))
        for name in one
    )


def sparse() -> PreTrainedModel:
    return tiny_model("mixtral").double()


class Reports(StepCallback):
    name = "reports"

    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def after_step(self, report: StepReport) -> None:
        self.steps.append(report)


def reports_of(
    folder: Path, model: PreTrainedModel, rows: list[Packed], **settings: object
) -> tuple[SparseTrainer, list[StepReport]]:
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
    return trainer, reports.steps


def written_out_loss(
    model: PreTrainedModel,
    rows: list[Packed],
    *,
    balance: float = 0.0,
    importance: float = 0.0,
    z: float = 0.0,
) -> torch.Tensor:
    """All rows at once, all logits, every sum by the book. T tokens, E experts."""
    batch = collate(rows)
    returned: list[tuple[torch.Tensor, ...]] = []
    hooks = [
        block.router.register_forward_hook(lambda module, inputs, output: returned.append(output))
        for block in moe_blocks(model)
    ]
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    real = (batch["segment_ids"] != 0).flatten()
    for router_logits, _, expert_ids in returned:
        kept = router_logits[real]
        num_experts = kept.shape[1]
        chosen = F.one_hot(expert_ids[real], num_experts).sum(dim=1).double()
        product = chosen.mean(dim=0) * kept.softmax(dim=1).mean(dim=0)
        loss = loss + balance * num_experts * product.sum() / len(returned)
        sums = kept.softmax(dim=1).sum(dim=0)
        variation = sums.var(correction=0) / sums.mean().square()
        loss = loss + importance * variation / len(returned)
        loss = loss + z * kept.logsumexp(dim=1).square().mean() / len(returned)
    return loss


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "llama"])
def test_gradients_equal_those_of_the_written_out_loss(
    name: str, gradients_of: Runner, packed_rows: Rows
) -> None:
    model, rows = tiny_model(name).double(), packed_rows(8)
    written_out_loss(model, rows, balance=0.5, importance=0.3, z=0.1).backward()
    expected = {key: value.grad.clone() for key, value in model.named_parameters()}
    model.zero_grad()
    (found,) = gradients_of(model, rows, rows_per_step=8, micro_batch_rows=2, router=EVERY_LOSS)
    assert relative_difference(found, expected) < 1e-9


def test_reported_losses_equal_the_written_out_ones(tmp_path: Path, packed_rows: Rows) -> None:
    model, rows = sparse(), packed_rows(4)
    with torch.no_grad():
        plain = float(written_out_loss(model, rows))
        balance = float(written_out_loss(model, rows, balance=1.0)) - plain
        importance = float(written_out_loss(model, rows, importance=1.0)) - plain
        z = float(written_out_loss(model, rows, z=1.0)) - plain
    _, (report,) = reports_of(tmp_path, model, rows, rows_per_step=4, router=EVERY_LOSS)
    assert report.router is not None
    expected = {
        "loss": plain + 0.5 * balance + 0.3 * importance + 0.1 * z,
        "loss/cross_entropy": plain,
        "router/balance_raw": balance,
        "router/balance_weighted": 0.5 * balance,
        "router/importance_raw": importance,
        "router/importance_weighted": 0.3 * importance,
        "router/z_raw": z,
        "router/z_weighted": 0.1 * z,
    }
    metrics = report.metrics()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert sum(report.router.balance_per_layer) / 2 == pytest.approx(balance, rel=1e-9)
    for layer in report.router.measures:
        assert sum(layer.counts) == 2 * report.totals.real_tokens


@pytest.mark.parametrize("convention", ["t5x", "mesh_tf"])
@pytest.mark.parametrize("scope", INVARIANT)
def test_gradients_do_not_depend_on_how_a_step_is_cut(
    scope: str, convention: str, gradients_of: Runner, packed_rows: Rows
) -> None:
    rows = packed_rows(16)
    router = {**EVERY_LOSS, "scope": scope, "convention": convention}
    runs = [
        gradients_of(sparse(), rows, steps=2, rows_per_step=8, micro_batch_rows=cut, router=router)
        for cut in CUTS
    ]
    for run in runs[1:]:
        for step in range(2):
            assert relative_difference(run[step], runs[0][step]) < 1e-10


def test_the_micro_batch_scope_does_depend_on_it(gradients_of: Runner, packed_rows: Rows) -> None:
    rows, router = packed_rows(8), {**ROUTER, "scope": "micro_batch"}
    one, two, eight = (
        gradients_of(sparse(), rows, rows_per_step=8, micro_batch_rows=cut, router=router)[0]
        for cut in CUTS
    )
    routers = [name for name in one if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    for name in routers:
        for other in (one, two):
            assert relative_difference({name: other[name]}, {name: eight[name]}) > 1e-2


def test_one_micro_batch_makes_two_scopes_the_same(gradients_of: Runner, packed_rows: Rows) -> None:
    rows = packed_rows(4)
    (peers,), (ours,) = (
        gradients_of(
            sparse(),
            rows,
            rows_per_step=4,
            micro_batch_rows=4,
            router={**ROUTER, "scope": scope},
        )
        for scope in ("micro_batch", "global")
    )
    assert relative_difference(peers, ours) < 1e-12


def padded(row: Packed, extra: int) -> Packed:
    """The same row with more padding behind it."""
    (longer,) = pack(examples_of([row]), length=len(row.input_ids) + extra, padding=0)
    return longer


def examples_of(rows: list[Packed]) -> list[TokenizedExample]:
    examples = []
    for row in rows:
        for segment in range(1, row.segment_ids.max() + 1):
            inside = row.segment_ids == segment
            examples.append(
                TokenizedExample(
                    input_ids=row.input_ids[inside],
                    loss_mask=row.labels[inside] != -100,
                    task="random",
                    key="",
                    content_hash="",
                )
            )
    return examples


@pytest.mark.parametrize("scope", INVARIANT)
def test_padding_changes_no_gradient(scope: str, gradients_of: Runner, packed_rows: Rows) -> None:
    rows, router = packed_rows(8), {**EVERY_LOSS, "scope": scope}
    settings = {"steps": 2, "rows_per_step": 4, "micro_batch_rows": 2, "router": router}
    expected = gradients_of(sparse(), rows, **settings)
    found = gradients_of(sparse(), [padded(row, 9) for row in rows], **settings)
    for step in range(2):
        assert relative_difference(found[step], expected[step]) < 1e-10


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_packing_changes_no_gradient(scope: str, gradients_of: Runner, packed_rows: Rows) -> None:
    rows, router = packed_rows(4), {**EVERY_LOSS, "scope": scope}
    alone = [pack([example], length=24, padding=0)[0] for example in examples_of(rows)]
    assert len(alone) > len(rows)
    (expected,) = gradients_of(
        sparse(), alone, rows_per_step=len(alone), micro_batch_rows=len(alone), router=router
    )
    (found,) = gradients_of(sparse(), rows, rows_per_step=4, micro_batch_rows=2, router=router)
    assert relative_difference(found, expected) < 1e-10


def test_activation_checkpointing_changes_no_gradient(
    gradients_of: Runner, packed_rows: Rows
) -> None:
    rows = packed_rows(4)
    settings = {"rows_per_step": 4, "micro_batch_rows": 2, "router": ROUTER}
    (expected,) = gradients_of(sparse(), rows, **settings)
    (found,) = gradients_of(sparse(), rows, gradient_checkpointing=True, **settings)
    assert relative_difference(found, expected) < 1e-12


def test_the_models_own_auxiliary_loss_is_off(gradients_of: Runner, packed_rows: Rows) -> None:
    rows, settings = packed_rows(2), {"rows_per_step": 2, "router": ROUTER}
    (expected,) = gradients_of(sparse(), rows, **settings)
    model = sparse()
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 100.0
    model.router_aux_loss_coef = 100.0
    (found,) = gradients_of(model, rows, **settings)
    assert relative_difference(found, expected) == 0.0


def dropping() -> PreTrainedModel:
    return tiny_model("mixtral", attention_dropout=0.3)


def test_the_counting_pass_sees_the_same_dropout(tmp_path: Path, packed_rows: Rows) -> None:
    rows, settings = packed_rows(12), {"steps": 3, "rows_per_step": 4}
    trainer, reports = reports_of(
        tmp_path, dropping(), rows, router={"scope": "global"}, **settings
    )
    last = reports[-1]
    assert last.router is not None
    for layer, measured in enumerate(last.router.measures):
        counted = trainer.scope._fractions[layer] * last.totals.real_tokens
        assert counted.round().long().tolist() == list(measured.counts)


def test_the_counting_pass_leaves_the_random_state_alone(tmp_path: Path, packed_rows: Rows) -> None:
    rows, settings = packed_rows(12), {"steps": 1, "rows_per_step": 4}
    losses = [
        reports_of(tmp_path, dropping(), rows, router={"scope": scope}, **settings)[1][0]
        for scope in ("global", "lagged", "sequence")
    ]
    assert losses[0].cross_entropy == losses[1].cross_entropy == losses[2].cross_entropy
    assert losses[0].router is not None
    assert losses[1].router is not None
    assert losses[0].router.raw["z"] == losses[1].router.raw["z"]


def test_dropout_is_on_in_training(tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(4)
    (one,) = reports_of(tmp_path, dropping(), rows, rows_per_step=4)[1]
    (other,) = reports_of(tmp_path, dropping(), rows, rows_per_step=4, seed=1)[1]
    assert one.cross_entropy != other.cross_entropy


def test_the_cost_of_counting_is_reported(tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(4)

    def counted(scope: str, micro_batch_rows: int) -> int:
        settings = {"rows_per_step": 4, "micro_batch_rows": micro_batch_rows}
        _, (report,) = reports_of(tmp_path, sparse(), rows, router={"scope": scope}, **settings)
        assert (report.counting_seconds > 0) == (report.counted_tokens > 0)
        return report.counted_tokens

    assert counted("global", 1) == 4 * 24
    assert counted("global", 4) == 0
    assert [counted(scope, 1) for scope in ("lagged", "sequence", "micro_batch")] == [0, 0, 0]


def test_no_pass_is_made_for_a_loss_that_is_off(tmp_path: Path, packed_rows: Rows) -> None:
    router = {"balance_coefficient": 0.0, "scope": "global"}
    _, (report,) = reports_of(tmp_path, sparse(), packed_rows(4), rows_per_step=4, router=router)
    assert report.counted_tokens == 0
    assert report.router is not None
    assert report.router.raw["balance"] > 1
    assert report.router.weighted["balance"] == 0


def test_lagged_uses_the_counts_of_the_step_before(tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(4)
    settings = {"steps": 2, "rows_per_step": 2, "learning_rate": 1e-30}
    _, (first, second) = reports_of(
        tmp_path, sparse(), rows, router={"scope": "lagged"}, **settings
    )
    # At first every expert is taken to have k / E of the tokens: E sum_e k/E P_e = k.
    assert first.router is not None
    assert second.router is not None
    assert first.router.balance_per_layer == pytest.approx((2.0, 2.0), rel=1e-9)
    batch = collate(rows[2:])
    for layer, block in enumerate(moe_blocks(model := sparse())):
        returned: list[tuple[torch.Tensor, ...]] = []
        hook = block.router.register_forward_hook(
            lambda module, inputs, output, kept=returned: kept.append(output)
        )
        with torch.no_grad():
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        hook.remove()
        probabilities = returned[0][0][(batch["segment_ids"] != 0).flatten()].softmax(dim=1)
        counts = torch.tensor(first.router.measures[layer].counts)
        fractions = counts.double() / first.totals.real_tokens
        expected = 8 * float((fractions * probabilities.mean(dim=0)).sum())
        assert second.router.balance_per_layer[layer] == pytest.approx(expected, rel=1e-9)


def test_cross_entropy_is_taken_in_float32_and_ignores_masked_targets() -> None:
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, -100, 3], [-100, 5, 6]])
    loss = summed_cross_entropy(logits.bfloat16(), targets)
    assert loss.dtype == torch.float32
    rounded = logits.bfloat16().float().log_softmax(dim=-1)
    expected = -sum(
        rounded[row, column, targets[row, column]]
        for row in range(2)
        for column in range(3)
        if targets[row, column] >= 0
    )
    torch.testing.assert_close(loss, expected)


def test_a_micro_batch_without_loss_tokens_adds_nothing(
    gradients_of: Runner, packed_rows: Rows
) -> None:
    rows = packed_rows(2)
    silent = pack(
        [
            TokenizedExample(
                input_ids=example.input_ids,
                loss_mask=example.loss_mask & False,
                task="random",
                key="",
                content_hash="",
            )
            for example in examples_of([rows[1]])
        ],
        length=24,
        padding=0,
    )[0]
    off = {"balance_coefficient": 0.0, "z_coefficient": 0.0}
    (expected,) = gradients_of(sparse(), [rows[0]], rows_per_step=1, router=off)
    (found,) = gradients_of(sparse(), [rows[0], silent], rows_per_step=2, router=off)
    assert relative_difference(found, expected) < 1e-12


def test_a_step_without_loss_tokens_is_refused(tmp_path: Path, packed_rows: Rows) -> None:
    (row,) = packed_rows(1)
    silent = Packed(row.input_ids, row.labels * 0 - 100, row.segment_ids, row.position_ids, ("t",))
    with pytest.raises(DataError) as caught:
        reports_of(tmp_path, sparse(), [silent], rows_per_step=2)
    assert str(caught.value) == (
        "A step needs at least 1 token that enters the loss, but the 2 rows of step 1 hold 0. "
        "Check the responses of the data."
    )


class _Ending(FixedRows):
    def __next__(self) -> Packed:
        if self._given == len(self._rows):
            raise StopIteration
        return super().__next__()


def test_data_that_ends_is_refused(tmp_path: Path, packed_rows: Rows) -> None:
    config = TuneConfig(steps=2, rows_per_step=4, precision="float32")
    trainer = SparseTrainer(
        sparse(),
        training_arguments(config, tmp_path, SeedTree(0)),
        stream=_Ending(packed_rows(6)),
    )
    with pytest.raises(DataError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "Training needs 4 micro-batches for each step, but the data ended 2 into step 2. "
        "Use a stream that repeats."
    )


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    tmp_path: Path, packed_rows: Rows
) -> None:
    model = sparse()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FlanmoeError) as caught:
        reports_of(tmp_path, model, packed_rows(2), rows_per_step=2)
    assert str(caught.value) == (
        "Training needs a finite loss, but that of step 1 is nan. Lower `learning_rate` or "
        "`max_grad_norm`; the last checkpoint is good."
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    tmp_path: Path, packed_rows: Rows
) -> None:
    model = sparse()
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        FlanmoeError, match=r"finite gradient norm, but that of step 1 is (nan|inf)"
    ):
        reports_of(tmp_path, model, packed_rows(2), rows_per_step=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_weights_in_bfloat16_are_refused(tmp_path: Path, packed_rows: Rows) -> None:
    with pytest.raises(ModelError) as caught:
        reports_of(tmp_path, tiny_model("mixtral").bfloat16(), packed_rows(2), rows_per_step=2)
    assert str(caught.value) == (
        "Tuning needs weights in float32, but some are in bfloat16, which swallows most updates at "
        "fine-tuning rates. Load the model with `dtype=torch.float32`; `precision: bfloat16` "
        "computes in bfloat16 all the same."
    )


def test_every_step_must_be_logged(tmp_path: Path, packed_rows: Rows) -> None:
    arguments = training_arguments(TuneConfig(), tmp_path, SeedTree(0))
    arguments.logging_steps = 2
    with pytest.raises(ValueError, match="`logging_steps` must be 1"):
        SparseTrainer(sparse(), arguments, stream=FixedRows(packed_rows(1)))


def test_the_model_is_given_back_as_it_was(tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(2)
    model = tiny_model("mixtral")
    trainer, _ = reports_of(
        tmp_path, model, rows, rows_per_step=2, precision="bfloat16", gradient_checkpointing=True
    )
    trainer.close()
    fresh = tiny_model("mixtral")
    fresh.load_state_dict(model.state_dict())
    tokens = {"input_ids": torch.arange(10).unsqueeze(0) + 3}
    with torch.no_grad():
        # Not through autocast any more.
        assert torch.equal(model(**tokens).logits, fresh(**tokens).logits)
    assert not model.training
    assert not model.is_activation_checkpointing
    assert model.config.use_cache is True
    assert all(parameter.grad is None for parameter in model.parameters())


def test_router_config_defaults() -> None:
    assert RouterLossConfig().to_mapping() == {
        "balance_coefficient": 0.01,
        "importance_coefficient": 0.0,
        "z_coefficient": 0.001,
        "convention": "t5x",
        "scope": "global",
    }
