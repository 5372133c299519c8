"""Presets against written-out names in every family, two real steps, the table, and every refusal."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.freezing import (
    FreezePreset,
    FreezePresets,
    WhatTrains,
    attention_modules,
    freeze,
    frozen,
    trains_table,
    what_trains,
)
from flanmoe.models.meta import meta_model
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

PRESETS: tuple[FreezePreset, ...] = ("gate", "experts", "moe", "non_moe", "attention")

# Where each family keeps its sparse blocks, and what the router is called there.
_BLOCKS = {
    "mixtral": ("model.layers.[01].mlp", "gate"),
    "qwen2_moe": ("model.layers.[01].mlp", "gate"),
    "qwen3_moe": ("model.layers.[01].mlp", "gate"),
    "olmoe": ("model.layers.[01].mlp", "gate"),
    "gpt_oss": ("model.layers.[01].mlp", "router"),
    # Its first layer is dense.
    "deepseek_v3": ("model.layers.[12].mlp", "gate"),
    "granitemoe": ("model.layers.[01].block_sparse_moe", "router"),
}
# Weights of all sparse blocks together, written out by hand from each architecture's source.
_IN_BLOCKS = {
    "mixtral": 2 * 3,
    "qwen2_moe": 2 * (3 + 3 + 1),
    "qwen3_moe": 2 * 3,
    "olmoe": 2 * 3,
    "gpt_oss": 2 * (2 + 4),
    "deepseek_v3": 2 * (3 + 3),
    "granitemoe": 2 * 3,
}


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _matching(names: set[str], pattern: str) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern)}


def _expected(family: str, preset: str, names: set[str]) -> set[str]:
    block, router = _BLOCKS[family]
    moe = _matching(names, f"{block}.*")
    return {
        "gate": _matching(names, f"{block}.{router}.*"),
        "experts": _matching(names, f"{block}.experts.*"),
        "moe": moe,
        "non_moe": names - moe,
        "attention": _matching(names, "model.layers.*.self_attn.*"),
    }[preset]


def _frozen_names(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.requires_grad}


def _tokens(*, rows: int = 4) -> torch.Tensor:
    return torch.randint(3, 128, (rows, 24), generator=torch.Generator().manual_seed(3))


def _two_steps(model: PreTrainedModel) -> None:
    """Train on a batch with AdamW over every parameter that has a gradient."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        tokens = _tokens()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", SPARSE_NAMES)
def test_the_named_weights_and_no_others_stay(family: str, preset: FreezePreset) -> None:
    model = tiny_model(family)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = _expected(family, preset, set(before))
    assert expected
    if preset == "moe":
        assert len(expected) == _IN_BLOCKS[family]
    freeze(model, [preset])
    assert _frozen_names(model) == expected
    _two_steps(model)
    stayed = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert stayed == expected


@pytest.mark.parametrize("family", SPARSE_NAMES)
def test_presets_add_up(family: str) -> None:
    model = tiny_model(family)
    freeze(model, ["gate", "attention"])
    names = _names(model)
    assert _frozen_names(model) == (
        _expected(family, "gate", names) | _expected(family, "attention", names)
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_without_weights_is_frozen_alike(preset: FreezePreset) -> None:
    model = meta_model(tiny_model("qwen2_moe").config)
    freeze(model, [preset])
    assert _frozen_names(model) == _expected("qwen2_moe", preset, _names(model))


@pytest.mark.parametrize("family", DENSE_NAMES)
def test_dense_models_have_attention_to_freeze(family: str) -> None:
    model = tiny_model(family)
    freeze(model, ["attention"])
    assert _frozen_names(model) == _matching(_names(model), "model.layers.*.self_attn.*")


def _small(model_type: str, **values: object) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, vocab_size=128, **values)
    return AutoModelForCausalLM.from_config(config)


def test_attention_is_found_under_other_names() -> None:
    # Neither calls its output projection `o_proj`, as all tiny models do.
    gpt2 = _small("gpt2", n_embd=32, n_layer=2, n_head=4)
    freeze(gpt2, ["attention"])
    assert _frozen_names(gpt2) == _matching(_names(gpt2), "transformer.h.*.attn.*")
    phi = _small(
        "phi", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    freeze(phi, ["attention"])
    assert _frozen_names(phi) == _matching(_names(phi), "model.layers.*.self_attn.*")


def test_where_the_decoder_layer_is_the_block_its_attention_is_outside() -> None:
    model = _small(
        "gemma4_text",
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=128,
    )
    assert [block.name for block in moe_blocks(model)] == ["model.layers.0", "model.layers.1"]
    names = _names(model)
    moe = _matching(names, "*.router.*") | _matching(names, "*.experts.*")
    with frozen(model, ["moe"]):
        assert _frozen_names(model) == moe
    with frozen(model, ["non_moe"]):
        assert _frozen_names(model) == names - moe
    with frozen(model, ["attention"]):
        assert _frozen_names(model) == _matching(names, "model.layers.*.self_attn.*")


def test_attention_modules_are_one_a_layer() -> None:
    assert len(attention_modules(tiny_model("deepseek_v3"))) == 3
    assert attention_modules(nn.Linear(2, 2)) == []


def test_a_tied_head_is_frozen_with_its_embedding() -> None:
    model = tiny_model("granitemoe")
    freeze(model, ["non_moe"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.requires_grad
    before = model.lm_head.weight.detach().clone()
    _two_steps(model)
    assert torch.equal(model.lm_head.weight, before)


def test_every_weight_trains_again_afterwards() -> None:
    model = tiny_model("mixtral")
    model.model.norm.requires_grad_(False)
    with frozen(model, ["gate", "non_moe"]):
        assert len(_frozen_names(model)) > 2
    assert _frozen_names(model) == {"model.norm.weight"}
    with pytest.raises(RuntimeError, match="stop"), frozen(model, ["experts"]):
        raise RuntimeError("stop")
    assert _frozen_names(model) == {"model.norm.weight"}


def test_nothing_to_freeze_changes_nothing() -> None:
    model = tiny_model("llama")
    with frozen(model, ()):
        assert _frozen_names(model) == set()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_router_losses_pass_a_frozen_gate(family: str) -> None:
    """What a frozen gate scores still depends on the layers before it, and so does its loss."""
    model = tiny_model(family).train()
    logits: list[torch.Tensor] = []
    moe_blocks(model)[0].router.register_forward_hook(
        lambda module, inputs, output: logits.append(output[0])
    )
    with frozen(model, ["gate"]):
        model(_tokens(), use_cache=False)
        logits[0].logsumexp(dim=-1).square().mean().backward()
    assert moe_blocks(model)[0].router.weight.grad is None
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("presets", [["non_moe"], ["non_moe", "gate"], ["experts", "attention"]])
def test_gradients_with_frozen_parts_are_those_of_the_whole(
    presets: list[FreezePreset], checkpointing: bool
) -> None:
    whole = tiny_model("mixtral").double().train()
    model = copy.deepcopy(whole)
    if checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    freeze(model, presets)
    for one in (whole, model):
        one(_tokens(), labels=_tokens(), use_cache=False).loss.backward()
    expected = dict(whole.named_parameters())
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    for name, value in trained.items():
        torch.testing.assert_close(value.grad, expected[name].grad)
    assert all(
        value.grad is None for name, value in model.named_parameters() if name not in trained
    )


@pytest.mark.parametrize("preset", ["gate", "experts", "moe", "non_moe"])
def test_a_dense_model_has_no_sparse_part(preset: FreezePreset) -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError) as caught:
        freeze(model, [preset])
    assert str(caught.value) == (
        f"`freeze: {preset}` needs a sparse model, but LlamaForCausalLM is dense: it has no module "
        f"with a router and experts. Leave `{preset}` out, or make the model sparse first with "
        "`flanmoe upcycle`."
    )
    assert _frozen_names(model) == set()


def test_a_model_that_declares_no_attention() -> None:
    model = _small("bloom", hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError) as caught:
        freeze(model, ["attention"])
    assert str(caught.value) == (
        f"`freeze: attention` must match at least 1 of the {len(_names(model))} weights of "
        "BloomForCausalLM, but matches 0. Leave `attention` out."
    )


@pytest.mark.parametrize("presets", [["moe", "non_moe"], ["gate", "experts", "non_moe"]])
def test_something_must_train(presets: list[FreezePreset]) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ModelError) as caught:
        freeze(model, presets)
    assert str(caught.value) == (
        f"Tuning needs at least 1 weight that trains, but `freeze: {', '.join(presets)}` leaves 0 "
        f"of the {len(_names(model))} of MixtralForCausalLM. Leave a preset out."
    )
    assert _frozen_names(model) == set()


def test_what_was_frozen_by_hand_counts_as_frozen() -> None:
    model = tiny_model("mixtral")
    for block in moe_blocks(model):
        block.experts.requires_grad_(False)
        block.router.requires_grad_(False)
    with pytest.raises(ModelError, match="leaves 0 of the"):
        freeze(model, ["non_moe"])


class _Said(Config):
    freeze: FreezePresets = ()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (["gates"], "freeze.0: Input should be 'gate', 'experts', 'moe', 'non_moe' or 'attention'"),
        (["gate", "moe", "gate"], "freeze: must name each preset once, but found `gate` more than"),
        ("gate", "freeze: Input should be a valid tuple, but is 'gate'."),
    ],
)
def test_mistakes_in_a_file_are_named(value: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _Said.parse({"freeze": value})
    assert sentence in str(caught.value)


_EMBEDDING = 128 * 32
_ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32


def _counts(trains: WhatTrains) -> dict[str, tuple[int, int]]:
    return {part.part: (part.parameters, part.trained) for part in trains.parts}


def test_what_trains_in_qwen2_moe_by_hand() -> None:
    model = tiny_model("qwen2_moe")
    sizes = {
        "gate": 2 * 8 * 32,
        "experts": 2 * 8 * 3 * 32 * 24,
        "other_moe": 2 * (3 * 32 * 40 + 32),
        "attention": 2 * (_ATTENTION + 32 + 2 * 16),
        "embeddings": 2 * _EMBEDDING,
        "other": 2 * 2 * 32 + 32,
    }
    assert _counts(what_trains(model)) == {part: (size, size) for part, size in sizes.items()}
    freeze(model, ["gate", "attention"])
    found = what_trains(model)
    assert _counts(found) == {
        part: (size, 0 if part in ("gate", "attention") else size) for part, size in sizes.items()
    }
    assert [part.share for part in found.parts] == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.parameters - found.trained == sizes["gate"] + sizes["attention"]
    assert WhatTrains.parse(found.to_mapping()) == found


def test_what_trains_in_a_dense_model_counts_a_tied_head_once() -> None:
    found = what_trains(tiny_model("llama"))
    dense_layers = 2 * 3 * 32 * 64
    assert _counts(found) == {
        "attention": (2 * _ATTENTION,) * 2,
        "embeddings": (_EMBEDDING,) * 2,
        "other": (dense_layers + 5 * 32,) * 2,
    }


def test_half_a_part_shows_as_half() -> None:
    model = tiny_model("mixtral")
    moe_blocks(model)[0].router.requires_grad_(False)
    gate = what_trains(model).parts[0]
    assert (gate.part, gate.trained, gate.share) == ("gate", 256, 0.5)


def test_the_table_reads_as_the_counts() -> None:
    model = tiny_model("mixtral")
    freeze(model, ["experts"])
    table = trains_table(what_trains(model))
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert rows[0] == ("gate", "512", "512", "100.0%")
    assert rows[1] == ("experts", "98,304", "0", "0.0%")
    assert rows[-1] == ("all", f"{total:,}", f"{total - 98304:,}", f"{1 - 98304 / total:.1%}")
    assert [row[0] for row in rows] == [
        "gate",
        "experts",
        "attention",
        "embeddings",
        "other",
        "all",
    ]
