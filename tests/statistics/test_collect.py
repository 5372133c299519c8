"""One pass gives what the definition says, however the data are cut, padded or packed."""

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from flanmoe.core.errors import DataError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.compute import observed_outputs
from flanmoe.statistics import (
    ExpertStatistics,
    StatisticsBatch,
    StatisticsParts,
    collect,
)
from flanmoe.statistics.logit_sample import priorities
from flanmoe.testing.tiny_models import tiny_model

from .rows import (
    DECODERS,
    ENCODER_DECODERS,
    GROUPS,
    batch_of,
    batches_of,
    decoder,
    encoder_decoder,
    rows,
    written_out,
)

PARTS = StatisticsParts(logit_sample=9, seed=4)


def built(name: str) -> PreTrainedModel:
    return encoder_decoder(name) if name in ENCODER_DECODERS else decoder(name)


def collected(
    model: PreTrainedModel, batches: Sequence[StatisticsBatch], parts: StatisticsParts = PARTS
) -> ExpertStatistics:
    return collect(model, batches, groups=GROUPS, data_hash="data", parts=parts)


def assert_alike(found: ExpertStatistics, expected: ExpertStatistics) -> None:
    """Counts and sampled tokens equal, other sums up to the order of addition."""
    assert found.tokens == expected.tokens
    for own, other in zip(found.layers, expected.layers, strict=True):
        assert own.shape == other.shape
        assert torch.equal(own.logit_sample.token_numbers, other.logit_sample.token_numbers)
        assert torch.equal(own.logit_sample.groups, other.logit_sample.groups)
        expected_tensors = other.tensors()
        assert own.tensors().keys() == expected_tensors.keys()
        for name, values in own.tensors().items():
            if values.is_floating_point():
                # Logits are kept in float32.
                rtol = 1e-5 if name == "logits" else 1e-10
                torch.testing.assert_close(
                    values, expected_tensors[name], rtol=rtol, atol=1e-12, msg=name
                )
            else:
                assert torch.equal(values, expected_tensors[name]), name


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_it_is_what_the_definition_says(name: str) -> None:
    model = built(name)
    batches = batches_of(model, rows(), 4)
    found = collected(model, batches)
    expected = written_out(model, batches)
    assert len(found.layers) == len(expected) == len(moe_blocks(model))
    for layer, written in zip(found.layers, expected, strict=True):
        sums, outputs = layer.sums, layer.outputs
        assert sums.assignments.tolist() == outputs.counts.tolist() == written.assignments
        assert sums.coactivation.tolist() == written.coactivation
        assert sums.tokens.tolist() == [written.groups.count(group) for group in range(3)]
        for own, by_hand in (
            (sums.gate_mass, written.gate_mass),
            (outputs.norms, written.norms),
            (outputs.squared_norms, written.squared_norms),
            (outputs.gated_norms, written.gated_norms),
            (outputs.share_norms, written.share_norms),
            (outputs.largest_norm, written.largest_norm),
            (outputs.outputs, written.outputs),
        ):
            expected_values = torch.as_tensor(by_hand, dtype=torch.double)
            torch.testing.assert_close(own, expected_values, rtol=1e-9, atol=1e-12)
        assert sums.gate_mass.sum() > 0
        assert outputs.outputs.abs().sum() > 0
        # The third group has no tokens.
        assert sums.assignments[2].sum() == 0


@pytest.mark.parametrize("name", ["olmoe", "top_k"])
def test_the_sample_is_the_tokens_of_lowest_priority(name: str) -> None:
    model = built(name)
    batches = batches_of(model, rows(), 2)
    found = collected(model, batches)
    for layer, written in zip(found.layers, written_out(model, batches), strict=True):
        number = torch.arange(len(written.logits))
        order = sorted(number.tolist(), key=priorities(number, 4).tolist().__getitem__)
        expected = sorted(order[:9])
        sample = layer.logit_sample
        assert sample.token_numbers.tolist() == expected
        assert sample.groups.tolist() == [written.groups[token] for token in expected]
        logits = torch.stack([written.logits[token] for token in expected]).float()
        torch.testing.assert_close(sample.logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "top_k"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_size_of_batches_and_padding_change_nothing(name: str, size: int) -> None:
    model = built(name)
    whole = collected(model, batches_of(model, rows(), 6))
    assert_alike(collected(model, batches_of(model, rows(), size)), whole)


def test_packed_rows_are_counted_by_the_group_of_each_token() -> None:
    model = decoder("mixtral")
    first, second, third = rows(3)
    apart = collected(model, batches_of(model, [first, second, third], 1))
    together = [first, second, third]
    ids = torch.tensor([[token for row in together for token in row.tokens] + [0, 0]])
    positions = torch.tensor([[p for row in together for p in range(len(row.tokens))] + [0, 1]])
    groups = [row.group for row in together for _ in row.tokens] + [-7, 1]
    valid = torch.arange(ids.numel()) < ids.numel() - 2
    packed = StatisticsBatch(
        inputs={"input_ids": ids, "position_ids": positions},
        valid={"decoder": valid},
        groups={"decoder": torch.tensor(groups)},
    )
    assert_alike(collected(model, [packed]), apart)


def test_packed_pairs_are_counted_by_the_group_of_each_token() -> None:
    model = encoder_decoder("top_k")
    given = rows(3)
    apart = collected(model, batches_of(model, given, 1))

    def packed(lines: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = [token for line in lines for token in line] + [0]
        segments = [number for number, line in enumerate(lines, 1) for _ in line] + [0]
        groups = [row.group for row, line in zip(given, lines, strict=True) for _ in line] + [99]
        return torch.tensor([ids]), torch.tensor([segments]), torch.tensor(groups)

    inputs, segments, groups = packed([row.tokens for row in given])
    targets, target_segments, target_groups = packed([row.target for row in given])
    batch = StatisticsBatch(
        inputs={
            "input_ids": inputs,
            "segment_ids": segments,
            "decoder_input_ids": targets,
            "decoder_segment_ids": target_segments,
        },
        valid={
            "encoder": (segments != 0).flatten(),
            "decoder": (target_segments != 0).flatten(),
        },
        groups={"encoder": groups, "decoder": target_groups},
    )
    assert_alike(collected(model, [batch]), apart)


def test_parts_that_are_not_asked_for_are_not_there() -> None:
    model = decoder()
    parts = StatisticsParts(coactivation=False, outputs=False, logit_sample=0)
    layer = collected(model, batches_of(model, rows(), 3), parts).layers[0]
    assert layer.outputs is None
    assert layer.logit_sample is None
    assert layer.sums.coactivation is None
    assert layer.sums.assignments.sum() == 2 * sum(len(row.tokens) for row in rows())


def test_the_model_is_as_it_was() -> None:
    model = decoder("qwen2_moe").train()
    model.config.attention_dropout = 0.5
    still = model.get_input_embeddings().eval()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    batches = batches_of(model, rows(), 3)
    assert_alike(collected(model, batches), collected(model, batches))
    assert model.training
    assert not still.training
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])
    for block in moe_blocks(model):
        assert not block.router._forward_hooks
        with observed_outputs(block.experts, print):
            pass


def test_it_says_beforehand_what_it_will_hold(capsys: pytest.CaptureFixture[str]) -> None:
    model = decoder()
    collected(model, batches_of(model, rows(), 6))
    said = capsys.readouterr().err
    assert said.startswith("Statistics of 2 sparse layers by 3 groups hold up to 0.0 MiB (routing")


def refused(batches: Sequence[StatisticsBatch]) -> str:
    with pytest.raises(DataError) as raised:
        collected(decoder(), batches)
    return str(raised.value)


def changed(**values: object) -> StatisticsBatch:
    batch = batch_of(decoder(), rows(2))
    return StatisticsBatch(
        **{"inputs": batch.inputs, "valid": batch.valid, "groups": batch.groups, **values}
    )


def test_nothing_to_read_is_refused() -> None:
    assert refused([]) == (
        "Statistics need at least 1 batch with a token that is not padding, but there is none in 0 batches. "
        "Give some data."
    )
    empty = changed(valid={"decoder": torch.zeros(18, dtype=torch.bool)})
    assert "there is none in 1 batches" in refused([empty])


@pytest.mark.parametrize("number", [3, -1])
def test_a_group_out_of_range_is_refused(number: int) -> None:
    groups = batch_of(decoder(), rows(2)).groups["decoder"].clone()
    groups[4] = number
    assert refused([changed(groups={"decoder": groups})]) == (
        "The number of a token's group must be from 0 to 2 for 3 groups, but 1 tokens of the decoder have "
        f"others, the first {number}. Number the tokens by the places of their tasks among `groups`."
    )


def test_tokens_that_do_not_fit_are_refused() -> None:
    assert refused([changed(valid={"decoder": torch.ones(17, dtype=torch.bool)})]) == (
        "A batch must have one entry for each token of the decoder, but has valid 17, groups 18, input_ids "
        "18. Padding counts here too, row after row."
    )


def test_a_missing_side_is_refused() -> None:
    model = encoder_decoder("switch")
    batch = batch_of(model, rows(2))
    batch = StatisticsBatch(batch.inputs, {"decoder": batch.valid["decoder"]}, batch.groups)
    with pytest.raises(DataError) as raised:
        collected(model, [batch])
    assert str(raised.value) == (
        "A batch must say `valid` for the encoder, but says it for decoder. Give it for every side that has "
        "experts."
    )


@pytest.mark.parametrize(("groups", "said"), [((), "none"), (("a", "a"), "`a`, `a`")])
def test_groups_need_names(groups: tuple[str, ...], said: str) -> None:
    with pytest.raises(DataError, match=f"but they are {said}. Name each group once"):
        collect(decoder(), [], groups=groups, data_hash="data")


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ModelError, match="needs a sparse model, but LlamaForCausalLM has no"):
        collected(tiny_model("llama"), [])


def test_experts_in_separate_modules_are_refused() -> None:
    with pytest.raises(ModelError) as raised:
        collected(tiny_model("switch_transformers"), [])
    assert str(raised.value) == (
        "Statistics need experts whose matrices lie together in one tensor, but "
        "SwitchTransformersForConditionalGeneration keeps each expert of encoder.block.1.layer.1.mlp.experts "
        "in a module of its own. Load a checkpoint of Switch with "
        "`flanmoe.models.flan_moe_t5.switch.load_switch`."
    )


def test_outputs_need_our_compute_and_routing_does_not() -> None:
    model = decoder()
    expected = collected(model, batches_of(model, rows(), 6))
    model.set_experts_implementation("eager")
    with pytest.raises(ModelError) as raised:
        collected(model, [])
    assert str(raised.value) == (
        "What experts return can be observed where they run flanmoe's compute, but those of "
        'model.layers.0.mlp run `eager`. Call `model.set_experts_implementation("flanmoe")` first, or leave '
        "outputs out with `StatisticsParts(outputs=False)`."
    )
    parts = StatisticsParts(outputs=False)
    found = collected(model, batches_of(model, rows(), 6), parts)
    for own, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(own.sums.assignments, other.sums.assignments)


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = decoder()
    with torch.no_grad():
        moe_blocks(model)[1].router.weight[3] = float("nan")
    # Whichever meets them first says so, the experts or the recorder.
    with pytest.raises(ModelError, match=r"^(Router logits|Gates) must be finite, but"):
        collected(model, batches_of(model, rows(), 6))


def test_outputs_that_are_no_numbers_are_refused() -> None:
    model = decoder()
    last = moe_blocks(model)[-1]
    with torch.no_grad():
        last.experts.down_proj[[2, 5]] = float("inf")
    with pytest.raises(
        ModelError, match=r"those of experts \[2, 5\] of model\.layers\.1\.mlp hold NaN or"
    ):
        collected(model, batches_of(model, rows(), 6))


def test_experts_that_see_other_tokens_than_the_router_are_refused() -> None:
    model = decoder()
    block = moe_blocks(model)[0]
    # As a block would that sends every token to its first choice alone.
    hook = block.experts.register_forward_pre_hook(
        lambda _, given: (given[0], given[1][:, :1], given[2][:, :1])
    )
    with pytest.raises(ModelError, match="but ran 1 times or for others"):
        collected(model, batches_of(model, rows(), 6))
    hook.remove()
