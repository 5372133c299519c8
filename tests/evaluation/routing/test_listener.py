"""Counts of a listener against the model's own router logits, text by text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.evaluation.lm import build_lm
from flanmoe.evaluation.lm.generation import plan_writing
from flanmoe.evaluation.lm.requests import Generation, encode_pairs
from flanmoe.evaluation.lm.scoring import plan_scoring
from flanmoe.evaluation.lm.token_tree import Group, Tokens
from flanmoe.evaluation.routing import RoutingListener
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

TOP_K = 2

# A token of a text with everything before it, and the task that it is counted for.
Read = tuple[Tokens, str]


def questions(task: str, size: int, beginning: str) -> list[tuple[str, str, str]]:
    """Questions after 130 tokens that they share, of different lengths, with choices that part late."""
    shots = f"{beginning}: " + "one and one is two. " * 6
    return [
        (task, f"{shots}Is {'so ' * (number % 5)}{number} even? ", choice)
        for number in range(size)
        for choice in ("yes it is", "yes it was", "A", "B")
    ]


# The texts of the two tasks part at their first token.
ASKED = [*questions("sums", 7, "Sums"), *questions("songs", 5, "All songs")]


def to_score(asked: Sequence[tuple[str, str, str]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (context, answer), 0, (task, number, 1))
        for number, (task, context, answer) in enumerate(asked)
    ]


def to_write(asked: Sequence[tuple[str, str]], max_new_tokens: int) -> list[Instance]:
    settings = {"until": ["\n\n"], "max_gen_toks": max_new_tokens, "do_sample": False}
    return [
        Instance("generate_until", {}, (context, settings), 0, (task, number, 1))
        for number, (task, context) in enumerate(asked)
    ]


def read_by(groups: Sequence[Group], tasks: Sequence[str]) -> Iterator[Read]:
    """What a plan reads: prefixes and rows, each token once; `tasks` has the task of every text."""
    seen: set[Any] = set()
    for group in groups:
        before: Tokens = ()
        way: list[Any] = []
        part = group.prefix
        while part is not None:
            way, part = [part, *way], part.parent
        for part in way:
            for token in part.tokens:
                before = (*before, token)
                if part not in seen:
                    yield before, tasks[group.rows[0].ends[0][0]]
            seen.add(part)
        for row in group.rows:
            owner = row.texts()
            for place in range(len(row.tokens)):
                path = [row.tokens[one] for one in row.path(place, int(row.depths()[place]) + 1)]
                yield (*before, *path), tasks[owner[place]]


def counted(
    model: PreTrainedModel, reads: Sequence[Read]
) -> tuple[Counter[str], dict[str, np.ndarray]]:
    """The definition: tokens by task; and by task the assignments of each layer to each expert."""
    tokens: Counter[str] = Counter(task for _, task in reads)
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    found = {task: np.zeros((layers, experts), dtype=np.int64) for task in tokens}
    # By the text up to a token; a pass over a long text says it of every text that it begins with.
    chosen: dict[Tokens, list[list[int]]] = {}
    for text in sorted({text for text, _ in reads}, key=len, reverse=True):
        if text not in chosen:
            with torch.no_grad():
                scores = model(torch.tensor([text]), output_router_logits=True).router_logits
            experts_of = torch.stack(scores).softmax(-1).topk(TOP_K).indices.tolist()
            for end in range(len(text)):
                chosen[text[: end + 1]] = [layer[end] for layer in experts_of]
    for text, task in reads:
        for layer, ids in enumerate(chosen[text]):
            found[task][layer, ids] += 1
    return tokens, found


def greedy(model: PreTrainedModel, context: Tokens, most: int) -> Tokens:
    """The context with what is written after it, one pass a token."""
    text = list(context)
    for _ in range(most):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] == model.config.eos_token_id:
            break
    return tuple(text)


def check(
    listener: RoutingListener, tokens: Counter[str], assignments: dict[str, np.ndarray]
) -> None:
    found = listener.counts()
    assert set(found.names) == set(tokens)
    for place, task in enumerate(found.names):
        assert found.tokens[place].sum() == tokens[task]
        by_layer = np.stack([layer[place].sum(axis=0) for layer in found.assignments])
        assert (by_layer == assignments[task]).all()
    for layer in found.assignments:
        # Of each half of each task too.
        assert (layer.sum(axis=-1) == TOP_K * found.tokens).all()


@pytest.mark.parametrize("batch_size", [None, 1, 8])
@pytest.mark.parametrize("sharing", [True, False])
def test_scored_tokens_are_counted_as_the_routers_send_them(
    sharing: bool, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sharing:
        monkeypatch.setattr("flanmoe.evaluation.lm.decoder.can_share", lambda forward: False)
    model, tokenizer = tiny_model("mixtral"), tiny_tokenizer()
    listener = RoutingListener(model)
    lm = build_lm(model, tokenizer, batch_size=batch_size, listener=listener)
    lm.loglikelihood(to_score(ASKED))
    encoded = encode_pairs(
        tokenizer, [(context, answer) for _, context, answer in ASKED], max_length=512
    )
    planned = plan_scoring(encoded, sharing=sharing)
    tasks = [ASKED[members[0]][0] for members in planned.members]
    reads = list(read_by(planned.groups, tasks))
    if sharing:
        assert len(set(reads)) == len(reads) < planned.num_apart / 4
    else:
        assert len(reads) == sum(len(text) for text in {one.inputs for one in encoded})
    assert listener.counts().tokens.sum() == lm.work.real_tokens == len(reads)
    check(listener, *counted(model, reads))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_written_tokens_are_counted_until_an_answer_ends(batch_size: int) -> None:
    model, tokenizer = tiny_model("mixtral", seed=1), tiny_tokenizer()
    listener = RoutingListener(model)
    lm = build_lm(model, tokenizer, batch_size=batch_size, listener=listener)
    asked = list(dict.fromkeys((task, context) for task, context, _ in ASKED))
    # Of different lengths, so that some rows are finished while others are written.
    lengths = [1 + 3 * (number % 4) for number in range(len(asked))]
    answers = lm.generate_until(
        [
            request
            for one, most in zip(asked, lengths, strict=True)
            for request in to_write([one], most)
        ]
    )
    contexts = [
        tuple(tokenizer(context, add_special_tokens=False)["input_ids"]) for _, context in asked
    ]
    generations = [
        Generation(context, ("\n\n",), most)
        for context, most in zip(contexts, lengths, strict=True)
    ]
    reads = list(read_by(plan_writing(generations), [task for task, _ in asked]))
    for context, most, (task, _), answer in zip(contexts, lengths, asked, answers, strict=True):
        text = greedy(model, context, most)
        assert answer == tokenizer.decode(text[len(context) :], skip_special_tokens=True)
        # The last token is written and not read.
        reads += [(text[:end], task) for end in range(len(context) + 1, len(text))]
    check(listener, *counted(model, reads))


def test_both_kinds_of_requests_add_up() -> None:
    model, asked = tiny_model("mixtral"), [("sums", "one and one is"), ("songs", "la la")]
    apart = []
    together = RoutingListener(model)
    lm = build_lm(model, tiny_tokenizer(), listener=together)
    for kind in ("loglikelihood", "generate_until"):
        requests = to_score(ASKED) if kind == "loglikelihood" else to_write(asked, 9)
        getattr(lm, kind)(requests)
        alone = RoutingListener(model)
        getattr(build_lm(model, tiny_tokenizer(), listener=alone), kind)(requests)
        apart.append(alone.counts())
    found = together.counts()
    assert found.names == apart[0].names == apart[1].names
    for layer, first, second in zip(
        found.assignments, *(one.assignments for one in apart), strict=True
    ):
        assert (layer.sum(axis=1) == first.sum(axis=1) + second.sum(axis=1)).all()


def test_a_beginning_that_tasks_share_is_counted_once() -> None:
    model, tokenizer = tiny_model("mixtral"), tiny_tokenizer()
    asked = [*questions("sums", 3, "Same"), *questions("songs", 3, "Same")]
    asked = [
        (task, context + ("Sing. " if task == "songs" else ""), answer)
        for task, context, answer in asked
    ]
    listener = RoutingListener(model)
    lm = build_lm(model, tokenizer, listener=listener)
    lm.loglikelihood(to_score(asked))
    found = dict(zip(listener.counts().names, listener.counts().tokens.sum(axis=1), strict=True))
    texts = {
        task: {
            one.inputs
            for one in encode_pairs(
                tokenizer,
                [(context, answer) for own, context, answer in asked if own == task],
                max_length=512,
            )
        }
        for task in found
    }
    beginnings = {
        task: {text[:end] for text in own for end in range(1, len(text) + 1)}
        for task, own in texts.items()
    }
    shared = len(beginnings["sums"] & beginnings["songs"])
    assert shared > 120
    assert sum(found.values()) == lm.work.real_tokens
    # One of the two has the beginning, and the other only what is its own.
    assert min(found.values()) < shared
    assert sum(found.values()) < sum(map(len, beginnings.values())) - shared / 2


def test_requests_that_are_answered_already_are_not_counted_again() -> None:
    model = tiny_model("mixtral")
    listener = RoutingListener(model)
    lm = build_lm(model, tiny_tokenizer(), listener=listener)
    lm.loglikelihood(to_score(ASKED))
    before = listener.counts().tokens.sum()
    lm.loglikelihood(to_score(ASKED))
    assert listener.counts().tokens.sum() == before


def test_a_pass_that_fails_counts_nothing() -> None:
    model = tiny_model("mixtral")
    listener = RoutingListener(model)
    labels = torch.full((1, 5), listener.label("sums"))
    tokens = torch.arange(5, 10)[None]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="shape"), listener.listening(labels):
            # Fails when all routers have run.
            torch.empty(2).view_as(model(tokens).logits)
        assert listener.counts().tokens.sum() == 0
        with listener.listening(labels):
            model(tokens)
    assert listener.counts().tokens.sum() == 5
    assert not any(
        block._forward_hooks for block in model.modules() if "Router" in type(block).__name__
    )


def test_a_half_of_the_requests_falls_to_each_half() -> None:
    listener = RoutingListener(tiny_model("mixtral"))
    labels = [listener.label("sums") for _ in range(400)]
    assert set(labels) == {0, 1}
    assert 150 < sum(labels) < 250
    assert {listener.label("songs") for _ in range(40)} == {2, 3}
    again = RoutingListener(tiny_model("mixtral"))
    assert [again.label("sums") for _ in range(400)] == labels


def test_padding_is_left_out() -> None:
    model = tiny_model("qwen3_moe")
    listener = RoutingListener(model)
    one, other = 2 * 0 + 1, 2
    for task in ("sums", "songs"):
        listener.label(task)
    labels = torch.tensor([[one, one, -1], [other, -1, -1]])
    with torch.no_grad(), listener.listening(labels):
        model(torch.tensor([[5, 6, 0], [7, 0, 0]]))
    found = listener.counts()
    assert found.tokens.tolist() == [[0, 2], [1, 0]]
    assert [layer.sum(axis=-1).tolist() for layer in found.assignments] == 2 * [[[0, 4], [2, 0]]]


def test_a_dense_model_has_nothing_to_record() -> None:
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM has no experts\. Leave `--routing` out"
    ):
        RoutingListener(tiny_model("llama"))


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        RoutingListener(tiny_model("t5"))


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny_model("mixtral")
    listener = RoutingListener(model)
    model.get_submodule("model.layers.1.mlp.gate").get_parameter("weight").data[3] = torch.nan
    with (
        pytest.raises(ModelError, match=r"model\.layers\.1\.mlp gave NaN or infinity for 4 of 4"),
        torch.no_grad(),
        listener.listening(torch.full((1, 4), listener.label("sums"))),
    ):
        model(torch.tensor([[5, 6, 7, 8]]))


def test_a_router_that_does_not_run_is_an_error() -> None:
    listener = RoutingListener(tiny_model("mixtral"))
    with (
        pytest.raises(ModelError, match=r"model\.layers\.0\.mlp ran 0 times"),
        listener.listening(torch.zeros(1, 4, dtype=torch.long)),
    ):
        pass
