"""Expert-specialised tuning: what is chosen trains, the rest stays to the bit, files, everything refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.freezing import what_trains
from flanmoe.models.meta import meta_model
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.statistics import ExpertStatistics, LayerStatistics, StatisticsParts
from flanmoe.testing.tiny_models import SPARSE_NAMES, tiny_model
from flanmoe.tuners.attached import has_tuner
from flanmoe.tuners.expert_selection import ExpertSelection
from flanmoe.tuners.expert_specialised import (
    ExpertSpecialisedConfig,
    ExpertSpecialisedTuner,
    most_experts,
    put_experts,
    selection_of,
)

PARTS = StatisticsParts(coactivation=False, outputs=False, logit_sample=0)


def selection_for(model: nn.Module) -> ExpertSelection:
    """Other experts in every block."""
    blocks = moe_blocks(model)
    return ExpertSelection(
        experts={block.name: (place % 3, 4 + place) for place, block in enumerate(blocks)}
    )


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def trained_steps(model: PreTrainedModel, *, steps: int = 3) -> None:
    """AdamW with weight decay on everything that it is given, as a trainer has it."""
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    model.train()
    for _ in range(steps):
        logits = model(input_ids=ids, use_cache=False).logits
        logits.logsumexp(dim=-1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def changed_experts(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, set[int]]:
    """By the name of a weight, the places along its first axis that changed; none for those that did not."""
    found: dict[str, set[int]] = {}
    for name, value in model.named_parameters():
        moved = {
            place
            for place, (new, old) in enumerate(zip(value, before[name], strict=True))
            if not torch.equal(new, old)
        }
        if moved:
            found[name] = moved
    return found


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_chosen_experts_move_and_nothing_else_does(name: str, logits: Any) -> None:
    model = tiny_model(name)
    before, expected = copies(model), logits(model)
    selection = selection_for(model)
    tuner = ExpertSpecialisedTuner(model, selection)
    torch.testing.assert_close(logits(model), expected)
    trained_steps(model)
    # While it trains not one of the model's own weights has moved.
    assert all(torch.equal(dict(model.named_parameters())[name], before[name]) for name in before)
    tuned = logits(model)
    assert (tuned - expected).abs().max() > 1e-3
    report = tuner.merge()
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-4)
    assert not has_tuner(model)
    blocks = {block.name: block for block in moe_blocks(model)}
    expected_names = {
        f"{path}.{parameter}": set(selection.experts[block])
        for block in blocks
        for path in [p for p, m in model.named_modules() if m is blocks[block].experts]
        for parameter, _ in blocks[block].experts.named_parameters()
    }
    assert changed_experts(model, before) == expected_names
    assert [(b.name, b.changed, b.left) for b in report.blocks] == [(n, 2, ()) for n in blocks]
    assert report.agreeing_share == 1
    assert copies(model).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_are_those_of_the_whole_model_cut_out() -> None:
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(2))

    def run(model: PreTrainedModel) -> PreTrainedModel:
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        return model

    whole = run(tiny_model("olmoe"))
    model = tiny_model("olmoe")
    tuner = ExpertSpecialisedTuner(model, selection_for(model))
    run(model)
    for block in moe_blocks(whole):
        chosen = tuner.chosen[block.name]
        for name, weight in chosen.weights.items():
            gradient = block.experts.get_parameter(name).grad
            assert gradient is not None
            torch.testing.assert_close(weight.grad, gradient[list(chosen.numbers)])
    assert all(
        value.grad is None for name, value in model.named_parameters() if "chosen" not in name
    )


def test_taking_off_leaves_the_model_as_it_was(logits: Any) -> None:
    model = tiny_model("gpt_oss")
    before, expected = copies(model), logits(model)
    tuner = ExpertSpecialisedTuner(model, selection_for(model))
    trained_steps(model, steps=1)
    tuner.detach()
    after = copies(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), expected)


def test_chosen_experts_without_tokens_are_named() -> None:
    model = tiny_model("olmoe")
    tuner = ExpertSpecialisedTuner(model, selection_for(model))
    with torch.no_grad():
        tuner.chosen["model.layers.0.mlp"].weights["down_proj"][1] += 1
        tuner.chosen["model.layers.1.mlp"].weights["gate_up_proj"] += 1
    report = tuner.merge()
    assert [(block.changed, block.left) for block in report.blocks] == [(1, (0,)), (2, ())]


def test_merging_nothing_is_an_error() -> None:
    tuner = ExpertSpecialisedTuner(model := tiny_model("olmoe"), selection_for(model))
    with pytest.raises(
        ModelError, match="Merging must change at least 1 expert, but changed 0 of 16"
    ):
        tuner.merge()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_saved_experts_go_into_the_plain_model(name: str, tmp_path: Path, logits: Any) -> None:
    model = tiny_model(name)
    tuner = ExpertSpecialisedTuner(model, selection_for(model))
    trained_steps(model)
    tuner.save(tmp_path)
    plain = tiny_model(name)
    assert put_experts(plain, tmp_path) == tuner.selection
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    tuner.merge()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )


def test_saved_experts_of_another_model(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    ExpertSpecialisedTuner(model, selection_for(model)).save(tmp_path)
    with pytest.raises(ModelError) as error:
        put_experts(tiny_model("olmoe"), tmp_path)
    assert str(error.value) == (
        "Saved experts must hold model.layers.0.mlp.gate_up_proj.0 of shape (48, 32), but hold shape (128, "
        "32). Name the model that they were trained in."
    )
    nothing = tmp_path / "nothing"
    with pytest.raises(ModelError) as error:
        put_experts(tiny_model("olmoe"), nothing)
    assert str(error.value) == (
        f"A folder of tuned experts must hold selected_experts.json, but {nothing} has none. Name one that "
        "flanmoe wrote."
    )


def test_the_table_counts_chosen_experts_once() -> None:
    model = tiny_model("olmoe")
    plain = what_trains(model)
    ExpertSpecialisedTuner(model, selection_for(model))
    found = what_trains(model)
    assert [part.part for part in found.parts] == [part.part for part in plain.parts]
    assert found.parameters == plain.parameters
    # Two experts in each of two blocks: gate and up 32 -> 48, down 24 -> 32.
    trained = {part.part: part.trained for part in found.parts if part.trained}
    assert trained == {"experts": 2 * 2 * (48 * 32 + 32 * 24)}


# ---- Choosing by statistics ----


def statistics_of(model: nn.Module, counts: list[list[int]]) -> ExpertStatistics:
    """Statistics in which the experts of every block have these assignments in each group."""
    assignments = torch.tensor(counts)
    layers = []
    for block in moe_blocks(model):
        empty = LayerStatistics.none(block, "decoder", len(counts), PARTS)
        sums = dataclasses.replace(
            RoutingSums.none(len(counts), block.num_experts),
            tokens=assignments.sum(dim=1),
            assignments=assignments,
            gate_mass=assignments.double().flip(1),
        )
        layers.append(dataclasses.replace(empty, sums=sums))
    return ExpertStatistics(
        layers=tuple(layers),
        groups=tuple(f"task {number}" for number in range(len(counts))),
        tokens={"decoder": int(assignments.sum())},
        parts=PARTS,
        model_hash="model",
        data_hash="data",
    )


COUNTS = [[8, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 5, 4, 1]]


def chosen_by(**settings: Any) -> tuple[int, ...]:
    model = tiny_model("olmoe")
    config = ExpertSpecialisedConfig.parse({"kind": "expert_specialised", **settings})
    selection = selection_of(config, model, statistics_of(model, COUNTS))
    (found,) = set(selection.experts.values())
    return found


def test_experts_are_chosen_by_score_share_and_groups() -> None:
    assert chosen_by(score="token", share=0.6) == (0, 5)
    assert chosen_by(score="token", share=0.6, groups=["task 1"]) == (5, 6)
    # Gates are the counts the other way round.
    assert chosen_by(score="gate", share=0.6) == (2, 7)
    # The paper's thresholds: 0.2 of the choices, 0.1 of the gates.
    assert chosen_by(score="token", groups=["task 1"]) == (5,)
    assert chosen_by(score="gate") == (7,)


def test_a_plan_counts_as_many_experts_as_can_be_chosen() -> None:
    twin = meta_model(tiny_model("olmoe").config)
    config = ExpertSpecialisedConfig(kind="expert_specialised", share=0.3)
    tuner = ExpertSpecialisedTuner(twin, most_experts(config, twin))
    assert {len(numbers) for numbers in tuner.selection.experts.values()} == {3}
    assert sum(weight.numel() for weight in tuner.trained.values()) == 2 * 3 * (48 * 32 + 32 * 24)


def test_statistics_of_another_model_or_without_a_group() -> None:
    model = tiny_model("olmoe")
    config = ExpertSpecialisedConfig(kind="expert_specialised", groups=("tsak 1",))
    with pytest.raises(ModelError) as error:
        selection_of(config, model, statistics_of(model, COUNTS))
    assert str(error.value) == (
        "`groups` must name groups of the statistics, but names `tsak 1`. Did you mean `task 1`? There are "
        "`task 0`, `task 1`."
    )
    with pytest.raises(ModelError) as error:
        selection_of(config, tiny_model("granitemoe"), statistics_of(model, COUNTS))
    assert str(error.value) == (
        "Statistics must be of the sparse blocks of GraniteMoeForCausalLM, but differ in "
        "`model.layers.0.block_sparse_moe`, `model.layers.0.mlp`, `model.layers.1.block_sparse_moe`, "
        "`model.layers.1.mlp`. Gather them with the model that is tuned."
    )


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (
            {"model.layers.0.mpl": (0,)},
            "must be of sparse blocks of the model, but some are of `model.layers.0.mpl`",
        ),
        ({"model.layers.0.mlp": ()}, "at least 1 of its experts 0 to 7, ascending, but are []"),
        ({"model.layers.0.mlp": (8,)}, "at least 1 of its experts 0 to 7, ascending, but are [8]"),
        (
            {"model.layers.0.mlp": (3, 1)},
            "at least 1 of its experts 0 to 7, ascending, but are [3, 1]",
        ),
    ],
)
def test_a_selection_that_does_not_suit(experts: dict[str, Any], message: str) -> None:
    model = tiny_model("olmoe")
    with pytest.raises(ModelError) as error:
        ExpertSpecialisedTuner(model, ExpertSelection(experts=experts))
    assert message in str(error.value)
    assert not has_tuner(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_that_run_something_else() -> None:
    model = tiny_model("olmoe")
    model.set_experts_implementation("eager")
    with pytest.raises(ModelError, match=r"those of model\.layers\.0\.mlp run `eager`"):
        ExpertSpecialisedTuner(model, selection_for(model))


def test_a_share_that_means_nothing() -> None:
    with pytest.raises(ConfigError, match="share: Input should be greater than 0, but is 0"):
        ExpertSpecialisedConfig.parse({"kind": "expert_specialised", "share": 0})
