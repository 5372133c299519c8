"""Who keeps packed examples apart: the answer of the probe for every architecture at hand."""

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration, stack
from flanmoe.models.packing import keeps_examples_apart, require_packing_without_leak
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# Classes that read no restarts: positions that are learned, rotary or linear biases, and a state
# that is carried along the row.
_LEAKING: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
    "falcon": {},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mamba": {},
}
_KEEPING: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "gpt_neox": {"intermediate_size": 64},
    "gemma2": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "phi3": {"intermediate_size": 64},
}


def _foreign(name: str, options: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**_SIZES, **options))


@pytest.mark.parametrize(
    "name", [name for name in DENSE_NAMES + SPARSE_NAMES if name not in ("gpt_oss",)]
)
def test_models_of_ours_that_keep_examples_apart(name: str) -> None:
    require_packing_without_leak(tiny_model(name))


@pytest.mark.parametrize("name", _KEEPING)
def test_foreign_models_that_keep_examples_apart(name: str) -> None:
    require_packing_without_leak(_foreign(name, _KEEPING[name]))


@pytest.mark.parametrize("name", _LEAKING)
def test_models_that_leak_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="must not see each other"):
        require_packing_without_leak(_foreign(name, _LEAKING[name]))


def test_the_refusal_says_how_much_and_the_way_out() -> None:
    with pytest.raises(ModelError) as caught:
        require_packing_without_leak(tiny_model("gpt_oss"))
    message = re.fullmatch(
        r"Examples that share a row must not see each other, but the logits of an example in "
        r"GptOssForCausalLM moved by ([\d.]+) when the example before it changed \(limit "
        r"([\d.]+)\): the class does not read where an example begins\. Put one example into "
        r"each row with `packing: \{examples_per_row: 1\}`\.",
        str(caught.value),
    )
    assert message is not None
    leak, limit = map(float, message.groups())
    assert leak > 10 * limit > 0


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = tiny_model(name, attention_dropout=0.5).train()
    model.get_input_embeddings().eval()
    modes = {key: module.training for key, module in model.named_modules()}
    state = torch.get_rng_state()
    try:
        require_packing_without_leak(model)
    except ModelError:
        assert name == "gpt_oss"
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_leak_of_one_row_alone_is_a_router_tie() -> None:
    """Rounding that tips a router in one of the two rows is no leak: the other row says so."""
    model = tiny_model("mixtral")
    forward = model.forward
    calls = 0

    def tipped(**inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = forward(**inputs)
        output.logits[0, -1] += 5.0 * (calls == 2)
        return output

    model.forward = tipped
    require_packing_without_leak(model)
    assert calls == 2


def _pairs_model(**routers: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = FlanMoeT5Config(
            vocab_size=64,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            encoder_sparse_every=1,
            decoder_sparse_every=1,
            **routers,
        )
        return FlanMoeT5ForConditionalGeneration(config)


_EXPERTS = {"num_experts": 4, "init_std": 0.5, "jitter": 0.1}
_TIGHT = {"train": 0.5, "minimum": 1}
# Experts that choose among the tokens of one example, have places for those of one, or take all.
_APART: dict[str, dict[str, Any]] = {
    "dense": {},
    "expert_choice and top_k": {
        "encoder_router": {**_EXPERTS, "kind": "expert_choice"},
        "decoder_router": {**_EXPERTS, "kind": "top_k", "top_k": 2},
    },
    "places by example": {
        "encoder_router": {
            **_EXPERTS,
            "kind": "st_moe",
            "order": "batch_priority",
            "capacity": {**_TIGHT, "group": "segment"},
        },
        "decoder_router": {
            **_EXPERTS,
            "kind": "gshard",
            "capacity": {**_TIGHT, "group": "segment"},
        },
    },
    "no places in training": {
        "decoder_router": {
            **_EXPERTS,
            "kind": "switch",
            "capacity": {"train": None, "evaluation": 0.5, "group": "batch"},
        },
    },
}


@pytest.mark.parametrize("name", _APART)
def test_flan_moe_t5_keeps_examples_apart_to_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flanmoe.models.packing._TOLERANCE", 1e-5)
    require_packing_without_leak(_pairs_model(**_APART[name]))
    assert capfd.readouterr().err == ""


_CAPACITY_OF_BATCH = {
    "encoder_router": {**_EXPERTS, "kind": "switch", "capacity": {**_TIGHT, "group": "batch"}},
    "decoder_router": {**_EXPERTS, "kind": "gshard", "capacity": {**_TIGHT, "group": "batch"}},
}


def test_examples_that_meet_at_experts_are_measured_and_said(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = _pairs_model(**_CAPACITY_OF_BATCH).train()
    capacities = [block.router.capacity for block in moe_blocks(model)]
    modes = {key: module.training for key, module in model.named_modules()}
    state = torch.get_rng_state()
    require_packing_without_leak(model)
    message = re.fullmatch(
        r"Warning: Examples that share a row meet at the experts of "
        r"FlanMoeT5ForConditionalGeneration, whose places are given out among all tokens of a "
        r"batch: in a short row in training mode the logits of an example moved "
        r"by up to ([\d.]+) \(their standard deviation is ([\d.]+)\) when the example before it changed\. "
        r"`capacity: \{group: segment\}` keeps examples apart\.\n",
        capfd.readouterr().err,
    )
    assert message is not None
    moved, spread = map(float, message.groups())
    assert moved > 0.1 * spread > 0
    assert [block.router.capacity for block in moe_blocks(model)] == capacities
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("routers", [{}, _CAPACITY_OF_BATCH], ids=["dense", "capacity of batch"])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_that_leak_are_refused(
    causal: bool, routers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that forgets the examples: that among the decoder's tokens alone, or every one."""
    kept = stack.own_segment

    def forgetful(queries: torch.Tensor, keys: torch.Tensor, **options: bool) -> torch.Tensor:
        if options["causal"] or not causal:
            return kept(torch.ones_like(queries), torch.ones_like(keys), **options)
        return kept(queries, keys, **options)

    monkeypatch.setattr(stack, "own_segment", forgetful)
    with pytest.raises(ModelError, match=r"in FlanMoeT5ForConditionalGeneration moved by"):
        require_packing_without_leak(_pairs_model(**routers))


def test_an_encoder_decoder_without_segments_is_refused() -> None:
    model = tiny_model("t5")
    with pytest.raises(ModelError) as caught:
        require_packing_without_leak(model)
    assert str(caught.value) == (
        "Examples that share a row must not see each other, but T5ForConditionalGeneration is not "
        "told where one begins: it has no `segment_ids`. Put one example into each row with "
        "`packing: {examples_per_row: 1}`."
    )


@pytest.mark.parametrize(("name", "apart"), [("mixtral", True), ("gpt_oss", False)])
def test_whether_examples_are_kept_apart_can_be_asked(name: str, apart: bool) -> None:
    assert keeps_examples_apart(tiny_model(name)) == apart
