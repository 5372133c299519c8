"""Denoisers by name, and the sentinels of a tokenizer."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.denoisers import Denoiser, SpanCorruption, denoiser_named, sentinel_ids


@pytest.mark.parametrize("name", ["span_corruption", "span_corruption.v1"])
def test_a_denoiser_by_name_with_its_options(name: str) -> None:
    found = denoiser_named(name, noise_density=0.5)
    assert isinstance(found, Denoiser)
    assert found == SpanCorruption(noise_density=0.5)


def test_unknown_names_and_options_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean `span_corruption`"):
        denoiser_named("span_coruption")
    with pytest.raises(ConfigError, match="Did you mean `noise_density`"):
        denoiser_named("span_corruption", noise_densty=0.5)


def test_sentinels_come_in_the_order_of_their_numbers() -> None:
    words = {"a": 0, "<extra_id_1>": 1, "<extra_id_0>": 2, "<extra_id_2>": 3, "<extra_id_9>": 4}
    found = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "a")))
    assert sentinel_ids(found) == (2, 1, 3)


def test_a_tokenizer_without_sentinels_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="has no token `<extra_id_0>`"):
        sentinel_ids(tokenizer)
