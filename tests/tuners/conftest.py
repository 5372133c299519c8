"""What the tests of tuners share: logits of a model, and quiet about what PEFT reads of transformers."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

Logits = Callable[[torch.nn.Module], torch.Tensor]


@pytest.fixture
def logits() -> Logits:
    """Logits of two rows of random tokens, in evaluation mode."""
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))

    def of(model: torch.nn.Module) -> torch.Tensor:
        inputs = {"input_ids": ids, "use_cache": False}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        with torch.no_grad():
            return model(**inputs).logits

    return of


@pytest.fixture(autouse=True)
def _peft_warns_of_transformers() -> Iterator[None]:
    # PEFT 0.21.2 reads a property that transformers 5.23 calls deprecated.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield
