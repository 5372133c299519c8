"""FlanMoeT5 against transformers' T5, against sums written out, and against itself in other batches."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.loading import load_model
from flanmoe.moe.compute import expert_ffn_reference
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.moe.replay import RoutingReplay

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 4,
    "num_heads": 4,
}
TOP_K = {"kind": "top_k.v1", "num_experts": 4, "top_k": 2}
ROUTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top_k": (TOP_K, TOP_K),
    "switch": ({"kind": "switch.v1", "num_experts": 4}, {"kind": "switch.v1", "num_experts": 3}),
    "gshard": ({"kind": "gshard.v1", "num_experts": 4}, {"kind": "gshard.v1", "num_experts": 4}),
    "expert_choice": ({"kind": "expert_choice.v1", "num_experts": 4}, TOP_K),
    "st_moe": ({"kind": "st_moe.v1", "num_experts": 4}, {"kind": "st_moe.v1", "num_experts": 4}),
}


def model_with(routers: str, **values: Any) -> FlanMoeT5ForConditionalGeneration:
    torch.manual_seed(0)
    encoder, decoder = ROUTERS[routers]
    config = FlanMoeT5Config(
        **{**SHAPE, "encoder_router": encoder, "decoder_router": decoder, **values}
    )
    return FlanMoeT5ForConditionalGeneration(config).eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


@pytest.mark.parametrize(
    ("projection", "scaled"), [("relu", True), ("gated-gelu", False), ("gated-silu", False)]
)
def test_without_routers_it_is_t5(projection: str, scaled: bool) -> None:
    torch.manual_seed(1)
    native = T5ForConditionalGeneration(
        T5Config(
            **SHAPE,
            feed_forward_proj=projection,
            tie_word_embeddings=scaled,
            decoder_start_token_id=0,
        )
    ).eval()
    ours = FlanMoeT5ForConditionalGeneration(
        FlanMoeT5Config(
            **SHAPE, feed_forward_proj=projection, tied_head=True, scale_decoder_outputs=scaled
        )
    ).eval()
    ours.load_state_dict(native.state_dict())
    inputs, labels = tokens(3, 11), tokens(3, 7, seed=1)
    mask = torch.ones_like(inputs)
    mask[1, -4:] = 0
    batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
    found, expected = ours(**batch), native(**batch)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.3}):
        written = [
            model.generate(
                inputs, attention_mask=mask, max_new_tokens=9, do_sample=False, **options
            )
            for model in (ours, native)
        ]
        assert torch.equal(*written)


def test_first_weights_spread_as_those_of_t5() -> None:
    """Above all: not as those of plain linear layers, which transformers gives to foreign classes."""
    shape = {**SHAPE, "d_model": 64, "d_ff": 128, "d_kv": 16}
    native = T5ForConditionalGeneration(
        T5Config(**shape, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    )
    ours = FlanMoeT5ForConditionalGeneration(FlanMoeT5Config(**shape, tied_head=True))
    expected = {name: float(weight.detach().std()) for name, weight in native.named_parameters()}
    found = {name: float(weight.detach().std()) for name, weight in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, spread in expected.items():
        assert found[name] == pytest.approx(spread, rel=0.2, abs=1e-9), name


def test_first_weights_of_routers_and_experts() -> None:
    shape = {**SHAPE, "d_model": 64, "d_ff": 128, "initializer_factor": 0.5}
    router = {**TOP_K, "num_experts": 32, "init_std": 0.3}
    config = FlanMoeT5Config(**shape, encoder_router=router)
    layer: Any = FlanMoeT5ForConditionalGeneration(config).encoder.block[1].layer[1]
    spreads = [
        float(weight.detach().std())
        for weight in (
            layer.mlp.router.weight,
            layer.mlp.experts.gate_up_proj,
            layer.mlp.experts.down_proj,
        )
    ]
    # The router's own; experts as T5's FFN: factor / root of the number of inputs.
    assert spreads == pytest.approx([0.3, 0.5 * 64**-0.5, 0.5 * 128**-0.5], rel=0.05)


@pytest.mark.parametrize(
    ("placement", "every", "expected"),
    [
        ("last", 1, (0, 1, 2, 3, 4, 5)),
        ("last", 2, (1, 3, 5)),
        ("last", 3, (2, 5)),
        ("second", 1, (0, 1, 2, 3, 4, 5)),
        ("second", 2, (1, 3, 5)),
        ("second", 3, (1, 4)),
    ],
)
def test_which_layers_are_sparse(placement: str, every: int, expected: tuple[int, ...]) -> None:
    model = model_with(
        "top_k",
        num_layers=6,
        num_decoder_layers=3,
        encoder_sparse_every=every,
        sparse_placement=placement,
        decoder_router=None,
    )
    assert model.config.sparse_layers("encoder") == expected
    assert model.config.sparse_layers("decoder") == ()
    names = [block.name for block in moe_blocks(model)]
    assert names == [f"encoder.block.{layer}.layer.1.mlp" for layer in expected]


def test_a_sparse_layer_is_the_sum_over_its_experts() -> None:
    model = model_with("top_k", extra_dense_ffn=True)
    layer: Any = model.encoder.block[1].layer[1]
    hidden = torch.randn(2, 5, SHAPE["d_model"])
    normed = layer.layer_norm(hidden).flatten(0, 1)
    logits = normed @ layer.mlp.router.weight.T
    gates, experts = logits.softmax(dim=1).topk(2, dim=1)
    expected = expert_ffn_reference(
        normed, experts, gates / gates.sum(dim=1, keepdim=True), layer.mlp.experts.fused()
    )
    block: Any = model.encoder.block[1]
    seen: list[Tensor] = []
    block.layer[2].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    found = layer(hidden, valid=None, segments=None, replay=RoutingReplay())
    torch.testing.assert_close(found, hidden + expected.view_as(hidden), atol=1e-5, rtol=1e-5)
    # The extra FFN reads what the sparse layer wrote, and adds to it.
    inputs = tokens(2, 5)
    model(input_ids=inputs, labels=inputs)
    assert len(seen) == 1
    dense: Any = block.layer[2]
    torch.testing.assert_close(
        dense(seen[0]), seen[0] + dense.DenseReluDense(dense.layer_norm(seen[0]))
    )


def test_the_extra_ffn_can_be_narrower() -> None:
    model = model_with("top_k", extra_dense_ffn=True, extra_ffn_width=6)
    widths = {
        name: weight.shape[0]
        for name, weight in model.named_parameters()
        if name.endswith("wi_0.weight")
    }
    assert widths["encoder.block.1.layer.2.DenseReluDense.wi_0.weight"] == 6
    assert widths["decoder.block.3.layer.3.DenseReluDense.wi_0.weight"] == 6
    assert widths["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"] == SHAPE["d_ff"]


@pytest.mark.parametrize("routers", ROUTERS)
def test_padding_changes_nothing_and_takes_no_place(routers: str) -> None:
    model = model_with(routers)
    inputs, labels = tokens(2, 9), tokens(2, 6, seed=1)
    alone = model(input_ids=inputs[:1, :6], labels=labels[:1]).logits
    mask = torch.ones_like(inputs)
    mask[0, 6:] = 0
    recorder = RoutingRecorder(moe_blocks(model))
    with recorder.recording() as layers:
        together = model(input_ids=inputs, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)
    for routing in layers[: len(model.config.sparse_layers("encoder"))]:
        assert int(routing.valid.sum()) == 15
        assert not set(range(6, 9)) & set(routing.token_ids.tolist())


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=4))
@pytest.mark.parametrize("routers", ROUTERS)
def test_examples_of_a_packed_row_do_not_see_each_other(
    routers: str, lengths: list[tuple[int, int]]
) -> None:
    """Dropless and per-example routing, that is all of them in evaluation."""
    model = _packed_model(routers)
    inputs, targets = tokens(1, 32, seed=2), tokens(1, 24, seed=3)
    segments, decoder_segments = torch.zeros_like(inputs), torch.zeros_like(targets)
    places: list[tuple[slice, slice]] = []
    start = begin = 0
    for number, (length, width) in enumerate(lengths, start=1):
        places.append((slice(start, start + length), slice(begin, begin + width)))
        segments[0, places[-1][0]] = number
        decoder_segments[0, places[-1][1]] = number
        start, begin = start + length, begin + width
    with torch.no_grad():
        packed = model(
            input_ids=inputs,
            labels=targets,
            segment_ids=segments,
            decoder_segment_ids=decoder_segments,
        ).logits
        for own, answer in places:
            alone = model(input_ids=inputs[:, own], labels=targets[:, answer]).logits
            torch.testing.assert_close(packed[:, answer], alone, atol=2e-5, rtol=1e-4)


_PACKED: dict[str, FlanMoeT5ForConditionalGeneration] = {}


def _packed_model(routers: str) -> FlanMoeT5ForConditionalGeneration:
    return _PACKED.setdefault(routers, model_with(routers))


def test_segments_of_one_side_alone_are_refused() -> None:
    model = model_with("top_k")
    inputs = tokens(1, 4)
    with pytest.raises(ModelError, match="only those of the encoder are given"):
        model(input_ids=inputs, labels=inputs, segment_ids=torch.ones_like(inputs))


@pytest.mark.parametrize("routers", ROUTERS)
def test_writing_with_a_cache_is_writing_without(routers: str) -> None:
    model = model_with(routers)
    model.generation_config.eos_token_id = None
    inputs = tokens(3, 8)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    for beams in (1, 2):
        kept = model.generate(inputs, num_beams=beams, use_cache=True, **options)
        assert torch.equal(
            kept, model.generate(inputs, num_beams=beams, use_cache=False, **options)
        )
    greedy = torch.zeros((3, 1), dtype=torch.long)
    encoded = model.encoder(input_ids=inputs)
    for _ in range(5):
        logits = model(encoder_outputs=encoded, decoder_input_ids=greedy).logits
        greedy = torch.cat([greedy, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(model.generate(inputs, **options), greedy)
    assert torch.equal(model.generate(encoder_outputs=encoded, **options), greedy)


def test_only_the_logits_that_are_asked_for() -> None:
    model = model_with("top_k")
    inputs, labels = tokens(2, 5), tokens(2, 6, seed=1)
    decoder = model.prepare_decoder_input_ids_from_labels(labels)
    whole = model(input_ids=inputs, decoder_input_ids=decoder).logits
    some = model(
        input_ids=inputs, decoder_input_ids=decoder, logits_to_keep=torch.tensor([1, 4])
    ).logits
    torch.testing.assert_close(some, whole[:, [1, 4]])
    last = model(input_ids=inputs, decoder_input_ids=decoder, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:])


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_loads_with_the_auto_class(tmp_path: Path, tied: bool) -> None:
    model = model_with("expert_choice", extra_dense_ffn=True, tied_head=tied)
    batch = {"input_ids": tokens(2, 7), "labels": tokens(2, 5, seed=1)}
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(loaded, FlanMoeT5ForConditionalGeneration)
    assert torch.equal(loaded(**batch).logits, expected)
    assert (loaded.lm_head.weight is loaded.shared.weight) == tied
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    assert torch.equal(load_model(str(tmp_path))(**batch).logits, expected)


@pytest.mark.parametrize("change", ["missing", "foreign"])
def test_a_checkpoint_with_missing_or_foreign_tensors_is_refused(
    tmp_path: Path, change: str
) -> None:
    model = model_with("top_k")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "decoder.block.1.layer.2.mlp.router.weight"
    if change == "missing":
        weights.pop(name)
    else:
        name = "decoder.block.0.layer.2.mlp.router.weight"
        weights[name] = torch.zeros(4, 16)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=re.escape(name)):
        load_model(str(tmp_path))


def test_routers_stay_in_float32_when_the_rest_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    model_with("top_k").save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    types = {name.rpartition("mlp.")[2]: weight.dtype for name, weight in loaded.named_parameters()}
    assert types["router.weight"] == torch.float32
    assert types["experts.gate_up_proj"] == torch.bfloat16
    assert loaded(input_ids=tokens(1, 4), labels=tokens(1, 3)).logits.dtype == torch.bfloat16


def test_under_autocast_logits_of_routers_are_those_of_float32_inputs() -> None:
    model = model_with("top_k").train()
    recorder = RoutingRecorder(moe_blocks(model))
    batch = {"input_ids": tokens(2, 6), "labels": tokens(2, 4, seed=1)}
    with torch.autocast("cpu", dtype=torch.bfloat16), recorder.recording() as layers:
        loss = model(**batch).loss
    loss.backward()
    assert all(routing.logits.dtype == torch.float32 for routing in layers)
    gradients = [weight.grad for weight in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_expert_dropout_is_apart_from_dropout() -> None:
    model = model_with("top_k", dropout_rate=0.0, expert_dropout=0.5).train()
    batch = {"input_ids": tokens(2, 6), "labels": tokens(2, 4, seed=1)}
    first, second = (model(**batch).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(**batch).logits, model(**batch).logits)
    # None: as the rest of the model.
    experts: Any = model_with("top_k", dropout_rate=0.25).encoder.block[1].layer[1].mlp.experts
    assert experts.flanmoe_hidden_dropout == 0.25


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "`feed_forward_proj` must be `relu`"),
        ({"sparse_placement": "third"}, "`sparse_placement` must be `last` or `second`"),
        ({"encoder_router": {"kind": "swich"}}, "switch"),
        ({"encoder_router": {"num_experts": 3}}, "must name its `kind`"),
        ({"encoder_router": TOP_K, "encoder_sparse_every": 9}, "none of the 4 layers is sparse"),
        ({"decoder_sparse_every": 0}, "`decoder_sparse_every` must be at least 1, but is 0"),
        ({"extra_dense_ffn": True}, "but no layer is sparse"),
        (
            {"encoder_router": TOP_K, "extra_ffn_width": 8},
            "only has an effect with `extra_dense_ffn`",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        FlanMoeT5Config(**{**SHAPE, **values})
    assert said in str(error.value)


def test_experts_do_not_choose_in_the_decoder() -> None:
    config = FlanMoeT5Config(**SHAPE, decoder_router=ROUTERS["expert_choice"][0])
    with pytest.raises(ModelError, match="must not look at later tokens"):
        FlanMoeT5ForConditionalGeneration(config)
