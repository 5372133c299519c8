"""Which FlanMoeT5 is a native Switch: every reason by itself, all together, and none where logits agree."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from flanmoe.core.errors import ModelError
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.configuration import SIDES
from flanmoe.models.flan_moe_t5.native import shared_settings
from flanmoe.models.flan_moe_t5.switch import to_switch
from flanmoe.models.flan_moe_t5.switch_reasons import (
    deviations_of_switch,
    reasons_against_switch,
    their_layers,
    their_step,
)

FIXED = {
    "train": 1e-9,
    "evaluation": 1e-9,
    "minimum": 5,
    "rounding": "down",
    "group": "segment",
}
NO_LIMIT = {"train": None, "evaluation": None}


def router(**values: Any) -> dict[str, Any]:
    return {"kind": "switch.v1", "num_experts": 4, "capacity": NO_LIMIT, **values}


SWITCH: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 4,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "encoder_router": router(),
    "decoder_router": router(),
    "tied_head": True,
    "scale_decoder_outputs": True,
}


def reasons(**values: Any) -> tuple[str, ...]:
    return reasons_against_switch(FlanMoeT5Config(**{**SWITCH, **values}))


def test_a_switch_has_no_reason() -> None:
    assert reasons() == ()
    assert reasons(tied_head=False, scale_decoder_outputs=False) == ()
    assert reasons(expert_width=24) == ()
    # One expert a token, weighed by its probability, never dropped: the same under another name.
    top_1 = {"kind": "top_k.v1", "num_experts": 4, "top_k": 1, "normalize": False}
    assert reasons(encoder_router=top_1) == ()
    fixed = router(capacity=FIXED)
    assert reasons(encoder_router=fixed, decoder_router=fixed) == ()


BATCH = {"train": None, "evaluation": 1e-9, "minimum": 5, "group": "batch"}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dense": ({"encoder_router": None, "decoder_router": None}, ["no layer is sparse"]),
    "gated": ({"feed_forward_proj": "gated-gelu"}, ["`feed_forward_proj` is `gated-gelu`"]),
    "width": ({"expert_width": 23}, ["`expert_width` is 23"]),
    "extra FFN": ({"extra_dense_ffn": True}, ["`extra_dense_ffn` is set"]),
    "scaled": ({"tied_head": False}, ["`tied_head` is false and `scale_decoder_outputs` true"]),
    "tied": (
        {"scale_decoder_outputs": False},
        ["`tied_head` is true and `scale_decoder_outputs` false"],
    ),
    "placement": (
        {"encoder_sparse_every": 3},
        ["3 with `sparse_placement: last`, which makes the layers 2"],
    ),
    "kind": (
        {"decoder_router": {"kind": "gshard.v1", "num_experts": 4}},
        ["`decoder_router.kind` is `gshard.v1`"],
    ),
    "expert choice": (
        {"encoder_router": {"kind": "expert_choice.v1", "num_experts": 4}},
        ["`encoder_router.kind` is `expert_choice.v1`"],
    ),
    "two experts": (
        {"encoder_router": {"kind": "top_k.v1", "num_experts": 4, "top_k": 2}},
        ["`encoder_router.top_k` is 2", "`encoder_router.normalize` is true"],
    ),
    "gate": (
        {"encoder_router": router(gate="straight_through")},
        ["`encoder_router.gate` is `straight_through`"],
    ),
    "numbers": ({"decoder_router": router(num_experts=3)}, ["4 experts and the decoder 3"]),
    "growing": (
        {"encoder_router": router(capacity={"evaluation": 2.0, "group": "segment"})},
        ["`encoder_router.capacity.evaluation` is 2, a limit that grows"],
    ),
    "batch": (
        {"encoder_router": router(capacity=BATCH), "decoder_router": router(capacity=BATCH)},
        ["`encoder_router.capacity.group` is `batch`", "`decoder_router.capacity.group`"],
    ),
    "order": (
        {
            "encoder_router": router(capacity=FIXED, order="batch_priority"),
            "decoder_router": router(capacity=FIXED),
        },
        ["`encoder_router.order` is `batch_priority`"],
    ),
    "limits": (
        {"encoder_router": router(capacity=FIXED)},
        ["takes 5 tokens of a sequence and one of the decoder any number of tokens"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_reason_is_told_by_itself(name: str) -> None:
    values, expected = CASES[name]
    found = reasons(**values)
    assert len(found) == len(expected), found
    for said, part in zip(found, expected, strict=True):
        assert part in said


def test_all_reasons_are_told_together() -> None:
    config = FlanMoeT5Config(
        **{
            **SWITCH,
            "num_layers": 8,
            "feed_forward_proj": "gated-silu",
            "expert_width": 7,
            "extra_dense_ffn": True,
            "tied_head": False,
            "encoder_sparse_every": 4,
            "encoder_router": router(
                num_experts=5,
                gate="straight_through",
                order="batch_priority",
                capacity={"evaluation": 2.0},
            ),
            "decoder_router": {"kind": "st_moe.v1", "num_experts": 4},
        }
    )
    parts = [
        "feed_forward_proj",
        "expert_width",
        "extra_dense_ffn",
        "tied_head",
        "encoder_sparse_every",
        "encoder_router.gate",
        "encoder_router.capacity.group",
        "encoder_router.capacity.evaluation",
        "encoder_router.order",
        "decoder_router.kind",
        "5 experts",
    ]
    found = reasons_against_switch(config)
    assert len(found) == len(parts)
    assert all(part in said for part, said in zip(parts, found, strict=True))
    with pytest.raises(ModelError, match="11 things") as error:
        to_switch(FlanMoeT5ForConditionalGeneration(config))
    assert all(said in str(error.value) for said in found)


@settings(max_examples=25)
@given(
    layers=st.integers(1, 9),
    every=st.integers(1, 9),
    placement=st.sampled_from(["last", "second"]),
)
def test_a_step_is_found_where_there_is_one(layers: int, every: int, placement: str) -> None:
    values = {"num_layers": layers, "encoder_sparse_every": every, "sparse_placement": placement}
    first = every - 1 if placement == "last" else min(1, every - 1)
    config = FlanMoeT5Config(
        **{**SWITCH, **values, "encoder_router": router() if first < layers else None},
        decoder_sparse_every=1,
    )
    wanted = config.sparse_layers("encoder")
    step = their_step(config, "encoder")
    # Written out: what transformers' stack makes sparse with any step.
    possible = {
        tuple(i for i in range(layers) if s > 0 and (s == 1 or i % s == 1)) for s in range(20)
    }
    assert (step is not None) == (wanted in possible)
    if step is None:
        return
    theirs = SwitchTransformersConfig(
        num_layers=layers,
        num_sparse_encoder_layers=len(wanted),
        encoder_sparse_step=step,
        **{name: value for name, value in SWITCH.items() if name in ("d_model", "d_kv", "d_ff")},
        vocab_size=3,
    )
    with torch.device("meta"):
        blocks = SwitchTransformersForConditionalGeneration(theirs).encoder.block
    assert tuple(i for i, block in enumerate(blocks) if block.is_sparse) == wanted
    assert their_layers(layers, step) == wanted


configurations = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 5),
        "num_decoder_layers": st.integers(1, 5),
        "feed_forward_proj": st.sampled_from(["relu", "silu", "gelu", "gelu_new"]),
        "encoder_sparse_every": st.integers(1, 5),
        "decoder_sparse_every": st.integers(1, 5),
        "expert_dropout": st.sampled_from([None, 0.3]),
    }
)
routers = st.fixed_dictionaries(
    {
        "jitter": st.sampled_from([0.0, 0.1]),
        "capacity": st.sampled_from([NO_LIMIT, {}, {**FIXED, "evaluation": None}]),
    }
)


def _logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(2, 61, (2, 17), generator=generator)
    labels = torch.randint(2, 61, (2, 13), generator=generator)
    with torch.no_grad():
        return model(input_ids=inputs, labels=labels).logits


@settings(max_examples=20)
@given(
    values=configurations,
    own=st.tuples(routers, routers),
    num_experts=st.integers(1, 5),
    limited=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_without_reasons_logits_are_the_same(
    values: dict[str, Any],
    own: tuple[dict[str, Any], dict[str, Any]],
    num_experts: int,
    limited: bool,
    tied: bool,
    seed: int,
) -> None:
    counts = {"encoder": values["num_layers"], "decoder": values["num_decoder_layers"]}
    sides: dict[str, Any] = {}
    for side, settings_of_side in zip(SIDES, own, strict=True):
        limit = {"capacity": {**FIXED, "minimum": 2}} if limited else {}
        made = router(**{**settings_of_side, "num_experts": num_experts, **limit})
        is_sparse = min(1, values[f"{side}_sparse_every"] - 1) < counts[side]
        sides[f"{side}_router"] = made if is_sparse else None
    assume(any(sides.values()))
    head = {"tied_head": tied, "scale_decoder_outputs": tied}
    config = FlanMoeT5Config(**{**SWITCH, **values, **sides, **head}, sparse_placement="second")
    assert reasons_against_switch(config) == ()
    torch.manual_seed(seed)
    ours = FlanMoeT5ForConditionalGeneration(config).eval()
    torch.testing.assert_close(_logits(to_switch(ours)), _logits(ours), atol=1e-5, rtol=1e-5)


def deviations(**values: Any) -> str:
    config = FlanMoeT5Config(**{**SWITCH, **values})
    assert reasons_against_switch(config) == ()
    return "; ".join(deviations_of_switch(config))


def test_deviations() -> None:
    assert deviations() == ""
    said = deviations(encoder_router=router(capacity={"train": 1.25}))
    assert said.startswith("encoder: in training transformers lets an expert take any number")
    assert "here it is a share of the tokens (`capacity.train`)" in said
    said = deviations(encoder_router=router(capacity=FIXED), decoder_router=router(capacity=FIXED))
    assert said.count("padding takes an expert's places in transformers") == 2
    assert "expert_dropout" in deviations(expert_dropout=0.2, dropout_rate=0.1)
    assert deviations(expert_dropout=0.1, dropout_rate=0.1) == ""
    said = deviations(encoder_router=router(jitter=0.01), decoder_router=router(jitter=0.02))
    assert "encoder: in training transformers has one jitter for both sides, 0.02" in said
    assert said.count("the jitter reaches the experts") == 2
    assert "batch_priority" in deviations(encoder_router=router(order="batch_priority"))


def test_every_setting_has_been_thought_of() -> None:
    # A new setting of either class fails here: add it to what is compared, and to this list.
    said_alike = set(shared_settings(FlanMoeT5Config()))
    compared = {
        "feed_forward_proj",
        "encoder_router",
        "decoder_router",
        "encoder_sparse_every",
        "decoder_sparse_every",
        "sparse_placement",
        "expert_width",
        "expert_dropout",
        "extra_dense_ffn",
        "extra_ffn_width",
        "scale_decoder_outputs",
        "tied_head",
    }
    constant = {"tie_word_embeddings", "is_encoder_decoder", "is_decoder"}
    named = {"model_type", "keys_to_ignore_at_inference", "attribute_map"}
    fields = set(FlanMoeT5Config.__annotations__) - named
    assert fields == said_alike | compared | constant
    theirs = {
        "expert_capacity",
        "num_sparse_encoder_layers",
        "num_sparse_decoder_layers",
        "num_experts",
        "router_bias",
        "router_jitter_noise",
        "router_dtype",
        "dense_act_fn",
        "tie_word_embeddings",
    }
    # Of the losses, which are the trainer's here, and stored without being read.
    unread = {
        "router_z_loss_coef",
        "router_aux_loss_coef",
        "add_router_probs",
        "router_ignore_padding_tokens",
        "add_cross_attention",
        "bos_token_id",
    }
    fields = set(SwitchTransformersConfig.__annotations__) - named
    expected = (said_alike - {"decoder_start_token_id"}) | theirs | unread
    assert fields == expected | (constant - {"tie_word_embeddings"})
