"""Which examples are read, what each token's group is, and what is cut."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flanmoe.core.errors import DataError
from flanmoe.data.tasks import Task, TaskConfig, load_task
from flanmoe.stages import expert_batches
from flanmoe.stages.expert_batches import DrawnExamples, ExpertBatches, group_name, named_twice
from flanmoe.stages.held_model import HeldModel
from flanmoe.testing.tiny_models import tiny_text_tokenizer, tiny_tokenizer

from .inspecting import data_folder, saved_decoder, saved_flan_moe_t5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets."""
    return data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> HeldModel:
    """A decoder whose examples may share rows."""
    return HeldModel(str(saved_decoder(tmp_path_factory.mktemp("models") / "m", "mixtral")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> HeldModel:
    """An encoder-decoder."""
    return HeldModel(str(saved_flan_moe_t5(tmp_path_factory.mktemp("models") / "t")))


def tasks(data: Path, *names: str) -> list[Task]:
    """Load tasks by name."""
    return [load_task(TaskConfig(name=name), data_dir=data) for name in names]


def test_examples_are_drawn_from_the_whole_task_in_even_halves(data: Path) -> None:
    (task,) = tasks(data, "numbers")
    some = DrawnExamples.of(task, 5)
    assert len(set(some.rows.tolist())) == 5
    assert some.rows.tolist() == sorted(some.rows.tolist()) != [0, 1, 2, 3, 4]
    assert sorted(np.bincount(some.halves).tolist()) == [2, 3]
    again = DrawnExamples.of(task, 5)
    assert (again.rows.tolist(), again.halves.tolist()) == (
        some.rows.tolist(),
        some.halves.tolist(),
    )
    everything = DrawnExamples.of(task, 1000)
    assert everything.rows.tolist() == list(range(9))
    # Halves are random: neither the first half of the file nor every second example.
    assert everything.halves.tolist() not in ([0, 1] * 4 + [0], [0] * 5 + [1] * 4)


def test_a_task_without_examples_is_refused(data: Path) -> None:
    (task,) = tasks(data, "nothing")
    with pytest.raises(DataError, match="`nothing`"):
        DrawnExamples.of(task, 5)


def read_back(batches: ExpertBatches, side: str, ids: str) -> dict[str, list[str]]:
    """Return the texts of each group's examples, found in the batches token by token."""
    tokenizer = tiny_tokenizer() if side == "decoder" and ids == "input_ids" else None
    found: dict[str, list[list[int]]] = {name: [] for name in batches.groups}
    for batch in batches:
        flat = batch.inputs[ids].flatten().tolist()
        valid, groups = batch.valid[side].tolist(), batch.groups[side].tolist()
        begins = batch.inputs.get("position_ids")
        if begins is None:
            numbers = batch.inputs["segment_ids" if side == "encoder" else "decoder_segment_ids"]
            shifted = torch.nn.functional.pad(numbers[:, :-1], (1, 0))
            starts = (numbers != shifted).flatten().tolist()
        else:
            starts = (begins == 0).flatten().tolist()
        for token, is_real, group, starts_here in zip(flat, valid, groups, starts, strict=True):
            if not is_real:
                assert group == 0
                continue
            own = found[batches.groups[group]]
            if starts_here:
                own.append([])
            own[-1].append(token)
    decode = (tokenizer or tiny_text_tokenizer()).decode
    return {name: sorted(map(decode, rows)) for name, rows in found.items()}


def expected_texts(drawn: list[DrawnExamples], part: str) -> dict[str, list[str]]:
    """Return the same from the data sets."""
    found: dict[str, list[str]] = {}
    for one in drawn:
        for half in (0, 1):
            examples = [one.task.examples[row] for row in one.rows[one.halves == half].tolist()]
            chats = {
                "chat": [
                    f"<|im_start|>user\n{e.inputs}<|im_end|>\n"
                    f"<|im_start|>assistant\n{e.target}<|im_end|>"
                    for e in examples
                ],
                "inputs": [f"{e.inputs}</s>" for e in examples],
                # The start token, and all of the target but its end.
                "targets": [f"<pad>{e.target}" for e in examples],
            }
            found[group_name(one.task.name, half)] = sorted(chats[part])
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_every_example_of_a_decoder_is_there_once_in_its_group(
    shared: bool, data: Path, decoder: HeldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_batches, "keeps_examples_apart", lambda model: shared)
    # Several windows, several batches of each.
    monkeypatch.setattr(expert_batches, "_WINDOW", 6)
    monkeypatch.setattr(expert_batches, "_TOKENS_TOGETHER", 300)
    drawn = [DrawnExamples.of(task, 100) for task in tasks(data, "numbers", "words")]
    batches = ExpertBatches(decoder, drawn, length=200)
    assert batches.groups == (
        "numbers (half 1)",
        "numbers (half 2)",
        "words (half 1)",
        "words (half 2)",
    )
    assert batches.shares_rows == shared
    found = read_back(batches, "decoder", "input_ids")
    assert found == expected_texts(drawn, "chat")
    # And once more in a second pass.
    assert read_back(batches, "decoder", "input_ids") == found
    for batch in batches:
        rows = batch.inputs["input_ids"].shape[0]
        assert batch.inputs["input_ids"].numel() <= 300 or rows == 1
        starts = (batch.inputs["position_ids"] == 0).flatten() & batch.valid["decoder"]
        if not shared:
            assert int(starts.sum()) == rows


def test_every_pair_of_an_encoder_decoder_is_there_once_on_both_sides(
    data: Path, pairs: HeldModel
) -> None:
    drawn = [DrawnExamples.of(task, 100) for task in tasks(data, "numbers", "words")]
    batches = ExpertBatches(pairs, drawn, length=120)
    assert read_back(batches, "encoder", "input_ids") == expected_texts(drawn, "inputs")
    targets = expected_texts(drawn, "targets")
    # Rendered answers carry no space at their ends.
    stripped = {
        name: sorted(text.replace("> ", ">") for text in own) for name, own in targets.items()
    }
    assert read_back(batches, "decoder", "decoder_input_ids") == stripped


def test_what_is_cut_and_what_is_left_out_is_counted(data: Path, decoder: HeldModel) -> None:
    (task,) = tasks(data, "words")
    drawn = DrawnExamples.of(task, 100)
    texts = expected_texts([drawn], "chat")
    tokenizer = tiny_tokenizer()
    sizes = [len(tokenizer(text)["input_ids"]) for own in texts.values() for text in own]
    limit = sorted(sizes)[4]
    batches = ExpertBatches(decoder, [drawn], length=limit)
    tokens = sum(int(batch.valid["decoder"].sum()) for batch in batches)
    (read,) = batches.read.values()
    assert (read.size, read.drawn) == (7, 7)
    assert read.truncated + read.left_out == sum(size > limit for size in sizes) == 2
    kept = sum(min(size, limit) for size in sizes)
    assert tokens == kept - limit * read.left_out
    # Shorter than any prompt: nothing of an answer would be left.
    batches = ExpertBatches(decoder, [drawn], length=10)
    with pytest.raises(DataError, match="all of `words` are longer than the 10 tokens of a row"):
        list(batches)
    assert batches.read["words"].left_out == 7


def test_the_hash_is_of_what_is_read(data: Path, decoder: HeldModel) -> None:
    numbers, words = tasks(data, "numbers", "words")

    def hash_of(drawn: list[DrawnExamples], length: int = 100) -> str:
        return ExpertBatches(decoder, drawn, length=length).data_hash

    drawn = [DrawnExamples.of(numbers, 5), DrawnExamples.of(words, 5)]
    same = [DrawnExamples.of(numbers, 5), DrawnExamples.of(words, 5)]
    assert hash_of(drawn) == hash_of(same)
    others = {
        hash_of(drawn, 99),
        hash_of(drawn[:1]),
        hash_of(drawn[::-1]),
        hash_of([DrawnExamples.of(numbers, 6), drawn[1]]),
        hash_of([DrawnExamples(numbers, drawn[0].rows, 1 - drawn[0].halves), drawn[1]]),
        hash_of(drawn),
    }
    assert len(others) == 6


def test_tasks_named_twice_are_found(data: Path) -> None:
    assert named_twice(tasks(data, "numbers", "words")) is None
    assert named_twice(tasks(data, "numbers", "words", "numbers")) == "`numbers`"
