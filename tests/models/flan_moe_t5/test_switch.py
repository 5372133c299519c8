"""FlanMoeT5 against transformers' Switch with the same weights, there and back, in memory and through files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.switch import from_switch, load_switch, to_switch
from flanmoe.testing.tiny_models import tiny_model

SIDE_TABLES = ("encoder.embed_tokens", "decoder.embed_tokens")


def switch(*, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random Switch; without tied embeddings its three tables are equal, as trained ones are."""
    shape = {
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_experts": 4,
        "expert_capacity": 1000,
    }
    model = tiny_model("switch_transformers", seed=seed, **{**shape, **overrides})
    if not model.config.tie_word_embeddings:
        with torch.no_grad():
            for name in SIDE_TABLES:
                model.get_submodule(name).weight.copy_(model.shared.weight)
    return model


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Three sequences, padding on the right of the second and on the left of the third."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(2, 128, (3, 12), generator=generator)
    mask = torch.ones_like(inputs)
    mask[1, -4:] = 0
    mask[2, :5] = 0
    targets = torch.randint(2, 128, (3, 7), generator=generator)
    targets[1, -2:] = -100
    return {"input_ids": inputs, "attention_mask": mask, "labels": targets}


def logits(model: PreTrainedModel, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**{**batch(), **more}).logits


def test_steps_are_those_that_the_cases_below_are_about() -> None:
    steps = {
        (layers, sparse): switch(
            num_layers=layers, num_sparse_encoder_layers=sparse
        ).config.encoder_sparse_step
        for layers, sparse in ((4, 4), (4, 2), (6, 2), (4, 1))
    }
    assert steps == {(4, 4): 1, (4, 2): 2, (6, 2): 3, (4, 1): 4}


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [((4, 4), (4, 2)), ((4, 2), (6, 2)), ((6, 2), (4, 1)), ((4, 1), (4, 4)), ((5, 2), (3, 9))],
)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_theirs(
    encoder: tuple[int, int], decoder: tuple[int, int], tied: bool
) -> None:
    theirs = switch(
        num_layers=encoder[0],
        num_sparse_encoder_layers=encoder[1],
        num_decoder_layers=decoder[0],
        num_sparse_decoder_layers=decoder[1],
        tie_word_embeddings=tied,
    )
    ours = from_switch(theirs)
    sparse = [block.is_sparse for block in (*theirs.encoder.block, *theirs.decoder.block)]
    assert [block.is_sparse for block in (*ours.encoder.block, *ours.decoder.block)] == sparse
    expected = logits(theirs)
    # Far from each other, so that a wrong weight could not hide in the tolerance.
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    # And with padding in the decoder's own mask.
    masked = {"decoder_attention_mask": (batch()["labels"] != -100).long()}
    real = masked["decoder_attention_mask"].bool()
    torch.testing.assert_close(
        logits(ours, **masked)[real], logits(theirs, **masked)[real], atol=1e-5, rtol=1e-5
    )


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**31),
    num_experts=st.integers(1, 6),
    activation=st.sampled_from(["relu", "silu", "gelu", "gelu_new"]),
)
def test_logits_equal_theirs_on_generated_models(
    seed: int, num_experts: int, activation: str
) -> None:
    theirs = switch(seed=seed, num_experts=num_experts, dense_act_fn=activation)
    torch.testing.assert_close(logits(from_switch(theirs)), logits(theirs), atol=1e-5, rtol=1e-5)


def test_gradients_equal_theirs() -> None:
    theirs = switch(num_sparse_encoder_layers=4)
    ours = from_switch(theirs)
    for model in (theirs, ours):
        model(**batch()).loss.backward()
    # Gradients take the way back that weights take.
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    found = dict(to_switch(ours).named_parameters())
    used = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert not found[name].any(), name
        else:
            used += 1
            torch.testing.assert_close(found[name].data, parameter.grad, atol=1e-6, rtol=1e-4)
    assert used > 60


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_weights_are_the_same_bits(tied: bool) -> None:
    theirs = switch(tie_word_embeddings=tied, num_layers=6)
    back = to_switch(from_switch(theirs))
    expected, found = theirs.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (back.lm_head.weight is back.shared.weight) == tied
    # Copies: neither model is the other's.
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    assert theirs.lm_head.weight.any()


def test_there_and_back_the_configuration_is_the_same_but_for_capacity() -> None:
    theirs = switch(expert_capacity=5, router_jitter_noise=0.02, dense_act_fn="silu")
    back = to_switch(from_switch(theirs))
    differing = {
        name
        for name, value in theirs.config.to_dict().items()
        if value != back.config.to_dict()[name]
    }
    # What limits an expert in evaluation, which is nothing, became the one capacity.
    assert differing == {"expert_capacity"}
    assert back.config.expert_capacity > 10**9


def test_generation_writes_the_same_tokens() -> None:
    theirs = switch(tie_word_embeddings=False)
    theirs.generation_config.repetition_penalty = 1.3
    ours = from_switch(theirs)
    assert ours.generation_config.repetition_penalty == 1.3
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    for options in ({}, {"num_beams": 3}):
        written = [
            model.generate(**inputs, max_new_tokens=9, do_sample=False, **options)
            for model in (ours, theirs, to_switch(ours))
        ]
        assert len(written[0].unique()) > 5
        assert torch.equal(written[0], written[1])
        assert torch.equal(written[0], written[2])


def test_in_training_the_capacity_is_theirs_and_in_evaluation_there_is_none() -> None:
    theirs = switch(expert_capacity=2, dropout_rate=0.0, router_jitter_noise=0.0)
    ours = from_switch(theirs)
    unlimited = copy.deepcopy(theirs)
    for module in unlimited.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 1000
    # No padding, which takes places there and none here.
    whole = {"attention_mask": torch.ones(3, 12, dtype=torch.long)}
    assert (logits(theirs, **whole) - logits(unlimited, **whole)).abs().max() > 1e-2
    torch.testing.assert_close(
        logits(ours, **whole), logits(unlimited, **whole), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        logits(ours.train(), **whole), logits(theirs, **whole), atol=1e-5, rtol=1e-5
    )


def test_a_fixed_limit_in_evaluation_is_written_as_theirs() -> None:
    capacity = {
        "train": 1e-7,
        "evaluation": 1e-7,
        "minimum": 3,
        "rounding": "down",
        "group": "segment",
    }
    config = from_switch(switch()).config.to_dict()
    for side in ("encoder", "decoder"):
        config[f"{side}_router"]["capacity"] = capacity
    ours = FlanMoeT5ForConditionalGeneration(FlanMoeT5Config.from_dict(config))
    theirs = to_switch(ours.eval())
    assert theirs.config.expert_capacity == 3
    whole = {"attention_mask": torch.ones(3, 12, dtype=torch.long)}
    found = logits(ours, **whole)
    torch.testing.assert_close(found, logits(theirs, **whole), atol=1e-5, rtol=1e-5)
    assert (found - logits(from_switch(theirs), **whole)).abs().max() > 1e-2


def test_ours_becomes_a_switch_that_auto_classes_read(tmp_path: Path) -> None:
    router = {"kind": "top_k.v1", "num_experts": 3, "top_k": 1, "normalize": False}
    torch.manual_seed(0)
    ours = FlanMoeT5ForConditionalGeneration(
        FlanMoeT5Config(
            vocab_size=128,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_heads=4,
            num_layers=3,
            num_decoder_layers=5,
            feed_forward_proj="relu",
            # Layers 1 of 3 and none of 5: neither follows from a number of sparse layers.
            encoder_router=router,
            encoder_sparse_every=2,
            decoder_router=None,
        )
    ).eval()
    to_switch(ours).save_pretrained(tmp_path)
    theirs, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__ == "SwitchTransformersForConditionalGeneration"
    torch.testing.assert_close(logits(theirs.eval()), logits(ours), atol=1e-5, rtol=1e-5)


def test_routers_stay_in_float32_beside_bfloat16(tmp_path: Path) -> None:
    theirs = switch()
    theirs.save_pretrained(tmp_path)
    back = to_switch(load_switch(str(tmp_path), dtype=torch.bfloat16))
    for name, tensor in theirs.state_dict().items():
        expected = tensor if "router" in name else tensor.to(torch.bfloat16)
        found = back.state_dict()[name]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_loaded(tmp_path: Path, tied: bool) -> None:
    theirs = switch(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(load_switch(str(tmp_path))), logits(theirs), atol=1e-5, rtol=1e-5
    )


def rewritten(folder: Path, *, without: tuple[str, ...] = (), **added: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in without}
    assert len(kept) == len(tensors) - len(without)
    save_file({**kept, **added}, folder / "model.safetensors", metadata={"format": "pt"})


def test_one_table_for_both_sides_is_enough(tmp_path: Path) -> None:
    theirs = switch(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    rewritten(tmp_path, without=tuple(f"{name}.weight" for name in SIDE_TABLES))
    torch.testing.assert_close(
        logits(load_switch(str(tmp_path))), logits(theirs), atol=1e-5, rtol=1e-5
    )


def test_tensors_that_a_checkpoint_lacks_or_has_too_many_are_named(tmp_path: Path) -> None:
    switch().save_pretrained(tmp_path)
    lost = "encoder.block.1.layer.1.mlp.experts.expert_2.wo.weight"
    rewritten(tmp_path, without=(lost,), **{"decoder.adapter.weight": torch.ones(2)})
    with pytest.raises(ModelError) as error:
        load_switch(str(tmp_path))
    assert f"1 missing (`{lost}`) and 1 foreign (`decoder.adapter.weight`)" in str(error.value)
    bent = "encoder.block.1.layer.1.mlp.router.classifier.weight"
    switch().save_pretrained(tmp_path)
    rewritten(tmp_path, without=(bent,), **{bent: torch.ones(3, 32)})
    with pytest.raises(ModelError, match="of another shape") as error:
        load_switch(str(tmp_path))
    assert f"{bent} (3, 32) for (4, 32)" in str(error.value)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    tiny_model("bart").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"`switch_transformers` is needed, but .* `bart`"):
        load_switch(str(tmp_path))


def test_a_torn_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    switch().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"weights of the model .* cannot be read"):
        load_switch(str(tmp_path))


def test_tensors_that_a_model_has_too_many_are_named() -> None:
    theirs = switch()
    theirs.encoder.adapter = nn.Linear(2, 2, bias=False)
    with pytest.raises(ModelError, match=r"1 foreign \(`encoder.adapter.weight`\)"):
        from_switch(theirs)
    ours = from_switch(switch())
    ours.decoder.adapter = nn.Linear(2, 2, bias=False)
    del ours.encoder.final_layer_norm
    with pytest.raises(ModelError) as error:
        to_switch(ours)
    assert "1 missing (`encoder.final_layer_norm.weight`)" in str(error.value)
    assert "1 foreign (`decoder.adapter.weight`)" in str(error.value)


def test_sides_with_tables_of_their_own_are_refused() -> None:
    theirs = switch(tie_word_embeddings=False)
    with torch.no_grad():
        theirs.decoder.embed_tokens.weight[3, 5] += 1
    with pytest.raises(ModelError, match=r"but `decoder.embed_tokens.weight` and `shared.weight`"):
        from_switch(theirs)


def test_every_reason_against_reading_a_switch_is_told() -> None:
    theirs = switch(router_bias=True, router_dtype="bfloat16")
    theirs.config.dense_act_fn = "tanh"
    theirs.config.expert_capacity = 0
    with pytest.raises(ModelError) as error:
        from_switch(theirs)
    for number, said in enumerate(
        (
            "`router_bias` is true",
            "`router_dtype` is `bfloat16`",
            "`tanh`",
            "`expert_capacity` is 0",
        ),
        start=1,
    ):
        assert f"({number})" in str(error.value)
        assert said in str(error.value)


def test_what_differs_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    from_switch(switch(expert_capacity=7, router_jitter_noise=0.25))
    said = capfd.readouterr().err
    assert "the first 7 tokens" in said
    assert "`router_jitter_noise` 0.25" in said
    to_switch(from_switch(switch(expert_capacity=7, router_jitter_noise=0.0)))
    said = capfd.readouterr().err
    assert "lets an expert take any number of tokens of a sequence" in said
    assert "here it is 7 tokens (`capacity.train`)" in said
