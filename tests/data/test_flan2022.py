"""The mixture of FLAN 2022 over what a folder holds: published rates, caps, and what is absent."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.catalogue import known_set, known_sets
from flanmoe.data.example import Packed
from flanmoe.data.flan2022 import CAPS, RATES, Flan2022, flan2022_tasks
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.data.stream import PackedStream
from flanmoe.data.templates.folder import load_family


def sums(number: int) -> list[dict[str, str]]:
    return [
        {"id": str(i), "question": f"{i} + {i}?", "answer": str(2 * i), "rationale": f"Twice {i}."}
        for i in range(number)
    ]


def pairs(number: int) -> list[dict[str, str]]:
    labels = ("entailment", "neutral", "contradiction")
    return [
        {"id": str(i), "premise": f"It is {i}.", "hypothesis": "It is 1.", "label": labels[i % 3]}
        for i in range(number)
    ]


@pytest.fixture
def folder(tmp_path: Path, write_rows: Callable[[Path, Sequence[Any]], Path]) -> Path:
    """Three sub-mixtures of five: muffin (two tasks), cot, t0_sf."""
    write_rows(tmp_path / "gsm8k" / "train.jsonl", sums(8))
    write_rows(tmp_path / "mnli" / "train.jsonl", pairs(30))
    passages = [{**row, "context": f"Row {i} of a table."} for i, row in enumerate(sums(10))]
    write_rows(tmp_path / "boolq" / "train.jsonl", passages)
    prompted = [{"task": "t", "input": f"Say {i}.", "output": str(i)} for i in range(6)]
    write_rows(tmp_path / "p3" / "train.jsonl.gz", prompted)
    write_rows(tmp_path / "unrelated" / "train.jsonl", sums(2))
    return tmp_path


def test_published_rates_sum_to_one() -> None:
    for name, rates in RATES.items():
        # The weights of the final models are rounded to a tenth of a percent in the paper.
        assert sum(rates.values()) == pytest.approx(1, abs=0.0011), name
        assert set(rates) == set(CAPS)
    assert RATES["released"] == {
        "muffin": 0.40,
        "t0_sf": 0.32,
        "niv2": 0.20,
        "cot": 0.05,
        "dialog": 0.03,
    }


def test_the_tasks_that_are_there_share_their_rates(folder: Path) -> None:
    found = flan2022_tasks(Flan2022(), folder)
    assert sorted(task.name for task in found.tasks) == ["boolq", "gsm8k", "mnli", "p3"]
    assert found.absent == ("niv2", "dialog")
    config = MixtureConfig(flan2022=Flan2022())
    rates = Mixture.load(config, seeds=SeedTree(0), data_dir=folder).rates
    shares = {name.partition("@")[0]: rate for name, rate in rates.items()}
    left = 0.40 + 0.32 + 0.05
    assert shares == pytest.approx(
        {
            "mnli": 0.40 * 30 / 40 / left,
            "boolq": 0.40 * 10 / 40 / left,
            "p3": 0.32 / left,
            "gsm8k": 0.05 / left,
        }
    )


def test_caps_limit_what_a_large_task_counts_with(folder: Path) -> None:
    tasks = [
        {"name": "mnli", "rate": 1, "cap": 10, "group": "muffin"},
        {"name": "boolq", "rate": 1, "cap": 10, "group": "muffin"},
        {"name": "gsm8k", "rate": 3},
    ]
    config = MixtureConfig.parse({"tasks": tasks})
    rates = Mixture.load(config, seeds=SeedTree(0), data_dir=folder).rates
    assert rates == pytest.approx({"mnli": 0.125, "boolq": 0.125, "gsm8k": 0.75})


def test_a_cap_holds_for_each_task_that_a_set_holds(
    tmp_path: Path, write_rows: Callable[[Path, Sequence[Any]], Path]
) -> None:
    rows = [
        {"task": task, "input": f"{task} {i}", "output": "x"}
        for task, number in (("long", 9), ("short", 3))
        for i in range(number)
    ]
    many = str(write_rows(tmp_path / "many.jsonl", rows))
    one = str(write_rows(tmp_path / "one.jsonl", sums(8)))

    def rate(**settings: Any) -> float:
        config = MixtureConfig.parse({"tasks": [{"name": many, "cap": 5, **settings}, one]})
        return Mixture.load(config, seeds=SeedTree(0)).rates[many]

    assert rate(cap_by="task") == pytest.approx(8 / 16)
    assert rate() == pytest.approx(5 / 13)
    with pytest.raises(DataError, match="capped by `kind`, but 12 of its 12 records have no text"):
        rate(cap_by="kind")
    with pytest.raises(ConfigError, match="`cap_by` needs a `cap` to apply"):
        MixtureConfig.parse({"tasks": [{"name": many, "cap_by": "task"}]})


def flan_stream(
    folder: Path, tokenizer: Any, *, rank: int = 0, world_size: int = 1
) -> PackedStream:
    """Rows of drawn wordings, few-shot and not."""
    config = MixtureConfig(flan2022=Flan2022(prompt_tokens=400))
    mixture = Mixture.load(config, seeds=SeedTree(5).child("mixture"), data_dir=folder)
    packing = PackingConfig(length=600, window=7, token_cache=False)
    return PackedStream(mixture, tokenizer, packing, SeedTree(5), rank=rank, world_size=world_size)


def ids(rows: Iterable[Packed]) -> list[list[int]]:
    return [row.input_ids.tolist() for row in rows]


def test_drawn_wordings_are_the_same_on_any_number_of_ranks_and_after_resuming(
    folder: Path, tokenizer: Any
) -> None:
    whole = flan_stream(folder, tokenizer)
    rows = ids(islice(whole, 24))
    assert len({str(row) for row in rows}) > 20
    for rank in range(2):
        part = flan_stream(folder, tokenizer, rank=rank, world_size=2)
        assert ids(islice(part, 12)) == rows[rank::2]
    resumed = flan_stream(folder, tokenizer)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_after(10))))
    assert ids(islice(resumed, 14)) == rows[10:]


def test_what_is_held_out_is_not_drawn(folder: Path) -> None:
    def names(*held_out: str) -> list[str]:
        config = MixtureConfig(flan2022=Flan2022(), held_out=held_out)
        mixture = Mixture.load(config, seeds=SeedTree(0), data_dir=folder)
        return sorted(task.config.name for task in mixture.tasks)

    assert names("entailment") == ["boolq", "gsm8k", "p3"]
    assert names("boolq", "mathematics") == ["mnli", "p3"]
    with pytest.raises(ConfigError, match=r"`entailmnt` is neither. Did you mean `entailment`\?"):
        names("entailmnt")
    with pytest.raises(DataError, match="`held_out` takes out all 4"):
        names("boolq", "mathematics", "entailment", "prompted")


def test_a_task_in_both_splits_is_refused() -> None:
    with pytest.raises(ConfigError, match="`gsm8k` stands in `tasks` and in `held_out`"):
        MixtureConfig.parse({"tasks": ["gsm8k", "mnli"], "held_out": ["gsm8k"]})


@pytest.mark.parametrize("rate", [0, -1])
def test_rates_are_above_zero(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.0\.rate: .*greater than 0"):
        MixtureConfig.parse({"tasks": [{"name": "gsm8k", "rate": rate}]})


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold at least 1 entry in `tasks`, or `flan2022`"):
        MixtureConfig.parse({})


def test_a_folder_with_none_of_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"must hold tasks of FLAN 2022, but has none of `gsm8k`, `flan_cot`"
    ):
        flan2022_tasks(Flan2022(), tmp_path)


def test_no_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLANMOE_DATA", raising=False)
    with pytest.raises(DataError, match="needs a data folder, but none is set"):
        flan2022_tasks(Flan2022(), None)


def test_labels_cluster_and_family_come_from_the_catalogue(folder: Path) -> None:
    config = MixtureConfig.parse({"tasks": [{"name": "mnli", "template": {}}]})
    (task,) = Mixture.load(config, seeds=SeedTree(0), data_dir=folder).tasks
    assert task.cluster == "entailment"
    assert task.name == "mnli@entailment"
    assert task.examples[1].choices == ("yes", "it is not possible to tell", "no")
    assert (task.examples[1].label, task.examples[1].target) == (1, "it is not possible to tell")
    unknown = MixtureConfig.parse({"tasks": [{"name": "unrelated", "template": {}}]})
    with pytest.raises(ConfigError, match=r"`unrelated` needs a `template\.family`"):
        Mixture.load(unknown, seeds=SeedTree(0), data_dir=folder)


def test_every_entry_of_the_catalogue_names_a_family_that_there_is() -> None:
    for name, entry in known_sets().items():
        assert load_family(entry.family), name
    assert known_set("openai/gsm8k") == known_set("gsm8k")
    assert known_set("nothing-like-it") is None
