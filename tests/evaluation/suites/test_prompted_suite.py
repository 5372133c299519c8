"""Few-shot suites over a data folder of our own: what is asked, left out, averaged, compared, gone on with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError, DataError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.averages import mean_error
from flanmoe.evaluation.comparison import compare
from flanmoe.evaluation.lm.journal import JOURNAL_FILE
from flanmoe.evaluation.results import SuiteResult, read_result, write_result
from flanmoe.evaluation.suites import SuiteConfig, evaluate_loaded, load_evaluation
from flanmoe.evaluation.suites import loading as loading_module
from flanmoe.evaluation.suites.groups import Part, PromptedGroup, PromptedSuite, PromptedTaskConfig
from flanmoe.evaluation.suites.plan import EvaluationPlan
from flanmoe.evaluation.suites.questions import LoadedSuite, load_prompted_suite
from flanmoe.evaluation.tasks.few_shot import PromptStyle
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SEEDS = SeedTree(0)


def _subject(name: str, split: str = "validation") -> Part:
    return Part(source={"name": "mmlu", "split": split}, value=name)


def _picked(name: str, mode: Any, group: str) -> PromptedGroup:
    tasks = [
        PromptedTaskConfig(
            name=subject,
            questions=_subject(subject),
            exemplars=_subject(subject, "dev"),
            chance=0.25,
            part_of="one" if subject in ("small", "large") else None,
        )
        for subject in ("small", "large", "other", "gone")
    ]
    return PromptedGroup(name=group, title=name, mode=mode, shots=2, held="out", tasks=tuple(tasks))


SUITE = PromptedSuite(
    name="flan",
    groups=(
        _picked("Picked", "direct", "picked"),
        _picked("Reasoned", "chain_of_thought", "reasoned"),
        PromptedGroup(
            name="sums",
            title="Sums",
            mode="direct",
            shots=1,
            held="in",
            tasks=(
                PromptedTaskConfig(
                    name="sums",
                    questions=Part(source={"name": "sums", "split": "test"}),
                    exemplars=Part(source={"name": "sums", "split": "train"}),
                    drawn=True,
                    style=PromptStyle(options="hidden"),
                    chance=0.0,
                ),
                PromptedTaskConfig(
                    name="nowhere",
                    questions=Part(source={"name": "nowhere", "split": "test"}),
                    chance=0.0,
                ),
            ),
        ),
    ),
    averaged=("picked", "sums"),
)


def _question(subject: str, number: int, label: int = 1) -> dict[str, Any]:
    return {
        "question": f"{subject} {number}?",
        "choices": [f"a{number}", f"b{number}", f"c{number}", f"d{number}"],
        "label": label,
        "subject": subject,
        "rationale": "Because.",
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Subjects of 3, 6 and 4 questions, one that the suite does not know, and sums."""
    folder = tmp_path / "data"
    sizes = {"small": 3, "large": 6, "other": 4, "strange": 2}
    asked = [_question(name, n, n % 4) for name, size in sizes.items() for n in range(size)]
    shown = [_question(name, n) for name in sizes for n in (100, 101, 102)]
    # The first question of `large` is among its worked examples too.
    shown.insert(3, asked[3])
    _write(folder / "mmlu" / "validation.jsonl", asked)
    _write(folder / "mmlu" / "dev.jsonl", shown)
    for split in ("train", "test"):
        start = 0 if split == "train" else 50
        rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(start, start + 5)]
        _write(folder / "sums" / f"{split}.jsonl", rows)
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def _our_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module, "prompted_suite", lambda name: SUITE)


def _evaluate(
    data: Path, model: PreTrainedModel | None = None, *, limit: int | None = None, **other: Any
) -> SuiteResult:
    config = SuiteConfig(suite="flan", limit=limit, max_new_tokens=6)
    loaded = load_evaluation(config, data_dir=data)
    model = model or tiny_model("llama", max_position_embeddings=1024)
    return evaluate_loaded(model, TOKENIZER, loaded, config=config, seeds=SEEDS, **other)


def _loaded(data: Path) -> LoadedSuite:
    return load_prompted_suite(SUITE, data_dir=data)


def test_what_is_there_is_asked_and_the_rest_is_named(data: Path) -> None:
    loaded = _loaded(data)
    sizes = {task.identity: task.size for group in loaded.groups for task in group.tasks}
    assert sizes == {
        "picked/small": 3,
        "picked/large": 5,
        "picked/other": 4,
        "reasoned/small": 3,
        "reasoned/large": 5,
        "reasoned/other": 4,
        "sums/sums": 5,
    }
    assert {skip.task: skip.reason for skip in loaded.skipped} == {
        "picked/gone": "`mmlu:validation` holds no record of `gone`.",
        "reasoned/gone": "`mmlu:validation` holds no record of `gone`.",
        "sums/nowhere": f"The data folder {data} holds no data set `nowhere`.",
    }
    assert {(one.task, one.number) for one in loaded.left_out} == {
        ("picked/large", 1),
        ("reasoned/large", 1),
        ("mmlu:validation", 2),
    }
    assert (
        "`strange` is no task of the suite"
        in loaded.left_out[-1].reason + loaded.left_out[0].reason
    )


def test_no_exemplar_is_ever_asked(data: Path) -> None:
    loaded = _loaded(data)
    for group in loaded.groups:
        for task in group.tasks:
            for question in task.examples:
                assert f"Q: {question.inputs}\n" not in task.shown.shared


def test_exemplars_are_the_first_or_drawn_with_a_fixed_seed(data: Path) -> None:
    tasks = {task.identity: task for group in _loaded(data).groups for task in group.tasks}
    assert tasks["picked/small"].shown.shared == (
        "Q: small 100?\n(A) a100 (B) b100 (C) c100 (D) d100\nA: (B)\n\n"
        "Q: small 101?\n(A) a101 (B) b101 (C) c101 (D) d101\nA: (B)\n\n"
    )
    again = {task.identity: task for group in _loaded(data).groups for task in group.tasks}
    assert tasks["sums/sums"].shown.shared == again["sums/sums"].shown.shared
    assert tasks["sums/sums"].shown.num_shots == 1


def test_a_split_that_is_not_there_is_skipped_by_name(data: Path) -> None:
    (data / "sums" / "test.jsonl").unlink()
    reasons = {skip.task: skip.reason for skip in _loaded(data).skipped}
    assert reasons["sums/sums"] == "The data set `sums` has no split `test`, only `train`."


def test_a_suite_without_any_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The suite `flan` needs data .* for none of 10: .*`mmlu`"):
        _loaded(tmp_path)


def test_a_record_that_says_no_subject_is_named(data: Path) -> None:
    rows = [{**_question("small", 7), "subject": ""}]
    _write(data / "mmlu" / "validation.jsonl", rows)
    with pytest.raises(DataError, match="must say in `subject` which task it belongs to"):
        _loaded(data)


def test_averages_by_hand(data: Path) -> None:
    found = _evaluate(data)
    right: dict[str, list[float]] = {}
    for record in found.examples:
        assert record.score is not None
        right.setdefault(record.task, []).append(record.score)
    means = {task: sum(scores) / len(scores) for task, scores in right.items()}
    # Two parts count as one task.
    one = (means["picked/small"] + means["picked/large"]) / 2
    picked = (one + means["picked/other"]) / 2
    assert found.clusters["picked"].accuracy is not None
    assert found.clusters["picked"].accuracy.mean == pytest.approx(picked)
    assert found.clusters["picked"].accuracy.num_values == 2
    normalised = 100 * (picked - 0.25) / 0.75
    assert found.clusters["picked"].normalised_accuracy == pytest.approx(normalised)
    sums = 100 * means["sums/sums"]
    average = found.normalised_average
    assert average is not None
    assert average.mean == pytest.approx((normalised + sums) / 2)
    assert (average.groups, average.partial, average.missing) == (("picked", "sums"), True, ())
    assert found.held["out"].mean == pytest.approx(normalised)
    assert found.held["in"].mean == pytest.approx(sums)
    errors = [found.clusters[name].normalised_standard_error for name in ("picked", "sums")]
    assert average.standard_error == pytest.approx(mean_error(errors))
    coverage = {group.group: group for group in found.groups}
    assert (coverage["picked"].num_tasks, coverage["picked"].missing) == (3, ("gone",))
    assert coverage["sums"].missing == ("nowhere",)
    assert all(group.partial for group in found.groups)


def test_a_limit_holds_for_each_group_and_both_modes_ask_the_same(data: Path) -> None:
    found = _evaluate(data, limit=6)
    keys: dict[str, list[tuple[str, str]]] = {}
    for record in found.examples:
        group, task = record.task.split("/")
        keys.setdefault(group, []).append((task, record.key))
    assert {group: len(own) for group, own in keys.items()} == {
        "picked": 6,
        "reasoned": 6,
        "sums": 5,
    }
    assert keys["picked"] == keys["reasoned"]
    assert {task for task, _ in keys["picked"]} == {"small", "large", "other"}
    with pytest.raises(ConfigError, match="each of the 3 tasks of `picked`, but is 2"):
        _evaluate(data, limit=2)


def test_seen_questions_stay_out_of_the_averages(data: Path) -> None:
    loaded = _loaded(data)
    task = loaded.groups[0].tasks[1]
    seen = frozenset(example.content_hash() for example in task.examples[:2])
    found = _evaluate(data, training_hashes=seen)
    scores = {score.task: score for score in found.tasks}
    assert scores["picked/large"].num_seen == scores["reasoned/large"].num_seen == 2
    assert found.num_seen == 4
    assert scores["picked/large"].headline.accuracy is not None
    assert scores["picked/large"].headline.accuracy.num_values == 3


def test_the_plan_is_told_before_anything_is_answered(data: Path) -> None:
    plans: list[EvaluationPlan] = []
    found = _evaluate(data, limit=6, announce=plans.append)
    (plan,) = plans
    assert plan.questions == found.num_examples == 17
    rows = {
        row.group: (row.tasks, row.num_defined, row.questions, row.shots, row.new_tokens)
        for row in plan.groups
    }
    assert rows == {
        "picked": (3, 4, 6, (2, 2), 0),
        "reasoned": (3, 4, 6, (2, 2), 36),
        "sums": (1, 2, 5, (1, 1), 30),
    }
    assert (plan.limit, plan.max_new_tokens) == (6, 6)


def test_results_read_back_and_compare_with_themselves(data: Path, tmp_path: Path) -> None:
    found = _evaluate(data)
    write_result(found, tmp_path / "result")
    again = read_result(tmp_path / "result")
    assert again == found
    compared = compare(found, again, seeds=SEEDS)
    assert list(compared.groups) == ["picked", "reasoned", "sums"]
    assert compared.normalised_average is not None
    assert compared.normalised_average.difference.mean == 0
    assert compared.pooled.loss is None


def test_a_planted_difference_is_found_by_group(data: Path) -> None:
    plain = tiny_model("llama", max_position_embeddings=1024, tie_word_embeddings=False)
    biased = tiny_model("llama", max_position_embeddings=1024, tie_word_embeddings=False)
    _ask_of_large(data, label=0)
    said = {record.predicted for record in _evaluate(data, plain).examples}
    label = min({0, 1, 2, 3} - said)
    _ask_of_large(data, label=label)
    _bias(biased, data, "ABCD"[label])
    results = [_evaluate(data, model) for model in (plain, biased)]
    after = results[1].clusters["picked"].accuracy
    assert after is not None
    assert after.mean == 1.0
    compared = compare(results[0], results[1], seeds=SEEDS)
    picked = compared.groups["picked"]
    assert picked.macro_accuracy is not None
    assert picked.macro_accuracy.interval is not None
    assert picked.macro_accuracy.interval[0] > 0
    assert picked.pooled.mcnemar is not None
    assert picked.pooled.mcnemar.only_first == 0
    before = results[0].clusters["picked"].accuracy
    assert before is not None
    assert picked.macro_accuracy.difference.mean == pytest.approx(after.mean - before.mean)
    averages = [result.normalised_average for result in results]
    assert compared.normalised_average is not None
    expected = [average.mean for average in averages if average is not None]
    assert compared.normalised_average.difference.mean == pytest.approx(expected[1] - expected[0])


def _ask_of_large(data: Path, *, label: int) -> None:
    """Ask twelve questions, all with the same right option."""
    for split, first in (("dev", 100), ("validation", 0)):
        rows = [_question("large", first + n, label) for n in range(12)]
        _write(data / "mmlu" / f"{split}.jsonl", rows)


def _bias(model: PreTrainedModel, data: Path, letter: str) -> None:
    """Turn the output vector of one letter towards what the model holds where a letter is asked for."""
    held: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, __: held.append(inputs[0][0, -1]))
    for task in _loaded(data).groups[0].tasks:
        for example in task.examples:
            turn = {"role": "user", "content": task.shown.asking(example)}
            prompt = TOKENIZER.apply_chat_template(
                [turn], tokenize=False, add_generation_prompt=True
            )
            with torch.no_grad():
                model(torch.tensor([TOKENIZER(f"{prompt}(")["input_ids"]]))
    handle.remove()
    with torch.no_grad():
        head.weight[TOKENIZER.convert_tokens_to_ids(letter)] += torch.stack(held).mean(0)


def test_an_evaluation_that_was_stopped_ends_with_the_same_numbers(
    data: Path, tmp_path: Path
) -> None:
    whole = _evaluate(data)
    journal = tmp_path / JOURNAL_FILE
    _evaluate(data, journal=journal)
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) > 10
    # Killed while it wrote one of its last lines.
    journal.write_text("".join(lines[:-3]) + lines[-3][:20], encoding="utf-8")
    resumed = _evaluate(data, journal=journal)
    assert resumed.examples == whole.examples
    assert resumed.normalised_average == whole.normalised_average
    # What the stopped leg had finished is not computed again, and what it spent counts; a prefix is read again.
    assert whole.tokens <= resumed.tokens < 1.5 * whole.tokens


def test_another_model_does_not_go_on(data: Path, tmp_path: Path) -> None:
    journal = tmp_path / JOURNAL_FILE
    _evaluate(data, journal=journal)
    other = tiny_model("mixtral", max_position_embeddings=1024)
    with pytest.raises(RunError, match="model_hash"):
        _evaluate(data, other, journal=journal)
    with pytest.raises(RunError, match="settings"):
        _evaluate(data, journal=journal, limit=6)


def test_models_that_write_prompts_differently_compare(data: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    plain = tiny_tokenizer()
    plain.chat_template = None
    config = SuiteConfig(suite="flan", max_new_tokens=6)
    loaded = load_evaluation(config, data_dir=data)
    results = [
        evaluate_loaded(model, tokenizer, loaded, config=config, seeds=SEEDS)
        for tokenizer in (TOKENIZER, plain)
    ]
    compared = compare(results[0], results[1], seeds=SEEDS)
    assert not compared.same_prompts
    assert compared.num_examples == 29
    assert list(compared.groups) == ["picked", "reasoned", "sums"]
    # Fewer questions on one side are no comparison.
    fewer = results[1].model_copy(update={"examples": results[1].examples[1:]})
    with pytest.raises(DataError, match="1 of 29 are only in the first"):
        compare(results[0], fewer, seeds=SEEDS)
