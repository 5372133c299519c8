"""Few-shot tasks through lm-eval: what is asked, and how answers are read."""

from typing import Any

import pytest

from flanmoe.core.errors import ModelError
from flanmoe.data.example import Example
from flanmoe.evaluation.lm import build_lm
from flanmoe.evaluation.suites.run import run
from flanmoe.evaluation.tasks.few_shot import FewShot, PromptStyle, few_shot
from flanmoe.evaluation.tasks.prompted import MOST_DIRECT_TOKENS, Asking, PromptedTask
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LM = build_lm(tiny_model("llama"), TOKENIZER, batch_size=4, precision="float32")
BONES = Example(inputs="Bone?", target="leg", choices=("ear", "leg"), label=1, key="bones")
SUM = Example(inputs="1 + 1?", target="2", rationales=("One and one.",), key="sum")


def _asking(tokenizer: Any = TOKENIZER, *, apart: bool = False) -> Asking:
    return Asking(tokenizer, LM.encode, LM.truncates, max_new_tokens=100, answers_apart=apart)


def _task(
    question: Example, shown: FewShot, asking: Asking | None = None, **other: Any
) -> PromptedTask:
    values = {"chance": 0.25, **other}
    return PromptedTask("group/task", [question], shown=shown, asking=asking or _asking(), **values)


def _shown(mode: Any = "direct", **style: Any) -> FewShot:
    return few_shot([], description="About.", style=PromptStyle(**style), mode=mode)


def test_letters_continue_the_turn_of_the_model() -> None:
    (document,) = _task(BONES, _shown()).test_docs()
    context = "<|im_start|>user\nAbout.\n\nQ: Bone?\n(A) ear (B) leg\nA:<|im_end|>\n<|im_start|>assistant\n("
    assert document.requests == [
        ("loglikelihood", (context, "A")),
        ("loglikelihood", (context, "B")),
    ]


def test_without_a_chat_template_the_text_goes_on() -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    (document,) = _task(BONES, _shown(), _asking(plain)).test_docs()
    assert document.requests[0][1] == ("About.\n\nQ: Bone?\n(A) ear (B) leg\nA: (", "A")
    (written,) = _task(SUM, _shown(), _asking(plain)).test_docs()
    assert written.requests[0][1][0] == "About.\n\nQ: 1 + 1?\nA:"


def test_an_encoder_decoder_writes_the_whole_answer() -> None:
    (document,) = _task(BONES, _shown(), _asking(apart=True)).test_docs()
    assert [continuation for _, (_, continuation) in document.requests] == ["(A)", "(B)"]
    assert document.context.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("mode", "question", "options", "limit"),
    [
        ("direct", SUM, "inline", MOST_DIRECT_TOKENS),
        ("direct", BONES, "dashed", MOST_DIRECT_TOKENS),
        ("chain_of_thought", BONES, "inline", 100),
    ],
)
def test_everything_else_is_written(mode: str, question: Example, options: str, limit: int) -> None:
    (document,) = _task(question, _shown(mode, options=options)).test_docs()
    ((kind, (context, settings)),) = document.requests
    assert kind == "generate_until"
    assert (settings["max_gen_toks"], settings["do_sample"]) == (limit, False)
    assert "\nQ:" in settings["until"]
    assert context.startswith("<|im_start|>user\nAbout.\n\nQ: ")


def test_the_record_of_compared_letters() -> None:
    task = _task(BONES, _shown(), training_hashes=frozenset({BONES.content_hash()}))
    record = task.record(task.test_docs()[0], [(-2.0, False), (-1.0, True)])
    assert (record.choice_scores, record.predicted, record.label) == ((-2.0, -1.0), 1, 1)
    assert (record.correct, record.score, record.extracted, record.output) == (
        True,
        1.0,
        "(B)",
        None,
    )
    # The task's chance level, not one in two.
    assert record.chance == 0.25
    assert (record.loss, record.num_tokens, record.seen) == (None, 0, True)
    wrong = task.record(task.test_docs()[0], [(-1.0, True), (-2.0, False)])
    assert (wrong.correct, wrong.score) == (False, 0.0)


@pytest.mark.parametrize(
    ("mode", "output", "extracted", "score"),
    [
        ("direct", " 2\n\nQ: more", "2", 1.0),
        ("direct", "It is 3.", "3", 0.0),
        ("direct", "", None, 0.0),
        ("chain_of_thought", "One and one. The answer is 2.", "2", 1.0),
        ("chain_of_thought", "One and 7 is much. The answer is 3.", "3", 0.0),
        ("chain_of_thought", "I do not know.", None, 0.0),
    ],
)
def test_what_is_read_out_of_a_text(
    mode: str, output: str, extracted: str | None, score: float
) -> None:
    task = _task(SUM, _shown(mode))
    record = task.record(task.test_docs()[0], [output])
    assert (record.output, record.extracted, record.score) == (output, extracted, score)
    assert record.choice_scores == ()


def test_a_chain_of_thought_about_options_is_read_by_letter() -> None:
    task = _task(BONES, _shown("chain_of_thought"))
    record = task.record(task.test_docs()[0], ["Ears hear. The answer is (B)."])
    assert (record.extracted, record.correct, record.label, record.predicted) == (
        "(B)",
        True,
        1,
        None,
    )


def test_an_answer_that_fills_its_limit_is_unfinished() -> None:
    task = _task(SUM, _shown("chain_of_thought"))
    document = task.test_docs()[0]
    assert not task.record(document, ["2"]).unfinished
    long = "1 " * 100
    assert len(TOKENIZER(long, add_special_tokens=False)["input_ids"]) >= 100
    assert task.record(document, [long]).unfinished


def test_a_likelihood_that_is_no_number_names_task_and_question() -> None:
    task = _task(BONES, _shown())
    with pytest.raises(ModelError, match="example `bones` of task `group/task`"):
        task.record(task.test_docs()[0], [(float("nan"), False), (-1.0, True)])


def test_prompts_have_hashes_of_their_own() -> None:
    def prompt_hash(question: Example, shown: FewShot, answer: Any) -> str:
        task = _task(question, shown)
        return task.record(task.test_docs()[0], answer).prompt_hash

    letters = [(-1.0, False), (-2.0, False)]
    hashes = {
        prompt_hash(BONES, _shown(), letters),
        prompt_hash(BONES, _shown(options="listed"), letters),
        prompt_hash(BONES, _shown("chain_of_thought"), ["x"]),
        prompt_hash(SUM, _shown("chain_of_thought"), ["x"]),
    }
    assert len(hashes) == 4
    assert prompt_hash(BONES, _shown(), letters) in hashes


def test_a_prompt_that_is_cut_is_marked() -> None:
    short = build_lm(
        tiny_model("llama", max_position_embeddings=90),
        TOKENIZER,
        batch_size=4,
        precision="float32",
    )
    asking = Asking(TOKENIZER, short.encode, short.truncates, max_new_tokens=80)
    for question, mode in ((BONES, "chain_of_thought"), (SUM, "chain_of_thought")):
        assert _task(question, _shown(mode), asking).test_docs()[0].truncated
    # Letters need room for one token only.
    assert not _task(BONES, _shown(), asking).test_docs()[0].truncated


def test_both_kinds_run_through_lm_eval_in_one_task() -> None:
    task = PromptedTask("mixed", [BONES, SUM], shown=_shown(), asking=_asking(), chance=0.0)
    first, second = run(LM, {"mixed": task})
    assert (first.key, len(first.choice_scores), first.output) == ("bones", 2, None)
    assert (second.key, second.choice_scores) == ("sum", ())
    assert isinstance(second.output, str)
