"""Mixtures: rates by their formula, draws that follow them, and what may not be trained on."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.mixture import Draw, Mixture, MixtureConfig
from flanmoe.data.tasks import TaskConfig

SIZES = {"few": 5, "some": 12, "many": 40}


def mixture(data_dir: Path, *, seed: int = 0, **values: Any) -> Mixture:
    config = MixtureConfig.parse({"tasks": list(SIZES), **values})
    return Mixture.load(config, seeds=SeedTree(seed), data_dir=data_dir)


@settings(max_examples=20)
@given(
    temperature=st.floats(0.5, 5),
    maximum=st.none() | st.integers(1, 50),
    cap=st.none() | st.integers(1, 50),
)
def test_rates_follow_sizes_caps_and_temperature(
    data_dir: Path, temperature: float, maximum: int | None, cap: int | None
) -> None:
    tasks = ["few", "some", {"name": "many", "cap": cap}]
    mixed = mixture(data_dir, tasks=tasks, temperature=temperature, maximum_per_task=maximum)
    limits = {"few": maximum, "some": maximum, "many": cap or maximum}
    weights = {
        name: min(size, limits[name] or size) ** (1 / temperature) for name, size in SIZES.items()
    }
    expected = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    assert mixed.rates == pytest.approx(expected)


def test_given_rates_are_shares(data_dir: Path) -> None:
    tasks = [{"name": "few", "rate": 3}, {"name": "many", "rate": 1}]
    assert mixture(data_dir, tasks=tasks).rates == {"few": 0.75, "many": 0.25}


def test_a_rate_of_a_family_is_shared_out_by_size(data_dir: Path) -> None:
    tasks = [{"name": "few", "rate": 1}, {"name": "exemplars/babilong/*", "rate": 1}]
    rates = mixture(data_dir, tasks=tasks).rates
    assert rates["few"] == 0.5
    assert sum(rates.values()) == pytest.approx(1)
    assert rates["exemplars/babilong/qa1"] == pytest.approx(0.5 * 2 / 54)
    assert rates["exemplars/babilong/qa10"] == pytest.approx(0.5 * 3 / 54)


def test_draws_follow_the_rates(data_dir: Path) -> None:
    mixed = mixture(data_dir)
    number = 6000
    drawn = Counter(mixed.draw(index, counts={}).task for index in range(number))
    for position, task in enumerate(mixed.tasks):
        rate = mixed.rates[task.name]
        deviation = (rate * (1 - rate) / number) ** 0.5
        assert abs(drawn[position] / number - rate) < 4 * deviation


def test_a_draw_depends_on_seed_index_and_counts_only(data_dir: Path) -> None:
    first, second = mixture(data_dir), mixture(data_dir)
    second.draw(500, counts={"many": 81})
    for index in range(50):
        counts = {"few": index, "some": 3 * index, "many": 7 * index}
        assert first.draw(index, counts=counts) == second.draw(index, counts=counts)
    other = mixture(data_dir, seed=1)
    assert [first.draw(i, counts={}) for i in range(30)] != [
        other.draw(i, counts={}) for i in range(30)
    ]


def test_epochs_are_permutations_written_out(data_dir: Path) -> None:
    mixed = mixture(data_dir, tasks=["some"])
    draws = [mixed.draw(index, counts={"some": index}) for index in range(36)]
    assert [draw.epoch for draw in draws] == [0] * 12 + [1] * 12 + [2] * 12
    for epoch in range(3):
        rows = [draw.row for draw in draws if draw.epoch == epoch]
        order = SeedTree(0).child("order").child("some", epoch).numpy().permutation(12)
        assert rows == order.tolist()
        assert sorted(rows) == list(range(12))


def test_the_drawn_example_is_the_one_of_the_row(data_dir: Path) -> None:
    mixed = mixture(data_dir)
    assert mixed.example(Draw(task=1, epoch=0, row=3)).key == "some-4"
    assert mixed.num_examples == 57


def test_adding_a_task_does_not_change_the_order_within_the_others(data_dir: Path) -> None:
    alone = mixture(data_dir, tasks=["some"])
    together = mixture(data_dir, tasks=["few", "some"])
    rows = [alone.draw(index, counts={"some": index}).row for index in range(12)]
    again: dict[int, int] = {}
    for index in range(400):
        for count in range(12):
            draw = together.draw(index, counts={"some": count})
            if draw.task == 1:
                again[count] = draw.row
    assert [again[count] for count in range(12)] == rows


@pytest.mark.parametrize("name", ["exemplars/bbh/web_of_lies", "exemplars/bbh/*", "bbh"])
def test_big_bench_is_never_trained_on(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "bbh"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    config = MixtureConfig(tasks=(TaskConfig(name="exemplars/gsm8k_cot"), TaskConfig(name=name)))
    with pytest.raises(DataError) as caught:
        Mixture.load(config, seeds=SeedTree(0), data_dir=tmp_path)
    text = str(caught.value)
    assert "is for evaluation only and cannot be in a training mixture: the authors of" in text
    assert text.endswith(
        "the authors of BIG-bench ask that its data never appear in a training corpus. Take it out of "
        "the mixture; a suite may hold it."
    )


def test_rates_for_some_tasks_only_are_refused(data_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        mixture(data_dir, tasks=[{"name": "few", "rate": 1}, "many"])
    assert str(caught.value) == (
        "Either every task of a mixture has a `rate` or none has, but `few` has one and `many` has "
        "not. Rates are shares of the draws; sizes are not."
    )


def test_a_task_that_comes_twice_is_refused_but_may_have_two_renderers(data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="must hold each task once, but `few` comes twice"):
        mixture(data_dir, tasks=["few", "few"])
    both = mixture(data_dir, tasks=["few", {"name": "few", "renderer": "direct"}])
    assert set(both.rates) == {"few", "few@direct"}


def test_a_cap_beside_rates_has_no_effect_and_is_refused(data_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        mixture(data_dir, tasks=[{"name": "few", "rate": 1, "cap": 3}])
    assert str(caught.value) == (
        "`cap` and `maximum_per_task` have no effect in a mixture with rates, but are set. Take them "
        "out, or take out the rates."
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"tasks": []}, "at least 1 entry in `tasks`, or `flan2022`, but found neither"),
        ({"tasks": ["few"], "temperature": 0}, "temperature: "),
        ({"tasks": [{"nam": "few"}]}, "Did you mean `name`?"),
    ],
)
def test_mistakes_in_a_config(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MixtureConfig.parse(values)
    assert problem in str(caught.value)


def test_what_overlaps_with_evaluation_is_left_out_and_counted(
    tmp_path: Path, write_rows: Callable[[Path, Sequence[Any]], Path]
) -> None:
    words = [f"word{number}" for number in range(40)]
    rows = [
        {"question": " ".join(words[start : start + 15]), "answer": f"a{start}"}
        for start in range(0, 20, 4)
    ]
    trained = write_rows(tmp_path / "trained.jsonl", [*rows, {"question": "short", "answer": "b"}])
    # Thirteen words of the rows that start at 4 and 8 stand here, twelve of the others.
    asked = " ".join(["And:", *words[6:21]])
    evaluated = write_rows(tmp_path / "evaluated.jsonl", [{"question": asked, "answer": "c"}])
    config = MixtureConfig(
        tasks=(TaskConfig(name=str(trained)),),
        without_overlap_of=(TaskConfig(name=str(evaluated)),),
    )
    (task,) = Mixture.load(config, seeds=SeedTree(0)).tasks
    assert [example.target for example in task.examples] == ["a0", "a12", "a16", "b"]
    assert list(task.content_hashes) == [example.content_hash() for example in task.examples]
    assert (task.size, task.num_left_out) == (4, 2)
    assert [example.target for example in task.examples[1:3]] == ["a12", "a16"]


def test_the_template_of_a_mixture_words_tasks_without_words_of_their_own() -> None:
    own = {"family": "mathematics"}
    config = MixtureConfig.parse(
        {
            "template": {"family": "answer_cue"},
            "tasks": ["a", {"name": "b", "renderer": "direct"}, {"name": "c", "template": own}],
        }
    )
    families = [task.template and task.template.family for task in config.tasks]
    assert families == ["answer_cue", None, "mathematics"]
    assert MixtureConfig.parse(config.to_mapping()) == config
