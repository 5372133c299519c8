"""Our `Task` as an lm-eval task, scored on its reference answers: likelihoods only, no few-shot text.

Every example asks for one log-likelihood, that of its reference answer in the task's own rendering:
the loss, on the same text and tokens that training would see. An example with choices asks for one
more per choice. Where the task has a template, each choice is the answer in the words of that template,
after the same prompt: what is compared is what is trained. Without one the prompt wants the letter only;
all letters continue the same text by one token, so they share one forward pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, final

from flanmoe.data.chat import render_chat
from flanmoe.data.example import Example
from flanmoe.data.renderers import answer_texts, renderer_named
from flanmoe.data.tasks import Task
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.evaluation.lm import Answer
from flanmoe.evaluation.results import ExampleRecord
from flanmoe.evaluation.tasks.held import Encoder, HeldTask, RequestType, hash_of_pairs, likeliest

# What the model is made to begin its answer with, so that the letter is all that is left to say.
ANSWER_PREFIX = "The answer is "


@dataclass(frozen=True, slots=True)
class ReferenceDocument:
    """An example with the likelihoods that it asks for.

    Attributes:
        example: the example.
        pairs: (context, continuation) of the reference answer, then of each choice.
        num_tokens: tokens of the reference answer.
        truncated: whether a context is cut on its left to fit into the model.
    """

    example: Example
    pairs: tuple[tuple[str, str], ...]
    num_tokens: int
    truncated: bool

    @property
    def requests(self) -> list[tuple[RequestType, tuple[Any, ...]]]:
        """One log-likelihood a pair."""
        return [("loglikelihood", pair) for pair in self.pairs]


@final
class ReferenceTask(HeldTask[ReferenceDocument]):
    """Examples of one task, zero-shot, scored on their reference answers.

    Metrics per example: `loss` (nats per token of the reference answer), and where there are
    choices `accuracy` and `chance` (1 / number of choices).

    Args:
        task: where the name and the rendering come from.
        examples: what is evaluated, in this order.
        tokenizer: renders prompts through its chat template.
        encode: the language model's `encode`; its token counts turn likelihoods into losses.
        training_hashes: content hashes of what the model was trained on.
    """

    OUTPUT_TYPE = "loglikelihood"

    def __init__(
        self,
        task: Task,
        examples: Iterable[Example],
        *,
        tokenizer: Tokenizer,
        encode: Encoder,
        training_hashes: frozenset[str] = frozenset(),
    ) -> None:
        documents = (
            _document(example, _pairs(example, task, tokenizer), encode) for example in examples
        )
        super().__init__(task.name, documents, training_hashes=training_hashes)

    def doc_to_target(self, doc: ReferenceDocument) -> str:
        """Return the reference answer, end of turn included."""
        return doc.pairs[0][1]

    def record(self, doc: ReferenceDocument, results: Sequence[Answer]) -> ExampleRecord:
        """Return everything that is kept of one example.

        Args:
            doc: the example with its requests.
            results: log-likelihood and greediness of each request, in their order.

        Raises:
            ModelError: if a log-likelihood is not a finite number.
        """
        likelihoods = self.likelihoods(doc.example, results)
        content_hash = doc.example.content_hash()
        return ExampleRecord(
            task=self._name,
            key=doc.example.key,
            content_hash=content_hash,
            prompt_hash=hash_of_pairs(doc.pairs),
            loss=-likelihoods[0] / doc.num_tokens,
            num_tokens=doc.num_tokens,
            seen=content_hash in self._training_hashes,
            truncated=doc.truncated,
            **_choice_fields(doc.example, likelihoods[1:]),
        )


def _pairs(example: Example, task: Task, tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    reference = render_chat(example, task.renderer, tokenizer, task.name)
    pairs = [(reference.prompt, reference.response)]
    if example.label is None:
        return tuple(pairs)
    if task.config.template is not None:
        pairs += [
            (reference.prompt, _answered(example, label, task, tokenizer))
            for label in range(len(example.choices))
        ]
    else:
        direct = render_chat(example, renderer_named("direct"), tokenizer, task.name)
        start, letters = _distinct_parts(answer_texts(example))
        context = direct.prompt + ANSWER_PREFIX + start
        pairs += [(context, letter) for letter in letters]
    return tuple(pairs)


def _answered(example: Example, label: int, task: Task, tokenizer: Tokenizer) -> str:
    """Return what the model would say if this choice were the right one; the seeds are those of the example."""
    other = replace(example, label=label, target=example.choices[label])
    return render_chat(other, task.renderer, tokenizer, task.name).response


def _document(
    example: Example, pairs: tuple[tuple[str, str], ...], encode: Encoder
) -> ReferenceDocument:
    encoded = [encode(*pair) for pair in pairs]
    truncated = any(request.truncated for request in encoded)
    return ReferenceDocument(example, pairs, encoded[0].num_scored, truncated)


def _choice_fields(example: Example, scores: Sequence[float]) -> dict[str, Any]:
    if not scores:
        return {}
    predicted = likeliest(scores)
    return {
        "choice_scores": tuple(scores),
        "predicted": predicted,
        "label": example.label,
        "correct": predicted == example.label,
    }


def _distinct_parts(answers: Sequence[str]) -> tuple[str, list[str]]:
    """Split "(A)", "(B)" into their common start "(" and what tells them apart, "A" and "B"."""
    start = _num_common(answers)
    rests = [answer[start:] for answer in answers]
    end = _num_common([rest[::-1] for rest in rests])
    return answers[0][:start], [rest[: len(rest) - end] for rest in rests]


def _num_common(texts: Sequence[str]) -> int:
    """Count the characters that all texts begin with."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
