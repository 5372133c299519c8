"""A task through lm-eval: the requests it makes, the records it keeps."""

from collections.abc import Callable

import pytest
import torch
from lm_eval.evaluator import evaluate

from flanmoe.core.errors import ModelError
from flanmoe.data.chat import render_chat
from flanmoe.data.packing import tokenize
from flanmoe.data.tasks import Task
from flanmoe.evaluation.averages import task_score
from flanmoe.evaluation.lm import DecoderLM, build_lm
from flanmoe.evaluation.tasks.reference import ReferenceTask
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

MakeTask = Callable[..., Task]

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def lm() -> DecoderLM:
    return build_lm(tiny_model("mixtral"), TOKENIZER, batch_size=4, precision="float32")


def _held_out(task: Task, lm: DecoderLM, *, seen: frozenset[str] = frozenset()) -> ReferenceTask:
    return ReferenceTask(
        task, task.examples, tokenizer=TOKENIZER, encode=lm.encode, training_hashes=seen
    )


def test_the_prompts_by_hand(task: MakeTask, lm: DecoderLM) -> None:
    rows = [{"question": "Sky?", "choices": ["red", "blue"], "label": 1}]
    (document,) = _held_out(task("sky", rows), lm).test_docs()
    question = "<|im_start|>user\nSky?\n\nOptions:\n(A) red\n(B) blue\n\n"
    asked = "Reply with the letter of the right option only.<|im_end|>\n<|im_start|>assistant\n"
    assert document.pairs == (
        (question + asked, "(B)<|im_end|>"),
        (question + asked + "The answer is (", "A"),
        (question + asked + "The answer is (", "B"),
    )
    assert document.num_tokens == 4


def test_with_a_template_choices_are_answers_in_its_words(task: MakeTask, lm: DecoderLM) -> None:
    rows = [{"question": "Sky?", "choices": ["red", "deep blue"], "label": 1}]
    words = {"family": "answer_cue", "options_share": 0.0}
    (document,) = _held_out(task("sky", rows, template=words), lm).test_docs()
    asked = "<|im_start|>user\nInput: Sky?\n\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    assert document.pairs == (
        (asked, "deep blue<|im_end|>"),
        (asked, "red<|im_end|>"),
        (asked, "deep blue<|im_end|>"),
    )
    letters = {"family": "answer_cue", "options_share": 1.0}
    (document,) = _held_out(task("sky", rows, template=letters), lm).test_docs()
    assert [answer for _, answer in document.pairs] == [f"({x})<|im_end|>" for x in "BAB"]
    (record,) = _records(_held_out(task("sky", rows, template=words), lm), lm)
    # The right choice is the reference answer, so both likelihoods are of the same text.
    assert record.choice_scores[1] == pytest.approx(-record.loss * record.num_tokens, rel=1e-5)


def test_the_loss_is_over_the_rendering_of_the_task(task: MakeTask, lm: DecoderLM) -> None:
    rows = [{"question": "2 + 2?", "answer": "4", "rationale": "Two and two."}]
    (free,) = _held_out(task("sum", rows), lm).test_docs()
    assert len(free.pairs) == 1
    assert free.pairs[0][1] == "Two and two.\nThe answer is 4.<|im_end|>"
    (direct,) = _held_out(task("sum", rows, renderer="direct"), lm).test_docs()
    assert direct.pairs[0][1] == "4<|im_end|>"


def test_the_loss_is_what_training_would_see(quiz: MakeTask, lm: DecoderLM) -> None:
    task = quiz("quiz", 5)
    held_out = _held_out(task, lm)
    records = _records(held_out, lm)
    model = tiny_model("mixtral")
    for example, record in zip(task.examples, records, strict=True):
        tokens = tokenize(render_chat(example, task.renderer, TOKENIZER, task.name), TOKENIZER)
        inputs = torch.from_numpy(tokens.input_ids)
        labels = inputs.masked_fill(~torch.from_numpy(tokens.loss_mask), -100)
        with torch.no_grad():
            logits = model(inputs[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], labels[1:])
        assert record.loss == pytest.approx(float(expected), abs=1e-4)
        assert record.num_tokens == int(tokens.loss_mask.sum())


def test_lm_eval_finds_the_same_averages(quiz: MakeTask, task: MakeTask, lm: DecoderLM) -> None:
    mixed = task("free", [{"question": f"{index}?", "answer": f"{index}."} for index in range(4)])
    tasks = {each.name: _held_out(each, lm) for each in (quiz("quiz", 9), mixed)}
    found = evaluate(lm=lm, task_dict={"tasks": tasks, "groups": {}}, bootstrap_iters=0)
    for name, held_out in tasks.items():
        records = [
            held_out.record(sample["doc"], sample["filtered_resps"])
            for sample in found["samples"][name]
        ]
        score = task_score(records, cluster=name).headline
        theirs = found["results"][name]
        assert theirs["loss,none"] == pytest.approx(score.loss.mean)
        assert found["configs"][name]["num_fewshot"] == found["n-shot"][name] == 0
        assert found["configs"][name]["task"] == name
        assert found["higher_is_better"][name]["loss"] is False
        if score.accuracy is not None:
            assert theirs["accuracy,none"] == pytest.approx(score.accuracy.mean)
            assert theirs["chance,none"] == pytest.approx(0.25)
    assert "accuracy,none" not in found["results"]["free"]


def test_lm_evals_own_limit_and_choice_of_samples_work(quiz: MakeTask, lm: DecoderLM) -> None:
    tasks = {"quiz": _held_out(quiz("quiz", 6), lm)}
    wanted = {"tasks": tasks, "groups": {}}
    limited = evaluate(lm=lm, task_dict=wanted, limit=2, bootstrap_iters=0)
    assert [sample["doc_id"] for sample in limited["samples"]["quiz"]] == [0, 1]
    picked = evaluate(lm=lm, task_dict=wanted, samples={"quiz": [1, 4]}, bootstrap_iters=0)
    assert [sample["doc"].example.key for sample in picked["samples"]["quiz"]] == ["row-2", "row-5"]


def test_the_record_of_one_example(quiz: MakeTask, lm: DecoderLM) -> None:
    task = quiz("quiz", 2)
    seen = frozenset({task.examples[0].content_hash()})
    held_out = _held_out(task, lm, seen=seen)
    first, second = held_out.test_docs()
    results = [(-12.0, False), (-3.0, False), (-1.0, True), (-1.0, True), (-2.0, False)]
    record = held_out.record(first, results)
    assert record.loss == pytest.approx(12.0 / first.num_tokens)
    assert record.choice_scores == (-3.0, -1.0, -1.0, -2.0)
    # The first of equals.
    assert (record.predicted, record.label, record.correct) == (1, 0, False)
    assert record.chance == 0.25
    assert (record.task, record.key, record.seen) == ("quiz", "row-1", True)
    other = held_out.record(second, results)
    assert (other.label, other.correct, other.seen) == (1, True, False)
    assert other.prompt_hash != record.prompt_hash
    assert other.content_hash == task.examples[1].content_hash()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_likelihood_that_is_no_number_is_an_error(
    quiz: MakeTask, lm: DecoderLM, value: float
) -> None:
    held_out = _held_out(quiz("quiz", 1), lm)
    with pytest.raises(ModelError, match=r"example `row-1` of task `quiz` are \[-1\.0, .*diverged"):
        held_out.record(held_out.test_docs()[0], [(-1.0, False), *[(value, False)] * 4])


def test_a_prompt_that_is_cut_is_marked(quiz: MakeTask) -> None:
    short = build_lm(
        tiny_model("llama", max_position_embeddings=100),
        TOKENIZER,
        batch_size=4,
        precision="float32",
    )
    (record,) = _records(_held_out(quiz("quiz", 1), short), short)
    assert record.truncated
    assert short.work.real_tokens == 2 * 100


def _records(held_out: ReferenceTask, lm: DecoderLM) -> list:
    lm_found = evaluate(
        lm=lm, task_dict={"tasks": {"t": held_out}, "groups": {}}, bootstrap_iters=0
    )
    return [held_out.record(one["doc"], one["filtered_resps"]) for one in lm_found["samples"]["t"]]
