"""Low-rank experts in every sparse family: training, freezing, merging, taking off, everything refused."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.freezing import what_trains
from flanmoe.models.meta import meta_model
from flanmoe.testing.tiny_models import SPARSE_NAMES, tiny_model
from flanmoe.tuners.attached import has_tuner
from flanmoe.tuners.low_rank import LowRankConfig, LowRankTuner, attach_low_rank
from flanmoe.tuners.merging import merge_sentence

EVERYTHING = {
    "rank": 3,
    "linear": {"targets": ["o_proj"], "router": True, "rank": 2, "alpha": 4.0},
}


def tiny_flan_moe_t5() -> PreTrainedModel:
    config = FlanMoeT5Config(
        vocab_size=128,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        encoder_router={"kind": "gshard", "num_experts": 4},
        decoder_router={"kind": "gshard", "num_experts": 4},
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return FlanMoeT5ForConditionalGeneration(config).eval()


def sparse_model(name: str) -> PreTrainedModel:
    return tiny_flan_moe_t5() if name == "flan_moe_t5" else tiny_model(name)


def attached(model: PreTrainedModel, **settings: Any) -> LowRankTuner:
    config = LowRankConfig.parse({"kind": "low_rank", **settings})
    return attach_low_rank(model, config, torch.Generator().manual_seed(0))


def fill(tuner: LowRankTuner, *, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuner.trained.values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained_steps(model: PreTrainedModel, *, steps: int = 2) -> None:
    """AdamW with weight decay on everything that it is given, as a trainer has it."""
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(2))
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    model.train()
    for _ in range(steps):
        model(**inputs).logits.logsumexp(dim=-1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


FAMILIES = (*SPARSE_NAMES, "flan_moe_t5")


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_else_stays_to_the_bit_and_all_factors_move(name: str, logits: Any) -> None:
    model = sparse_model(name)
    modules = [path for path, _ in model.named_modules()]
    before, expected = copies(model), logits(model)
    linear = {"targets": ["o"], "rank": 2} if name == "flan_moe_t5" else {"targets": ["o_proj"]}
    tuner = attached(model, rank=3, dropout=0.1, linear=linear)
    torch.testing.assert_close(logits(model), expected)
    factors = copies(model)
    trained_steps(model)
    moved = {
        path for path, value in model.named_parameters() if not torch.equal(value, factors[path])
    }
    assert moved == tuner.trained.keys()
    assert (logits(model) - expected).abs().max() > 1e-3
    tuner.detach()
    assert not has_tuner(model)
    assert equal(copies(model), before)
    assert [path for path, _ in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_merging_gives_a_plain_model_that_says_the_same(name: str, logits: Any) -> None:
    model = sparse_model(name)
    kind, names = type(model), [path for path, _ in model.named_parameters()]
    linear = None if name == "flan_moe_t5" else EVERYTHING["linear"]
    tuner = attached(model, rank=3, linear=linear)
    fill(tuner)
    tuned = logits(model)
    report = tuner.merge()
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-4)
    assert type(model) is kind
    assert [path for path, _ in model.named_parameters()] == names
    assert not has_tuner(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    blocks = moe_blocks(model)
    assert [(b.name, b.num_experts, b.changed, b.left) for b in report.blocks] == [
        (block.name, block.num_experts, block.num_experts, ()) for block in blocks
    ]
    assert report.agreeing_share == 1
    assert report.largest_difference < 1e-5
    assert report.changed == sum(block.num_experts for block in blocks)


def test_merging_names_the_experts_that_learnt_nothing() -> None:
    model = tiny_model("olmoe")
    untouched = tiny_model("olmoe")
    tuner = attached(model, rank=[2, 2, 2, 2, 2, 2, 2, 0])
    fill(tuner)
    with torch.no_grad():
        for factors in tuner.changes["model.layers.1.mlp"].factors.values():
            for expert in (2, 5):
                factors.of_expert(expert).b.zero_()
    report = tuner.merge()
    first, second = report.blocks
    # Expert 7 was not to be tuned.
    assert (first.changed, first.left) == (7, ())
    assert (second.changed, second.left) == (5, (2, 5))
    assert merge_sentence(report) == (
        "Merged: 12 of 16 experts in 2 sparse blocks changed; logits agree at 100% of a probe (largest "
        f"difference {report.largest_difference:.1e} of the largest logit); nothing to merge for experts 2, 5 "
        "of model.layers.1.mlp."
    )
    before, after = (
        moe_blocks(one)[1].experts.get_parameter("down_proj") for one in (untouched, model)
    )
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [False, False, True, False, False, True, False, True]


def test_merging_nothing_is_an_error() -> None:
    tuner = attached(tiny_model("olmoe"), rank=2)
    with pytest.raises(ModelError) as error:
        tuner.merge()
    assert str(error.value) == (
        "Merging must change at least 1 expert, but changed 0 of 16. Check that the adapter was trained."
    )


def test_what_is_too_small_for_the_weights_is_an_error() -> None:
    model = tiny_model("olmoe").bfloat16()
    tuner = attached(model, rank=2)
    fill(tuner, size=1e-6)
    with pytest.raises(ModelError) as error:
        tuner.merge()
    assert str(error.value) == (
        "Merging must change every matrix that was tuned, but 32 are as before, the first is gate_up of expert "
        "0 of model.layers.0.mlp: what was learnt is too small for their precision. Merge into a model loaded "
        "with `dtype=torch.float32`."
    )


def test_a_merge_that_changes_what_the_model_says_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("olmoe")
    tuner = attached(model, rank=2)
    fill(tuner)
    # As if the changes of the last block had been lost on the way.
    whole = dict(tuner.blocks)
    monkeypatch.setattr(tuner, "blocks", {name: whole[name] for name in list(whole)[:1]})
    detach = tuner.detach
    monkeypatch.setattr(tuner, "detach", lambda: (tuner.__dict__.update(blocks=whole), detach()))
    with pytest.raises(ModelError, match="Merging must leave the logits as they are at 90% of the"):
        tuner.merge()


def test_weights_in_bfloat16_are_tuned_by_factors_in_float32(logits: Any) -> None:
    model = tiny_model("mixtral").bfloat16()
    before = copies(model)
    tuner = attached(model, **EVERYTHING)
    assert {parameter.dtype for parameter in tuner.trained.values()} == {torch.float32}
    trained_steps(model)
    tuned = logits(model)
    tuner.detach()
    assert equal(copies(model), before)
    assert (tuned - logits(model)).abs().max() > 0.01


def test_a_tuner_on_the_meta_device_has_shapes_alone() -> None:
    config = LowRankConfig.parse({"kind": "low_rank", **EVERYTHING})
    twin = meta_model(tiny_model("mixtral").config)
    found = attach_low_rank(twin, config, torch.Generator()).trained
    real = attached(tiny_model("mixtral"), **EVERYTHING).trained
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in real.items()
    }
    assert all(value.is_meta for value in found.values())


def test_the_table_counts_adapters_apart() -> None:
    model = tiny_model("mixtral")
    plain = {part.part: part.parameters for part in what_trains(model).parts}
    attached(model, **EVERYTHING)
    found = what_trains(model)
    own, *parts = found.parts
    # Rank 3 of 8 experts, 2 layers: gate and up 32 -> 128, down 64 -> 32. Rank 2: output projections
    # 32 -> 32 and routers 32 -> 8.
    experts = 2 * 8 * 3 * (32 + 128 + 64 + 32)
    layers = 2 * 2 * (32 + 32 + 32 + 8)
    assert (own.part, own.parameters, own.trained) == (
        "adapters",
        experts + layers,
        experts + layers,
    )
    assert {part.part: part.parameters for part in parts} == plain
    assert not any(part.trained for part in parts)
    assert found.trained == own.trained


def test_the_same_generator_draws_the_same_adapter() -> None:
    one, two = (attached(tiny_model("mixtral"), **EVERYTHING) for _ in range(2))
    assert equal(copies(one.model), copies(two.model))
    other = attach_low_rank(
        tiny_model("mixtral"),
        LowRankConfig.parse({"kind": "low_rank", **EVERYTHING}),
        torch.Generator().manual_seed(1),
    )
    assert not equal(copies(one.model), copies(other.model))


def test_a_copy_of_a_tuned_model_is_tuned_too(logits: Any) -> None:
    tuner = attached(tiny_model("mixtral"), **EVERYTHING)
    fill(tuner)
    twin = copy.deepcopy(tuner.model)
    assert has_tuner(twin)
    assert torch.equal(logits(twin), logits(tuner.model))


# ---- What is refused ----


def refusal(model: PreTrainedModel, **settings: Any) -> str:
    before = [id(module) for module in model.modules()]
    with pytest.raises(ModelError) as error:
        attached(model, **settings)
    assert [id(module) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(error.value)


def test_a_dense_model() -> None:
    assert "This needs a sparse model, but LlamaForCausalLM has no module" in refusal(
        tiny_model("llama")
    )


def test_experts_that_run_something_else() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    assert refusal(model) == (
        "Tuning experts needs experts that run flanmoe's compute, but those of model.layers.0.mlp run `eager`. "
        'Call `model.set_experts_implementation("flanmoe")` first.'
    )


def test_ranks_of_other_blocks_or_too_few_experts() -> None:
    assert refusal(tiny_model("mixtral"), rank={"model.layers.0.mpl": 2}) == (
        "`rank` must name sparse blocks of the model, but names `model.layers.0.mpl`. Did you mean "
        "`model.layers.0.mlp`? There are `model.layers.0.mlp`, `model.layers.1.mlp`."
    )
    assert refusal(tiny_model("mixtral"), rank=[2, 2, 2]) == (
        "`rank` must be one number or one for each of the 8 experts of model.layers.0.mlp, but is 3 numbers."
    )


def test_a_target_that_matches_nothing() -> None:
    assert refusal(tiny_model("mixtral"), linear={"targets": ["q_porj"]}) == (
        "`linear.targets` must each name at least 1 linear layer of MixtralForCausalLM, but `q_porj` names 0. "
        "Did you mean `q_proj`? There are `q_proj`, `k_proj`, `v_proj`, `o_proj`, `lm_head`."
    )


def test_a_name_that_peft_would_take_for_that_of_experts() -> None:
    # DeepSeek-V3's shared expert is an ordinary FFN, but PEFT puts what is called so into its experts.
    model = tiny_model("deepseek_v3")
    assert refusal(model, linear={"targets": ["shared_experts.down_proj"]}) == (
        "`linear.targets` must not be names that PEFT reads as those of experts in DeepseekV3ForCausalLM, but "
        "`shared_experts.down_proj` are: what is saved could not be loaded there. Leave them out; `matrices` "
        "names those of the experts."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank": 0},
            "rank: must be at least 0 for every expert and above 0 for one of them, but is 0",
        ),
        (
            {"rank": [2, -1]},
            "must be at least 0 for every expert and above 0 for one of them, but is (2, -1)",
        ),
        ({"dropout": 1.0}, "dropout: Input should be less than 1, but is 1.0."),
        ({"matrices": []}, "matrices: Tuple should have at least 1 item after validation"),
        ({"linear": {}}, "linear: must name `targets` or set `router: true`, but found neither"),
        (
            {"linear": {"targets": ["o", "o"]}},
            "must name each layer once, but found `o` more than once",
        ),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LowRankConfig.parse({"kind": "low_rank", **settings})
    assert message in str(error.value)
