"""Upcycling of T5: exact where gates sum to 1, a printed gap where not, and nothing is left behind."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.upcycle import T5UpcycleConfig, sparse_t5_config, upcycle_t5
from flanmoe.models.loading import load_model, save_model
from flanmoe.models.row_flops import count_row_flops
from flanmoe.models.upcycle import UpcycleConfig, check_step0, step0_max_abs_diff, upcycle
from flanmoe.moe.block import ExpertWeights
from flanmoe.testing.contracts import check_counts, check_experts_read_back
from flanmoe.testing.tiny_models import tiny_model, tiny_text_tokenizer

TOP_K = {"kind": "top_k", "num_experts": 8, "init_std": 1.0}
STRAIGHT = {"kind": "switch", "num_experts": 4, "gate": "straight_through", "init_std": 1.0}
SWITCH = {**STRAIGHT, "gate": "probability"}
GSHARD = {"kind": "gshard", "num_experts": 4, "init_std": 1.0}
EXPERT_CHOICE = {"kind": "expert_choice", "num_experts": 4, "init_std": 1.0}

EXACT: dict[str, dict[str, Any]] = {
    "copy": {"encoder_router": TOP_K, "decoder_router": {**TOP_K, "top_k": 3}},
    "granular": {"mode": "granular", "encoder_router": TOP_K, "decoder_router": TOP_K},
    "two groups of four": {
        "mode": "granular",
        "granularity": 4,
        "encoder_router": {**TOP_K, "num_experts": 16, "top_k": 8},
        "decoder_router": {**TOP_K, "num_experts": 12, "top_k": 4},
    },
    "straight through": {"encoder_router": STRAIGHT, "decoder_router": STRAIGHT},
    "second choices": {"encoder_router": GSHARD, "decoder_router": {**GSHARD, "kind": "st_moe"}},
    "encoder": {"encoder_router": TOP_K, "encoder_every": 1},
    "decoder": {"decoder_router": TOP_K, "decoder_every": 3, "placement": "second"},
    "beside a dense FFN": {
        "encoder_router": TOP_K,
        "decoder_router": STRAIGHT,
        "extra_dense_ffn": True,
    },
}


def dense_t5(kind: str, **values: Any) -> PreTrainedModel:
    """T5 with its tied head, T5.1.1 with one of its own, or a dense FlanMoeT5 like it."""
    shape = {"d_ff": 48, "num_layers": 3, **values}
    if kind == "t5":
        return tiny_model("t5", feed_forward_proj="relu", **shape)
    model = tiny_model("t5", tie_word_embeddings=False, **shape)
    # transformers ties the head of every new T5.
    weight = torch.randn(model.shared.weight.shape, generator=torch.Generator().manual_seed(5))
    model.lm_head.weight = nn.Parameter(weight / math.sqrt(model.config.d_model))
    if kind == "flan_moe_t5":
        config = FlanMoeT5Config(
            **{
                name: getattr(model.config, name)
                for name in ("vocab_size", "d_model", "d_kv", "num_heads")
            },
            **shape,
        )
        ours = FlanMoeT5ForConditionalGeneration(config).eval()
        ours.load_state_dict(model.state_dict())
        return ours
    return model


KINDS = ("t5", "t5.1.1", "flan_moe_t5")


def tokens(rows: int = 2, length: int = 24, *, seed: int = 0) -> Tensor:
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(), decoder_input_ids=tokens(length=9, seed=1), **inputs).logits


def made(
    dense: PreTrainedModel, values: dict[str, Any], seed: int = 0
) -> FlanMoeT5ForConditionalGeneration:
    return upcycle_t5(dense, T5UpcycleConfig.parse(values), SeedTree(seed))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_ones_equal_the_dense_model_in_double_precision(kind: str, name: str) -> None:
    dense = dense_t5(kind).double()
    config = T5UpcycleConfig.parse(EXACT[name])
    sparse = upcycle_t5(dense, config, SeedTree(0))
    # Padding too: what it is routed to must not matter.
    mask = torch.ones_like(tokens())
    mask[0, 11:] = 0
    found, expected = (logits(model, attention_mask=mask) for model in (sparse, dense))
    assert expected.std() > 0.1
    # T5's norms go through float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert config.exact
    assert check_step0(dense, sparse, tokens(), config) < 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_every_expert_of_an_exact_model_is_used(name: str) -> None:
    # Or experts that nobody asks would not have been compared.
    sparse = made(dense_t5("t5"), EXACT[name])
    used: dict[str, Tensor] = {}
    for block in moe_blocks(sparse):
        block.router.register_forward_hook(
            lambda m, a, routing, name=block.name: used.update({name: routing.expert_counts()})
        )
    with torch.no_grad():
        sparse(tokens(32, 16), decoder_input_ids=tokens(32, 16, seed=1))
    assert len(used) == len(moe_blocks(sparse))
    assert all(int(counts.min()) > 0 for counts in used.values())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"encoder_router": SWITCH}, "Mode `copy` with `gate: probability` of `encoder_router`"),
        (
            {"encoder_router": EXPERT_CHOICE, "decoder_router": {**TOP_K, "normalize": False}},
            "Mode `copy` with `kind: expert_choice.v1` of `encoder_router` and `normalize: false` of "
            "`decoder_router`",
        ),
        (
            {"decoder_router": {**GSHARD, "normalize": False}},
            "Mode `copy` with `normalize: false` of `decoder_router`",
        ),
        (
            {"decoder_router": {**GSHARD, "evaluation_second_choice": "none"}},
            "Mode `copy` with `evaluation_second_choice: none` of `decoder_router`",
        ),
        (
            {"encoder_router": {**STRAIGHT, "capacity": {"evaluation": 0.5, "minimum": 1}}},
            "Mode `copy` with `capacity.evaluation: 0.5` of `encoder_router`",
        ),
        (
            {"encoder_router": {**GSHARD, "capacity": {"evaluation": 0.5, "minimum": 1}}},
            "Mode `copy` with `capacity.evaluation: 0.5` of `encoder_router`",
        ),
        ({"encoder_router": TOP_K, "mode": "noise"}, "Mode `noise`"),
        ({"encoder_router": TOP_K, "mode": "drop"}, "Mode `drop`"),
    ],
)
@pytest.mark.parametrize("kind", ["t5", "t5.1.1"])
def test_the_gap_of_others_is_printed(
    kind: str, values: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_t5(kind)
    config = T5UpcycleConfig.parse(values)
    gap = check_step0(dense, upcycle_t5(dense, config, SeedTree(0)), tokens(), config)
    assert not config.exact
    assert gap > 1e-2
    printed = " ".join(capsys.readouterr().err.split())
    assert printed == (
        f"{reason} changes the model: its logits differ from the dense model's by up to {gap:.3g} before any "
        "training."
    )


def test_an_exact_one_that_differs_is_refused() -> None:
    dense, config = dense_t5("t5"), T5UpcycleConfig.parse(EXACT["copy"])
    sparse = upcycle_t5(dense, config, SeedTree(0))
    block = moe_blocks(sparse)[-1]
    for index in range(block.num_experts):
        weights = block.read_expert(index)
        block.write_expert(index, ExpertWeights(weights.gate, weights.up, weights.down * 1.5))
    with pytest.raises(ModelError, match=r"must equal the dense model's within 0.001 in float32, "):
        check_step0(dense, sparse, tokens(), config)


def test_both_sides_are_compared() -> None:
    dense = dense_t5("t5")
    for name in ("encoder.block.1.layer.1", "decoder.block.1.layer.2"):
        other = dense_t5("t5")
        other.get_parameter(f"{name}.DenseReluDense.wo.weight").data *= 1.5
        assert step0_max_abs_diff(dense, other, tokens()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_the_ffn_of_their_place(kind: str) -> None:
    dense = dense_t5(kind)
    sparse = made(dense, EXACT["granular"])
    blocks = {block.name: block for block in moe_blocks(sparse)}
    assert list(blocks) == ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"]
    for name, block in blocks.items():
        check_counts(block)
        check_experts_read_back(block)
        ffn = dense.get_submodule(name.removesuffix("mlp") + "DenseReluDense")
        gate, up = (None, ffn.wi) if kind == "t5" else (ffn.wi_0, ffn.wi_1)
        for index in range(8):
            units = slice(24 * (index % 2), 24 * (index % 2) + 24)
            expert = block.read_expert(index)
            assert torch.equal(expert.up, up.weight[units])
            assert torch.equal(expert.down, 2 * ffn.wo.weight[:, units])
            assert (expert.gate is None) == (gate is None)
            assert gate is None or torch.equal(expert.gate, gate.weight[units])
        rows = block.router.weight.detach()
        assert torch.equal(rows[0::2], rows[1::2])
        assert not torch.equal(rows[0], rows[2])
        assert 0.8 < float(rows.std()) < 1.2


@pytest.mark.parametrize("width", [None, 20])
def test_the_extra_dense_ffn_is_the_layers_own_but_silent(width: int | None) -> None:
    dense = dense_t5("t5.1.1")
    sparse = made(dense, {**EXACT["beside a dense FFN"], "extra_ffn_width": width}).train()
    for own, extra in (
        ("encoder.block.1.layer.1", "encoder.block.1.layer.2"),
        ("decoder.block.1.layer.2", "decoder.block.1.layer.3"),
    ):
        source, made_of = dense.get_submodule(own), sparse.get_submodule(extra)
        for name, parameter in made_of.named_parameters():
            if name == "DenseReluDense.wo.weight":
                assert parameter.shape == (32, width or 48)
                assert not parameter.any()
            else:
                units = width if "wi" in name else None
                assert torch.equal(parameter, source.get_parameter(name)[:units])
    assert step0_max_abs_diff(dense, sparse, tokens()) < 1e-4
    sparse(tokens(), labels=tokens(length=9)).loss.backward()
    # It does not stay silent.
    assert made_of.DenseReluDense.wo.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_settings_are_carried_over(kind: str) -> None:
    values = {
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 0.3,
        "num_decoder_layers": 2,
        "dropout_rate": 0.25,
    }
    dense = dense_t5(kind, **values)
    dense.generation_config.max_new_tokens = 17
    sparse = made(dense, EXACT["encoder"])
    assert step0_max_abs_diff(dense, sparse, tokens()) < 1e-4
    assert (
        step0_max_abs_diff(
            dense, dense_t5(kind, **(values | {"layer_norm_epsilon": 1e-6})), tokens()
        )
        > 1e-3
    )
    assert {name: getattr(sparse.config, name) for name in values} == values
    assert (sparse.lm_head.weight is sparse.shared.weight) == (kind == "t5")
    assert sparse.config.tied_head == sparse.config.scale_decoder_outputs == (kind == "t5")
    assert sparse.generation_config.max_new_tokens == 17
    assert not sparse.training


def test_a_head_that_is_tied_although_nothing_is_scaled() -> None:
    dense = tiny_model("t5", tie_word_embeddings=False)
    assert dense.lm_head.weight is dense.shared.weight
    sparse = made(dense, EXACT["copy"])
    assert sparse.lm_head.weight is sparse.shared.weight
    assert not sparse.config.scale_decoder_outputs
    assert step0_max_abs_diff(dense, sparse, tokens()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_gives_the_same_logits_to_the_bit(kind: str, tmp_path: Path) -> None:
    sparse = made(dense_t5(kind), EXACT["beside a dense FFN"])
    save_model(sparse, tiny_text_tokenizer(), tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(logits(loaded), logits(sparse))
    assert (loaded.lm_head.weight is loaded.shared.weight) == (kind == "t5")


def test_the_dense_model_stays_and_shares_nothing() -> None:
    dense = dense_t5("t5.1.1")
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = made(dense, EXACT["beside a dense FFN"])
    for parameter in sparse.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_draws_depend_on_seed_side_layer_and_expert_only() -> None:
    values = {"mode": "noise", "encoder_router": TOP_K, "encoder_every": 1, "decoder_router": TOP_K}
    wider = {**values, "encoder_router": {**TOP_K, "num_experts": 9}}
    dense = dense_t5("t5")
    models = [
        made(dense, values),
        made(dense, values),
        made(dense, values, seed=1),
        made(dense, wider),
    ]
    blocks = [{block.name: block for block in moe_blocks(model)} for model in models]
    second, decoder = "encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"
    experts = [own[second].read_expert(2).up for own in blocks]
    assert torch.equal(experts[0], experts[1])
    assert not torch.equal(experts[0], experts[2])
    assert torch.equal(experts[0], experts[3])
    rows = [
        blocks[0][name].router.weight for name in ("encoder.block.0.layer.1.mlp", second, decoder)
    ]
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])


def test_the_dtype_is_the_dense_models_but_for_routers() -> None:
    dense = dense_t5("t5.1.1").to(torch.bfloat16)
    config = T5UpcycleConfig.parse(EXACT["granular"])
    sparse = upcycle_t5(dense, config, SeedTree(0))
    for name, parameter in sparse.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    assert check_step0(dense, sparse, tokens(), config) < 1e-4
    assert logits(sparse).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["two groups of four", "decoder", "beside a dense FFN"])
def test_the_planned_configuration_is_that_of_the_model(kind: str, name: str) -> None:
    dense = dense_t5(kind)
    config = T5UpcycleConfig.parse(EXACT[name])
    planned = sparse_t5_config(dense.config, config)
    sparse = upcycle_t5(dense, config, SeedTree(0))
    shapes = {name: parameter.shape for name, parameter in sparse.named_parameters()}
    with torch.device("meta"):
        empty = FlanMoeT5ForConditionalGeneration(planned)
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "a sparse T5 needs `encoder_router`, `decoder_router` or both, but found neither"),
        (
            {"encoder_router": {"num_experts": 4}},
            "encoder_router: found no router: a router must name its `kind`",
        ),
        (
            {"decoder_router": "top_k"},
            "decoder_router: must be the settings of a router, such as {kind: top_k",
        ),
        (
            {"encoder_router": {"kind": "topk", "num_experts": 4}},
            "encoder_router: found no router: The router `topk` is not known. Did you mean `top_k`?",
        ),
        (
            {"decoder_router": {**TOP_K, "topk": 2}},
            "decoder_router.topk: found no option `topk` of the router `top_k.v1`. Did you mean `top_k`? "
            "Known: `num_experts`",
        ),
        (
            {"decoder_router": {**SWITCH, "capacity": {"eval": 2.0}}},
            "decoder_router.capacity.eval: found no option `eval` of the router `switch.v1`. Known: `train`, "
            "`evaluation`",
        ),
        (
            {"encoder_router": {"kind": "top_k"}},
            "encoder_router.num_experts: is required, but missing.",
        ),
        (
            {"encoder_router": {**TOP_K, "top_k": 9}},
            "encoder_router: `top_k` must be at most `num_experts` (8), but is 9",
        ),
        (
            {"decoder_router": EXPERT_CHOICE},
            "`decoder_router` must not look at later tokens, but is one that does: `expert_choice` lets each",
        ),
        (
            {"decoder_router": {**SWITCH, "order": "batch_priority"}},
            "`decoder_router` must not look at later tokens, but is one that does: `order: batch_priority`",
        ),
        (
            {"encoder_router": TOP_K, "decoder_every": 4},
            "`decoder_every` only has an effect with `decoder_router`, but is 4 without it; leave it out",
        ),
        (
            {"encoder_router": TOP_K, "granularity": 4},
            "`granularity` only has an effect in mode `granular` or `sliced`",
        ),
        (
            {"mode": "granular", "encoder_router": {**TOP_K, "top_k": 3}},
            "`encoder_router.top_k` must be a multiple of `granularity` (2), but is 3: a token needs every",
        ),
        (
            {"mode": "granular", "encoder_router": {**TOP_K, "num_experts": 7}},
            "`encoder_router.num_experts` must be a multiple of `granularity` (2), but is 7",
        ),
        *(
            (
                {"mode": "granular", "encoder_router": router},
                "`encoder_router` must be `top_k` with `normalize: true` in mode `granular`, but is "
                f"`{kind}.v1`: {reason}; use `mode: sliced` or `mode: copy`",
            )
            for router, kind, reason in (
                (STRAIGHT, "switch", "a token visits one expert, which is one slice of the FFN"),
                (
                    GSHARD,
                    "gshard",
                    "a second choice that is given up or does not fit leaves a token with half an FFN",
                ),
                (EXPERT_CHOICE, "expert_choice", "the gates of an FFN's slices do not sum to 1"),
                (
                    {**TOP_K, "normalize": False},
                    "top_k",
                    "with `normalize: false` the gates of an FFN's slices do not sum to 1",
                ),
            )
        ),
    ],
)
def test_bad_values_are_refused_in_words(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        T5UpcycleConfig.parse(values)
    assert message in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match="has 3 problems") as caught:
        T5UpcycleConfig.parse(
            {
                "encoder_router": {"kind": "top_k"},
                "decoder_router": {**TOP_K, "jitter": 2},
                "modus": "copy",
            }
        )
    for path in ("encoder_router.num_experts", "decoder_router.jitter", "modus"):
        assert f"  {path}: " in str(caught.value)


@pytest.mark.parametrize("name", EXACT)
def test_a_resolved_config_reads_back(name: str) -> None:
    config = T5UpcycleConfig.parse(EXACT[name])
    assert T5UpcycleConfig.parse(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("shape", "values", "message"),
    [
        (
            {"d_ff": 50},
            {"mode": "granular", "granularity": 4, "encoder_router": {**TOP_K, "top_k": 4}},
            "The FFN's width (50) must be a multiple of `granularity`, but `granularity` is 4. Choose a "
            "divisor of the width.",
        ),
        (
            {},
            {**EXACT["beside a dense FFN"], "extra_ffn_width": 49},
            "`extra_ffn_width` must be at most the FFN's width (48), whose units it takes, but is 49. "
            "Lower it, or leave it out for all of them.",
        ),
        (
            {"num_decoder_layers": 2},
            {"decoder_router": TOP_K, "decoder_every": 3},
            "`decoder_every` must leave a sparse layer, but with 3 and `placement: last` none of the 2 layers "
            "of the decoder is one. Lower it, or leave `decoder_router` out.",
        ),
        (
            {"num_layers": 1},
            {"encoder_router": TOP_K, "encoder_every": 3, "placement": "second"},
            "`encoder_every` must leave a sparse layer, but with 3 and `placement: second` none of the 1 "
            "layers of the encoder is one. Lower it, or leave `encoder_router` out.",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    shape: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        made(dense_t5("t5.1.1", **shape), values)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["llama", "bart", "switch_transformers"])
def test_other_bases_are_refused(name: str) -> None:
    other = tiny_model(name)
    config = T5UpcycleConfig.parse(EXACT["copy"])
    with pytest.raises(
        ModelError,
        match=rf"with its head, or a dense FlanMoeT5, but it is a {type(other).__name__}",
    ):
        upcycle_t5(other, config, SeedTree(0))
    with pytest.raises(
        ModelError, match=f"but its type is `{name}`. A decoder is upcycled without"
    ):
        sparse_t5_config(other.config, config)


def test_a_sparse_base_is_refused() -> None:
    sparse = made(dense_t5("t5"), EXACT["encoder"])
    with pytest.raises(ModelError, match="must be dense, but this FlanMoeT5 is sparse already"):
        made(sparse, EXACT["decoder"])


@pytest.mark.parametrize("kind", ["t5", "flan_moe_t5"])
def test_a_t5_without_routers_is_told_to_name_them(kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        upcycle(dense_t5(kind), UpcycleConfig(), SeedTree(0))
    assert str(caught.value) == (
        f"The base of the stage `upcycle` must be a decoder, but its type is `{kind}`. Name its routers: "
        "`encoder_router` and `decoder_router` of the stage `upcycle_t5`, `--encoder-router` and "
        "`--decoder-router` of `flanmoe upcycle`."
    )


def test_parameters_that_only_one_of_the_two_has_are_named() -> None:
    dense = dense_t5("t5")
    dense.encoder.block[0].layer[0].SelfAttention.q.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(
        ModelError, match=r"do not share `encoder.block.0.layer.0.SelfAttention.q.bias`"
    ):
        made(dense, EXACT["copy"])
    dense = dense_t5("t5")
    dense.decoder.block[0].layer[0].SelfAttention.q = nn.Identity()
    with pytest.raises(
        ModelError, match=r"do not share `decoder.block.0.layer.0.SelfAttention.q.weight`"
    ):
        made(dense, EXACT["copy"])


def test_weights_that_are_not_floating_point() -> None:
    dense = dense_t5("t5")
    norm = dense.encoder.final_layer_norm
    norm.weight = nn.Parameter(norm.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ModelError, match=r"needs floating-point weights, but encoder\.final_layer_norm"
    ):
        made(dense, EXACT["copy"])


def test_slices_for_any_router_cost_what_the_ffn_costs(capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_t5("t5.1.1", d_ff=48)
    config = T5UpcycleConfig.parse(
        {
            "mode": "sliced",
            "encoder_router": {**EXPERT_CHOICE, "num_experts": 6, "capacity_factor": 2.0},
            "decoder_router": {**GSHARD, "num_experts": 6},
        }
    )
    sparse = upcycle_t5(dense, config, SeedTree(0))
    ffn = dense.encoder.block[1].layer[1].DenseReluDense
    for block in moe_blocks(sparse):
        assert len(block.router.weight.unique(dim=0)) == block.num_experts == 6
    for number in range(6):
        expert = moe_blocks(sparse)[0].read_expert(number)
        units = slice(24 * (number % 2), 24 * (number % 2) + 24)
        assert torch.equal(expert.gate, ffn.wi_0.weight[units])
        assert torch.equal(expert.down, 2 * ffn.wo.weight[:, units])
    row = {"length": 32, "target_length": 8}
    costs = [count_row_flops(model, **row) for model in (dense, sparse)]
    assert costs[0].body == costs[1].body - costs[1].router
    assert check_step0(dense, sparse, tokens(), config) > 0
    assert "Mode `sliced`" in capsys.readouterr().err
