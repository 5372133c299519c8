"""What every task of ours has in common for lm-eval: its examples are there, nothing is downloaded."""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as HarnessTask
from lm_eval.config.task import TaskConfig as HarnessTaskConfig

from flanmoe.core.errors import ModelError
from flanmoe.data.example import Example
from flanmoe.evaluation.lm import Answer, Encoded
from flanmoe.evaluation.metrics import estimate_mean
from flanmoe.evaluation.results import ExampleRecord

RequestType = Literal["loglikelihood", "generate_until"]


class Encoder(Protocol):
    """Tokenises a context and a continuation as the model will see them (`encode` of our language models)."""

    def __call__(self, context: str, continuation: str) -> Encoded:
        """Return both as one token sequence."""
        ...


class HeldDocument(Protocol):
    """An example with its requests: what lm-eval calls a doc."""

    @property
    def example(self) -> Example:
        """The example."""
        ...

    @property
    def requests(self) -> Sequence[tuple[RequestType, tuple[Any, ...]]]:
        """What is asked of the language model for it, in order."""
        ...


Document = TypeVar("Document", bound=HeldDocument)


class HeldTask(HarnessTask, Generic[Document]):
    """Examples of one task for `lm_eval.evaluator.evaluate`.

    Args:
        name: of the task.
        documents: what is evaluated, in this order.
        training_hashes: content hashes of what the model was trained on.
    """

    VERSION = 1

    def __init__(
        self, name: str, documents: Iterable[Document], *, training_hashes: frozenset[str]
    ) -> None:
        super().__init__()
        # Not through the constructor: lm-eval 0.4.13 takes the mapping given there for the
        # task's name.
        self._config = HarnessTaskConfig(
            task=name, num_fewshot=0, output_type=self.OUTPUT_TYPE or "loglikelihood"
        )
        self._name = name
        self._training_hashes = training_hashes
        self._documents = list(documents)

    @abstractmethod
    def record(self, doc: Document, results: Sequence[Any]) -> ExampleRecord:
        """Return everything that is kept of one example; `results` answer its requests in their order."""

    def download(
        self, data_dir: Any = None, cache_dir: Any = None, download_mode: Any = None
    ) -> None:
        """Do nothing: the examples are there."""

    def has_training_docs(self) -> bool:
        """Few-shot examples are not drawn by lm-eval."""
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
        """Return the prompt of the first request."""
        return str(doc.requests[0][1][0])

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
        """Return the requests of one example. `ctx` is not used."""
        return [
            Instance(
                request_type=kind,
                # What a language model names when something goes wrong.
                doc={"task": self._name, "key": doc.example.key},
                arguments=arguments,
                idx=index,
                metadata=kwargs["metadata"],
            )
            for index, (kind, arguments) in enumerate(doc.requests)
        ]

    def process_results(self, doc: Document, results: Sequence[Any]) -> dict[str, float]:
        """Return the metrics of one example."""
        record = self.record(doc, results)
        metrics = {"loss": record.loss, "accuracy": record.score}
        if record.score is not None:
            metrics["chance"] = record.chance
        return {name: value for name, value in metrics.items() if value is not None}

    def aggregation(self) -> dict[str, Any]:
        """Average every metric over its examples."""
        return dict.fromkeys(("loss", "accuracy", "chance"), _mean)

    def higher_is_better(self) -> Mapping[str, bool]:
        """Say which way a metric improves."""
        return {"loss": False, "accuracy": True, "chance": True}

    def likelihoods(self, example: Example, results: Sequence[Answer]) -> list[float]:
        """Return the log-likelihoods among results.

        Raises:
            ModelError: if one is not a finite number; names task and example.
        """
        found = [likelihood for likelihood, _ in results]
        if not all(math.isfinite(likelihood) for likelihood in found):
            raise ModelError(
                f"A log-likelihood must be a finite number, but those of example `{example.key}` of task "
                f"`{self._name}` are {found}. The model's weights are damaged, or training diverged."
            )
        return found


def likeliest(scores: Sequence[float]) -> int:
    """Return the index of the largest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def hash_of_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    """Hash the texts of requests, in order."""
    text = "\x1e".join("\x1f".join(pair) for pair in pairs)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _mean(values: Sequence[float]) -> float:
    return estimate_mean(values).mean
