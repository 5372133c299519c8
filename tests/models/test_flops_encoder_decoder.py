"""FLOPs of encoder-decoders against torch's own counter, hand formulas and published figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, NllbMoeConfig, PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.encoder_decoder import attention_layers, cross_attention, sides
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config
from flanmoe.models.flan_moe_t5.named import named_config
from flanmoe.models.flops import count_encoder_decoder_flops, count_flops
from flanmoe.testing.tiny_models import ENCODER_DECODER_NAMES, tiny_model

_OURS = {
    "dense": {"num_decoder_layers": 3, "feed_forward_proj": "relu", "tied_head": True},
    "top_k": {
        "encoder_router": {"kind": "top_k", "num_experts": 8, "top_k": 3},
        "decoder_router": {"kind": "top_k", "num_experts": 4, "top_k": 2},
        "expert_width": 24,
    },
    "switch": {
        "encoder_router": {"kind": "switch", "num_experts": 8},
        "num_decoder_layers": 1,
    },
    "expert_choice": {
        "encoder_router": {"kind": "expert_choice", "num_experts": 8, "capacity_factor": 1.5},
        "decoder_router": {"kind": "gshard", "num_experts": 8},
    },
    "st_moe": {
        "encoder_router": {"kind": "st_moe", "num_experts": 8},
        "decoder_router": {"kind": "st_moe", "num_experts": 8},
        "extra_dense_ffn": True,
        "num_layers": 4,
        "num_decoder_layers": 2,
    },
}


def _config(name: str) -> FlanMoeT5Config:
    shape = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    return FlanMoeT5Config(**{**shape, "num_layers": 2, **_OURS[name]})


def _model(name: str) -> PreTrainedModel:
    # Eager attention: torch's counter does not see into the fused kernels on the CPU.
    if name in ENCODER_DECODER_NAMES:
        return tiny_model(name, attn_implementation="eager")
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(_config(name), attn_implementation="eager").eval()


def _counted_by_torch(model: PreTrainedModel, input_length: int, target_length: int) -> int:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randint(3, 128, (1, length), generator=generator)
        for length in (input_length, target_length)
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=inputs, decoder_input_ids=targets, use_cache=False)
    return counter.get_total_flops()


# Experts of `expert_choice` take whole numbers of tokens at multiples of 16.
@pytest.mark.parametrize("lengths", [(16, 16), (32, 5), (16, 23)])
@pytest.mark.parametrize("name", [*ENCODER_DECODER_NAMES, *_OURS])
def test_equals_torchs_counter(name: str, lengths: tuple[int, int]) -> None:
    inputs, targets = lengths
    model = _model(name)
    count = count_encoder_decoder_flops(model, input_length=inputs, target_length=targets)
    # Eager attention computes the whole square, of which a causal kernel leaves out what is above the diagonal.
    square = sum(
        2 * sum(layer.widths) * (targets - (targets + 1) / 2)
        for layer in attention_layers(sides(model).decoder)
        if not layer.crosses
    )
    found = _counted_by_torch(model, inputs, targets)
    assert found == count.per_example + targets * square
    assert count.training_per_example == 3 * count.per_example


def test_a_sparse_t5_by_hand() -> None:
    count = count_encoder_decoder_flops(_config("top_k"), input_length=10, target_length=20)
    attention, dense, expert = 4 * 32 * 32, 3 * 32 * 64, 3 * 32 * 24
    crossing = 2 * (2 * 32 * 32)
    assert count.encoder.body == 2 * (2 * attention + dense + (3 * expert + 8 * 32) + crossing)
    assert count.decoder.body == 2 * (4 * attention - crossing + dense + (2 * expert + 4 * 32))
    assert (count.encoder.router, count.decoder.router) == (2 * 8 * 32, 2 * 4 * 32)
    assert (count.encoder.head, count.decoder.head) == (0, 2 * 128 * 32)
    assert count.encoder.attention_scores == 2 * (2 * 64 * 10)
    assert count.decoder.attention_scores == 2 * (2 * 64 * 10.5) + 2 * (2 * 64 * 10)
    assert (count.encoder.context_length, count.decoder.context_length) == (10, 20)
    assert count.mean == (count.encoder.body + count.decoder.body) / 2


def test_expert_choice_costs_its_capacity_factor() -> None:
    lengths = {"input_length": 16, "target_length": 16}
    config = _config("expert_choice")
    assert config.encoder_router is not None
    usual = count_encoder_decoder_flops(config, **lengths)
    config.encoder_router["capacity_factor"] = 2.5
    more = count_encoder_decoder_flops(config, **lengths)
    assert more.encoder.body - usual.encoder.body == 2 * 3 * 32 * 64
    assert more.decoder == usual.decoder
    # More experts than there are do not see a token.
    config.encoder_router["capacity_factor"] = 1000.0
    most = count_encoder_decoder_flops(config, **lengths)
    assert most.encoder.body - usual.encoder.body == round(6.5 * 2 * 3 * 32 * 64)


@pytest.mark.parametrize("name", [*ENCODER_DECODER_NAMES, "expert_choice"])
def test_one_token_is_half_an_inputs_and_half_a_targets(name: str) -> None:
    model = _model(name)
    apart = count_encoder_decoder_flops(model, input_length=7, target_length=7)
    count = count_flops(model, context_length=7)
    assert count.total == (apart.encoder.total + apart.decoder.total) / 2
    assert count.router == (apart.encoder.router + apart.decoder.router) / 2
    assert count.body == apart.mean
    assert count.context_length == 7


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("t5_base", 0.20),
        ("t5_large", 0.72),
        ("t5_xl", 2.7),
        ("t5_xxl", 10.9),
    ],
)
def test_dense_shapes_cost_what_the_formula_says(name: str, billions: float) -> None:
    count = count_encoder_decoder_flops(named_config(name), input_length=1, target_length=1)
    assert count.mean / 1e9 == pytest.approx(billions, rel=0.02)


def test_the_largest_st_moe() -> None:
    """FLAN-MoE states 32.1 billion; 2 operations for each weight that a token passes come to 34.7."""
    count = count_encoder_decoder_flops(
        named_config("st_moe_32b"), input_length=2048, target_length=512
    )
    attention, ffn = 4 * 5120 * 64 * 128, 3 * 5120 * 20480
    feed_forward = 18 * ffn + 6 * (2 * ffn + 64 * 5120 + ffn)
    assert count.mean == 2 * (1.5 * 24 * attention + feed_forward)
    assert count.mean / 1e9 == pytest.approx(34.7, rel=0.01)


def test_weights_do_not_matter() -> None:
    for name in ("t5", "switch_transformers"):
        model = _model(name)
        lengths = {"input_length": 9, "target_length": 4}
        assert count_encoder_decoder_flops(model, **lengths) == count_encoder_decoder_flops(
            model.config, **lengths
        )


def test_a_decoder_has_no_inputs_to_count_apart() -> None:
    with pytest.raises(
        ModelError, match=r"but LlamaForCausalLM is none\. Count it as a decoder\.$"
    ):
        count_encoder_decoder_flops(tiny_model("llama"), input_length=4, target_length=4)


def test_experts_that_cannot_be_read_are_refused() -> None:
    config = NllbMoeConfig(
        vocab_size=128,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=4,
    )
    with pytest.raises(ModelError, match=r"but those of .* are behind NllbMoeTop2Router\."):
        count_encoder_decoder_flops(config, input_length=4, target_length=4)


def test_attention_that_cannot_be_read_is_refused() -> None:
    model = tiny_model("t5")
    with pytest.raises(ModelError, match="but T5Stack has nothing of that name"):
        cross_attention(model.get_encoder())
    with pytest.raises(ModelError, match="but Linear has none of these names"):
        attention_layers(model.get_submodule("lm_head"))
