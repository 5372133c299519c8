"""Our `Task` as an lm-eval task: a data set is described once, and lm-eval runs it.

Every example asks for one log-likelihood, that of its reference answer in the task's own rendering:
the loss, on the same text and tokens that training would see. An example with choices asks for one
more per choice, in a prompt that wants the letter only. All letters continue the same text by one
token, so they share one forward pass.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol, final

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as HarnessTask
from lm_eval.config.task import TaskConfig as HarnessTaskConfig

from flanmoe.core.errors import ModelError
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Example
from flanmoe.data.renderers import answer_texts, renderer_named
from flanmoe.data.tasks import Task
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.evaluation.lm import Answer, Encoded
from flanmoe.evaluation.metrics import estimate_mean
from flanmoe.evaluation.results import ExampleRecord

# What the model is made to begin its answer with, so that the letter is all that is left to say.
ANSWER_PREFIX = "The answer is "


class Encoder(Protocol):
    """Tokenises a context and a continuation as the model will see them (`HeldOutLM.encode`)."""

    def __call__(self, context: str, continuation: str) -> Encoded:
        """Return both as one token sequence."""
        ...


@dataclass(frozen=True, slots=True)
class Document:
    """An example with its requests: what lm-eval calls a doc.

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


@final
class HeldOutTask(HarnessTask):
    """Examples of one task for `lm_eval.evaluator.evaluate`: zero-shot, nothing downloaded.

    Metrics per example: `loss` (nats per token of the reference answer), and where there are
    choices `accuracy` and `chance` (1 / number of choices).

    Args:
        task: where the name and the rendering come from.
        examples: what is evaluated, in this order.
        tokenizer: renders prompts through its chat template.
        encode: the language model's `encode`; its token counts turn likelihoods into losses.
        training_hashes: content hashes of what the model was trained on.
    """

    VERSION = 1
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
        super().__init__()
        # Not through the constructor: lm-eval 0.4.13 takes the mapping given there for the
        # task's name.
        self._config = HarnessTaskConfig(task=task.name, num_fewshot=0, output_type="loglikelihood")
        self._name = task.name
        self._training_hashes = training_hashes
        self._documents = [
            _document(example, _pairs(example, task, tokenizer), encode) for example in examples
        ]

    def download(
        self, data_dir: Any = None, cache_dir: Any = None, download_mode: Any = None
    ) -> None:
        """Do nothing: the examples are there."""

    def has_training_docs(self) -> bool:
        """Few-shot examples are not drawn from here."""
        return False

    def has_validation_docs(self) -> bool:
        """Everything that is evaluated is a test document."""
        return False

    def has_test_docs(self) -> bool:
        """The examples are lm-eval's test documents."""
        return True

    def test_docs(self) -> list[Document]:
        """Return the examples with their requests."""
        return self._documents

    def doc_to_text(self, doc: Document) -> str:
        """Return the prompt whose reference answer is scored."""
        return doc.pairs[0][0]

    def doc_to_target(self, doc: Document) -> str:
        """Return the reference answer, end of turn included."""
        return doc.pairs[0][1]

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: list[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        **_options: Any,
    ) -> None:
        """Make the requests of every example.

        Takes the place of lm-eval's, which also draws few-shot examples, caches on disk and shows a
        bar of its own; the options for those mean nothing here.
        """
        documents = self.doc_iterator(
            rank=rank, limit=limit, samples=samples, world_size=world_size
        )
        self._instances = [
            instance
            for number, doc in documents
            for instance in self.construct_requests(doc, "", metadata=(self._name, number, 1))
        ]

    def construct_requests(self, doc: Document, ctx: str, **kwargs: Any) -> list[Instance]:
        """Return the request for the reference answer, then one per choice. `ctx` is not used."""
        return [
            Instance(
                request_type="loglikelihood",
                doc={"task": self._name, "key": doc.example.key},
                arguments=pair,
                idx=index,
                metadata=kwargs["metadata"],
            )
            for index, pair in enumerate(doc.pairs)
        ]

    def process_results(self, doc: Document, results: Sequence[Answer]) -> dict[str, float]:
        """Return the metrics of one example."""
        record = self.record(doc, results)
        metrics = {"loss": record.loss}
        if record.correct is not None and record.chance is not None:
            metrics |= {"accuracy": float(record.correct), "chance": record.chance}
        return metrics

    def record(self, doc: Document, results: Sequence[Answer]) -> ExampleRecord:
        """Return everything that is kept of one example.

        Args:
            doc: the example with its requests.
            results: log-likelihood and greediness of each request, in their order.

        Raises:
            ModelError: if a log-likelihood is not a finite number.
        """
        likelihoods = [likelihood for likelihood, _ in results]
        example = doc.example
        if not all(math.isfinite(likelihood) for likelihood in likelihoods):
            raise ModelError(
                f"A log-likelihood must be a finite number, but those of example `{example.key}` of task "
                f"`{self._name}` are {likelihoods}. The model's weights are damaged, or training diverged."
            )
        content_hash = example.content_hash()
        return ExampleRecord(
            task=self._name,
            key=example.key,
            content_hash=content_hash,
            prompt_hash=_hash(doc.pairs),
            loss=-likelihoods[0] / doc.num_tokens,
            num_tokens=doc.num_tokens,
            seen=content_hash in self._training_hashes,
            truncated=doc.truncated,
            **_choice_fields(example, likelihoods[1:]),
        )

    def aggregation(self) -> dict[str, Any]:
        """Average every metric over its examples."""
        return dict.fromkeys(("loss", "accuracy", "chance"), _mean)

    def higher_is_better(self) -> Mapping[str, bool]:
        """Say which way a metric improves."""
        return {"loss": False, "accuracy": True, "chance": True}


def _pairs(example: Example, task: Task, tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    reference = render_chat(example, task.renderer, tokenizer, task.name)
    pairs = [(reference.prompt, reference.response)]
    if example.label is not None:
        direct = render_chat(example, renderer_named("direct"), tokenizer, task.name)
        start, letters = _distinct_parts(answer_texts(example))
        context = direct.prompt + ANSWER_PREFIX + start
        pairs += [(context, letter) for letter in letters]
    return tuple(pairs)


def _document(example: Example, pairs: tuple[tuple[str, str], ...], encode: Encoder) -> Document:
    encoded = [encode(*pair) for pair in pairs]
    truncated = any(request.truncated for request in encoded)
    return Document(example, pairs, encoded[0].num_scored, truncated)


def _choice_fields(example: Example, scores: Sequence[float]) -> dict[str, Any]:
    if not scores:
        return {}
    predicted = max(range(len(scores)), key=scores.__getitem__)
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


def _hash(pairs: Sequence[tuple[str, str]]) -> str:
    text = "\x1e".join("\x1f".join(pair) for pair in pairs)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _mean(values: Sequence[float]) -> float:
    return estimate_mean(values).mean
