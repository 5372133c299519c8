"""The promise of packing: an example in a row computes what it computes alone, class by class."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flanmoe.core.errors import DataError
from flanmoe.data.collate import collate, collate_pairs
from flanmoe.data.example import PackedPair
from flanmoe.data.packing import TokenizedExample, pack, packed_row
from flanmoe.data.pairs import TokenizedPair, packed_pair_row
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

Tokens = Callable[..., TokenizedExample]

LENGTHS = (7, 1, 1, 5, 2, 9)
ROW = 32
# Weights are float64, but transformers computes norms and softmax in float32.
TOLERANCE = 1e-5
# Their classes do not pass positions to their masks; when transformers mends that, tests here say so.
LEAKING = ("gpt_oss",)
KEEPING = tuple(name for name in DENSE_NAMES + SPARSE_NAMES if name not in LEAKING)


def _examples(tokens: Tokens, *, seed: int = 0) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tokens(torch.randint(1, 60, (length,), generator=generator).tolist()) for length in LENGTHS
    ]


def _logits(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            **options,
        ).logits


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are tiny: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["eager", "sdpa"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KEEPING)
def model(attention: str, request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, attn_implementation=attention).double()


def _alone(model: Any, example: TokenizedExample) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(example.input_ids)[None]).logits[0]


def _changes(model: Any, tokens: Tokens, changed: int) -> tuple[float, float]:
    """Return how far the logits move when one example of a row does: its own, and all others'."""
    examples = _examples(tokens)
    varied = list(examples)
    varied[changed] = tokens([59 - int(token) for token in examples[changed].input_ids])
    before = collate([packed_row(examples, length=ROW)])
    after = collate([packed_row(varied, length=ROW)])
    own = before["segment_ids"][0] == changed + 1
    difference = (_logits(model, before) - _logits(model, after))[0].abs()
    return float(difference[own].max()), float(difference[~own].max())


def test_a_packed_example_has_the_logits_that_it_has_alone(model: Any, tokens: Tokens) -> None:
    examples = _examples(tokens)
    other = _examples(tokens, seed=1)
    rows = [packed_row(examples, length=ROW), packed_row(other[::-1], length=ROW)]
    batch = collate(rows)
    logits = _logits(model, batch)
    for segment, example in enumerate(examples, start=1):
        inside = logits[0][batch["segment_ids"][0] == segment]
        torch.testing.assert_close(inside, _alone(model, example), rtol=0, atol=TOLERANCE)


def test_changing_one_example_leaves_the_others_untouched(model: Any, tokens: Tokens) -> None:
    for changed in range(len(LENGTHS)):
        own, others = _changes(model, tokens, changed)
        assert others < TOLERANCE
        assert own > 1e-3


@pytest.mark.parametrize("name", LEAKING)
def test_classes_that_leak(name: str, tokens: Tokens) -> None:
    model = tiny_model(name, attn_implementation="eager").double()
    _, others = _changes(model, tokens, 0)
    assert others > 1


@pytest.mark.parametrize("name", LEAKING)
def test_one_example_a_row_suits_classes_that_leak(name: str, tokens: Tokens) -> None:
    model = tiny_model(name, attn_implementation="eager").double()
    examples = _examples(tokens)
    batch = collate(pack(examples, length=ROW, most_in_a_row=1))
    logits = _logits(model, batch)
    for row, example in enumerate(examples):
        inside = logits[row][batch["segment_ids"][row] == 1]
        torch.testing.assert_close(inside, _alone(model, example), rtol=0, atol=TOLERANCE)


def test_the_same_row_with_an_attention_mask_leaks(model: Any, tokens: Tokens) -> None:
    """Why there is no attention mask: this is the mistake that the tests above must be able to see."""
    batch = collate([packed_row(_examples(tokens), length=ROW)])
    masked = _logits(model, batch, attention_mask=torch.ones_like(batch["input_ids"]))
    assert (masked - _logits(model, batch)).abs().max() > 0.05


def test_the_loss_of_a_row_is_the_mean_over_its_examples_tokens(model: Any, tokens: Tokens) -> None:
    examples = _examples(tokens)
    batch = collate([packed_row(examples, length=ROW)])
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).loss
        total, count = 0.0, 0
        for example in examples:
            if len(example) == 1:
                continue
            ids = torch.as_tensor(example.input_ids)[None]
            total += model(input_ids=ids, labels=ids).loss.item() * (len(example) - 1)
            count += len(example) - 1
    assert packed.item() == pytest.approx(total / count, rel=1e-6)


def test_a_batch_holds_the_rows_and_no_attention_mask(tokens: Tokens) -> None:
    rows = [packed_row([tokens([1, 2])], length=4), packed_row([tokens([3])], length=4)]
    batch = collate(rows)
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[1, 2, 0, 0], [3, 0, 0, 0]],
        "labels": [[-100, 2, -100, -100], [-100, -100, -100, -100]],
        "position_ids": [[0, 1, 0, 1], [0, 0, 1, 2]],
        "segment_ids": [[1, 1, 0, 0], [1, 0, 0, 0]],
    }
    assert all(column.dtype == torch.long for column in batch.values())


def test_a_batch_carries_the_task_of_every_token_on_request(tokens: Tokens) -> None:
    rows = [
        packed_row([tokens([1, 2], "b"), tokens([3], "a")], length=5),
        packed_row([tokens([4, 5, 6], "c")], length=5),
    ]
    batch = collate(rows, task_numbers={"a": 0, "b": 1, "c": 2})
    assert batch["task_ids"].tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 0, 0]]
    assert batch["task_ids"].dtype == torch.long
    with pytest.raises(DataError) as caught:
        collate(rows, task_numbers={"a": 0, "b": 1})
    assert str(caught.value) == (
        "Rows must hold examples of the 2 tasks that their stream names, but one is of the task c. Add it to "
        "the stream's `task_names`."
    )


def test_pairs_carry_the_task_of_every_token_of_both_sides() -> None:
    def row(*pairs: tuple[str, int, int]) -> PackedPair:
        made = [
            TokenizedPair(
                input_ids=np.arange(inputs) + 3,
                target_ids=np.arange(targets) + 3,
                task=task,
                key="",
                content_hash="",
            )
            for task, inputs, targets in pairs
        ]
        return packed_pair_row(made, length=5, target_length=4, decoder_start_token_id=0)

    rows = [row(("b", 2, 1), ("a", 1, 2)), row(("a", 5, 1))]
    batch = collate_pairs(rows, task_numbers={"a": 7, "b": 9})
    assert batch["task_ids"].tolist() == [[9, 9, 7, 0, 0], [7] * 5]
    assert batch["decoder_task_ids"].tolist() == [[9, 7, 7, 0], [7, 0, 0, 0]]
    assert "task_ids" not in collate_pairs(rows)


def test_rows_of_different_lengths_are_refused(tokens: Tokens) -> None:
    rows = [packed_row([tokens([1])], length=4), packed_row([tokens([1])], length=5)]
    with pytest.raises(ValueError, match=r"rows of one length, but these have lengths \[4, 5\]"):
        collate(rows)
    with pytest.raises(ValueError, match=r"lengths \[\]"):
        collate([])
