"""What is said beforehand is what is held."""

import pytest
import torch

from flanmoe.models.meta import meta_model
from flanmoe.statistics import StatisticsParts, collect, held_bytes
from flanmoe.statistics.memory import bytes_in

from .rows import GROUPS, batches_of, decoder, encoder_decoder, rows


@pytest.mark.parametrize("name", ["olmoe", "encoder-decoder"])
@pytest.mark.parametrize(
    "parts",
    [
        StatisticsParts(logit_sample=10),
        StatisticsParts(coactivation=False, logit_sample=3),
        StatisticsParts(outputs=False, logit_sample=0),
    ],
)
def test_bytes_from_shapes_are_those_held(name: str, parts: StatisticsParts) -> None:
    model = decoder(name) if name == "olmoe" else encoder_decoder("switch")
    found = collect(
        model, batches_of(model, rows(), 2), groups=GROUPS, data_hash="data", parts=parts
    )
    expected = held_bytes(model, len(GROUPS), parts)
    assert bytes_in(found) == expected.total
    assert (expected.coactivation > 0) == parts.coactivation
    assert (expected.outputs > 0) == parts.outputs
    assert (expected.logit_sample > 0) == (parts.logit_sample > 0)


def test_a_sample_that_is_not_full_holds_less() -> None:
    model = decoder()
    parts = StatisticsParts(logit_sample=10_000)
    found = collect(
        model, batches_of(model, rows(), 2), groups=GROUPS, data_hash="data", parts=parts
    )
    assert bytes_in(found) < held_bytes(model, len(GROUPS), parts).total


def test_a_large_model_is_counted_without_weights() -> None:
    config = decoder("olmoe").config
    config.num_experts, config.hidden_size, config.num_hidden_layers = 64, 2048, 16
    config.num_experts_per_tok = 8
    model = meta_model(config)
    model.set_experts_implementation("flanmoe")
    found = held_bytes(model, 10, StatisticsParts())
    assert found.coactivation == 16 * 10 * 64 * 64 * 8
    assert found.outputs == 16 * 8 * (64 * 2048 + 64 + 5 * 10 * 64)
    assert found.logit_sample == 16_384 * (16 + 16 * 64 * 4)
    assert (
        str(found) == "85.8 MiB (routing 0.2, co-activation 5.0, outputs 16.4, sampled logits 64.2)"
    )
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())
