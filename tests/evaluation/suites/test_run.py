"""Whole suites over tiny models: limits, missing data, seen examples, planted differences."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import render_chat
from flanmoe.data.renderers import renderer_named
from flanmoe.data.tasks import Task
from flanmoe.evaluation.comparison import compare
from flanmoe.evaluation.results import SuiteResult, read_result, write_result
from flanmoe.evaluation.suites import (
    SuiteConfig,
    evaluate_suite,
    evaluate_tasks,
    limited,
    load_suite,
    named_suite,
    shares,
)
from flanmoe.models.model_hash import model_hash
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

MakeTask = Callable[..., Task]

SEEDS = SeedTree(0)
TOKENIZER = tiny_tokenizer()
CONFIG = SuiteConfig(tasks=("unused",))

sizes = st.lists(st.integers(min_value=1, max_value=30), min_size=1, max_size=8)


def _evaluate(
    model: PreTrainedModel,
    tasks: list[Task],
    *,
    config: SuiteConfig = CONFIG,
    seen: frozenset[str] = frozenset(),
) -> SuiteResult:
    return evaluate_tasks(model, TOKENIZER, tasks, config=config, seeds=SEEDS, training_hashes=seen)


@given(sizes, st.integers(min_value=1, max_value=200))
def test_shares_are_even(sizes: list[int], limit: int) -> None:
    found = shares(sizes, limit)
    assert sum(found) == min(limit, sum(sizes))
    assert all(share <= size for share, size in zip(found, sizes, strict=True))
    unfilled = [share for share, size in zip(found, sizes, strict=True) if share < size]
    assert not unfilled or max(unfilled) - min(unfilled) <= 1
    assert not unfilled or max(found) <= min(unfilled) + 1
    assert all(more >= share for more, share in zip(shares(sizes, limit + 1), found, strict=True))


@given(
    st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=4),
    st.integers(min_value=4, max_value=20),
    st.integers(min_value=0, max_value=2**32),
)
def test_a_larger_limit_keeps_the_examples_of_a_smaller_one(
    quiz: MakeTask, sizes: list[int], limit: int, seed: int
) -> None:
    tasks = [quiz(f"task{index}", size) for index, size in enumerate(sizes)]
    small = limited(tasks, limit, seeds=SeedTree(seed))
    assert small == limited(tasks, limit, seeds=SeedTree(seed))
    large = limited(tasks, limit + 3, seeds=SeedTree(seed))
    for task, few, more in zip(tasks, small, large, strict=True):
        keys = [example.key for example in task.examples]
        drawn = [keys.index(example.key) for example in few]
        assert drawn == sorted(set(drawn))
        assert set(drawn) <= {keys.index(example.key) for example in more}


def test_another_seed_draws_other_examples(quiz: MakeTask) -> None:
    tasks = [quiz("task", 50)]
    first, second = (limited(tasks, 10, seeds=SeedTree(seed))[0] for seed in (0, 1))
    assert first != second


def test_every_format_of_a_task_is_asked_the_same_questions(quiz: MakeTask) -> None:
    def drawn(name: str) -> list[str]:
        return [example.key for example in limited([quiz(name, 50)], 10, seeds=SEEDS)[0]]

    assert drawn("task:test") == drawn("task:test@intent") == drawn("task:test@answer_cue")
    assert drawn("task:test@intent") != drawn("other:test@intent")


def test_a_limit_that_leaves_tasks_empty_is_refused(quiz: MakeTask) -> None:
    with pytest.raises(ConfigError) as error:
        limited([quiz("a", 3), quiz("b", 3)], 1, seeds=SEEDS)
    assert str(error.value) == (
        "`limit` must be at least one example for each of the 2 tasks, but is 1. "
        "Raise it, or name fewer tasks."
    )


def test_a_limit_is_checked_when_the_suite_is_loaded(tmp_path: Path) -> None:
    for name in ("sums", "others"):
        _write(tmp_path / name / "train.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    tasks = ("sums", "others", {"name": "gone", "optional": True})
    with pytest.raises(ConfigError, match="one example for each of the 2 tasks, but is 1"):
        load_suite(SuiteConfig(tasks=tasks, limit=1), data_dir=tmp_path)
    # A task that is left out needs no example.
    loaded, skipped = load_suite(SuiteConfig(tasks=tasks, limit=2), data_dir=tmp_path)
    assert (len(loaded), len(skipped)) == (2, 1)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_batch_size_changes_nothing(quiz: MakeTask, name: str) -> None:
    tasks = [quiz("a", 6), quiz("b", 3)]
    model = tiny_model(name)
    one, eight = (
        _evaluate(model, tasks, config=CONFIG.model_copy(update={"batch_size": size}))
        for size in (1, 8)
    )
    assert one.padding_tokens == 0 < eight.padding_tokens
    assert one.tokens == eight.tokens
    for left, right in zip(one.examples, eight.examples, strict=True):
        assert left.loss == pytest.approx(right.loss, abs=1e-4)
        assert left.choice_scores == pytest.approx(right.choice_scores, abs=1e-4)
        assert left.prompt_hash == right.prompt_hash


def test_the_result_says_what_was_done(quiz: MakeTask, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    config = CONFIG.model_copy(update={"limit": 5})
    found = _evaluate(model, [quiz("a", 4), quiz("b", 4)], config=config)
    assert found.num_examples == len(found.examples) == 5
    assert [score.num_examples for score in found.tasks] == [2, 3]
    assert found.model_hash == model_hash(model)
    assert found.settings["limit"] == 5
    assert found.settings["seed"] == 0
    assert found.versions["lm_eval"].startswith("0.4")
    assert found.seconds > 0
    assert not found.partial
    assert found.pooled.chance == 0.25
    write_result(found, tmp_path)
    assert read_result(tmp_path) == found


def test_seen_examples_are_marked_and_left_out(quiz: MakeTask) -> None:
    task = quiz("a", 5)
    seen = frozenset(example.content_hash() for example in task.examples[:2])
    found = _evaluate(tiny_model("llama"), [task], seen=seen)
    assert [record.seen for record in found.examples] == [True, True, False, False, False]
    assert (found.num_seen, found.only_seen) == (2, False)
    assert found.pooled.loss.num_values == 3
    assert found.tasks[0].seen is not None
    assert found.tasks[0].seen.loss.num_values == 2


def test_a_planted_difference_is_detected(quiz: MakeTask) -> None:
    tasks = [quiz("a", 20, label=1), quiz("b", 20, label=1)]
    plain = tiny_model("llama", tie_word_embeddings=False)
    biased = _biased_towards("B", tiny_model("llama", tie_word_embeddings=False), tasks)
    results = [_evaluate(model, tasks) for model in (plain, biased)]
    found = compare(results[0], results[1], seeds=SEEDS)
    assert results[1].pooled.accuracy is not None
    assert results[1].pooled.accuracy.mean == 1.0
    assert found.pooled.accuracy is not None
    assert found.pooled.accuracy.interval is not None
    assert found.pooled.accuracy.interval[0] > 0
    assert found.macro_accuracy is not None
    assert found.macro_accuracy.interval is not None
    assert found.macro_accuracy.interval[0] > 0
    assert found.pooled.mcnemar is not None
    assert found.pooled.mcnemar.p_value < 0.01


def test_a_bias_that_does_not_help_is_not_detected(quiz: MakeTask) -> None:
    # The right option moves from A to D and round again: always saying B is guessing.
    tasks = [quiz("a", 40)]
    plain = tiny_model("llama", tie_word_embeddings=False)
    biased = _biased_towards("B", tiny_model("llama", tie_word_embeddings=False), tasks)
    results = [_evaluate(model, tasks) for model in (plain, biased)]
    assert results[1].pooled.accuracy is not None
    assert results[1].pooled.accuracy.mean == 0.25
    assert results[1].pooled.normalised_accuracy == pytest.approx(0)
    found = compare(results[0], results[1], seeds=SEEDS)
    assert found.pooled.mcnemar is not None
    assert found.pooled.mcnemar.p_value > 0.05


def test_the_model_is_as_before_afterwards(quiz: MakeTask) -> None:
    model = tiny_model("mixtral")
    model.train()
    model.get_input_embeddings().eval()
    before = model_hash(model)
    _evaluate(model, [quiz("a", 2)])
    assert model.training
    assert not model.get_input_embeddings().training
    assert model_hash(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_the_progress_is_shown(quiz: MakeTask, capfd: pytest.CaptureFixture[str]) -> None:
    _evaluate(tiny_model("llama"), [quiz("a", 2)])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines() if line.strip()] == [
        "tokenising",
        "evaluating",
    ]


def test_an_optional_task_without_data_is_left_out_and_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "sums" / "test.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    gone = str(tmp_path / "gone.jsonl")
    config = SuiteConfig(
        tasks=(
            {"name": "sums", "split": "test"},
            {"name": "missing", "optional": True},
            {"name": gone, "optional": True},
        )
    )
    found = evaluate_suite(tiny_model("llama"), TOKENIZER, config, data_dir=tmp_path, seeds=SEEDS)
    assert [score.task for score in found.tasks] == ["sums:test"]
    assert found.partial
    assert [skip.task for skip in found.skipped] == ["missing", gone]
    assert "`missing` is not known" in found.skipped[0].reason
    said = capfd.readouterr().err
    assert said.count("The task `missing` is left out of the averages.") == 1
    assert said.count("Warning: ") == 2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "exemplars/bbh/snark"}, r"Did you mean `exemplars/bbh/snarks`\?"),
        ({"name": "exemplars/bhh/*"}, r"Did you mean `exemplars/bbh/\*`\?"),
        ({"name": "sum"}, r"`sum` is not known\. Did you mean `sums`\?"),
        ({"name": "sums", "split": "tset"}, r"no split `tset`\. Did you mean `test`\?"),
        ({"name": "gone.jsonl"}, r"The file gone\.jsonl does not exist"),
    ],
)
def test_a_mistaken_task_is_an_error(task: dict[str, str], message: str, tmp_path: Path) -> None:
    _write(tmp_path / "sums" / "test.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    config = SuiteConfig(tasks=({"name": "sums", "split": "test"}, task))
    with pytest.raises(DataError, match=message):
        load_suite(config, data_dir=tmp_path)


@pytest.mark.parametrize(
    "task", [{"name": "exemplars/bbh/snark"}, {"name": "sums", "split": "tset"}]
)
def test_optional_excuses_no_mistake_in_what_is_there(task: dict[str, str], tmp_path: Path) -> None:
    _write(tmp_path / "sums" / "test.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    config = SuiteConfig(tasks=({"name": "sums", "split": "test"}, {**task, "optional": True}))
    with pytest.raises(DataError, match="Did you mean"):
        load_suite(config, data_dir=tmp_path)


def test_a_suite_without_any_data_is_refused(tmp_path: Path) -> None:
    config = SuiteConfig(tasks=tuple({"name": name, "optional": True} for name in ("gone", "away")))
    with pytest.raises(
        DataError, match=r"needs data for at least one task, but has it for none of 2: "
    ):
        evaluate_suite(tiny_model("llama"), TOKENIZER, config, data_dir=tmp_path, seeds=SEEDS)


def test_a_damaged_record_is_an_error_not_a_skip(tmp_path: Path) -> None:
    _write(tmp_path / "sums" / "train.jsonl", [{"question": "1 + 1?"}])
    config = SuiteConfig(tasks=("sums",))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the record has no target"):
        evaluate_suite(tiny_model("llama"), TOKENIZER, config, data_dir=tmp_path, seeds=SEEDS)


def test_a_task_named_twice_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "sums" / "train.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    config = SuiteConfig(tasks=("sums", "sums"))
    with pytest.raises(ConfigError, match="must hold each task once, but `sums` comes twice"):
        evaluate_suite(tiny_model("llama"), TOKENIZER, config, data_dir=tmp_path, seeds=SEEDS)


def test_the_known_suite_is_held_out_and_an_unknown_one_is_named() -> None:
    assert [task.name for task in named_suite("held-out")] == ["exemplars/bbh/*"]
    with pytest.raises(ConfigError, match=r"`held_out` is not known\. Did you mean `held-out`\?"):
        named_suite("held_out")


def test_the_held_out_suite_runs() -> None:
    config = SuiteConfig(tasks=named_suite("held-out"), limit=23)
    model = tiny_model("llama", max_position_embeddings=2048)
    found = evaluate_suite(model, TOKENIZER, config, data_dir=None, seeds=SEEDS)
    assert len(found.tasks) == 23
    assert list(found.clusters) == ["bbh"]
    assert found.clusters["bbh"] == found.macro


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _biased_towards(letter: str, model: PreTrainedModel, tasks: list[Task]) -> PreTrainedModel:
    """Turn the output vector of one letter towards what the model holds where the letter is asked for."""
    held: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, __: held.append(inputs[0][0, -1]))
    for task in tasks:
        for example in task.examples:
            prompt = render_chat(example, renderer_named("direct"), TOKENIZER, task.name).prompt
            with torch.no_grad():
                model(torch.tensor([TOKENIZER(f"{prompt}The answer is (")["input_ids"]]))
    handle.remove()
    with torch.no_grad():
        head.weight[TOKENIZER.convert_tokens_to_ids(letter)] += torch.stack(held).mean(0)
    return model
