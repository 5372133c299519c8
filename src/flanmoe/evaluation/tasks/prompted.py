"""Questions behind few-shot prompts as an lm-eval task, scored on the answer alone.

A direct question with lettered options asks for the likelihood of each letter behind the same text. Any other
question asks the model to write: a few tokens where the answer is wanted alone, more for a chain of thought.
What it wrote is read by `flanmoe.evaluation.answers`; an answer that cannot be read is wrong, and counted.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from flanmoe.data.chat import chat_prompt
from flanmoe.data.example import Example
from flanmoe.data.options import letter
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.evaluation.answers import direct_answer, graded_answer
from flanmoe.evaluation.results import ExampleRecord
from flanmoe.evaluation.tasks.few_shot import FewShot, short_answer
from flanmoe.evaluation.tasks.held import Encoder, HeldTask, RequestType, hash_of_pairs, likeliest

# A sorted list of words is the longest direct answer in the suites.
MOST_DIRECT_TOKENS = 64

# A model that goes on past its answer goes on to a question of its own.
_NEXT_QUESTION = ("\nQ:", "\n\nQuestion")
_END_OF_PARAGRAPH = ("\n\n", "\nQ:")


@dataclass(frozen=True, slots=True)
class Asking:
    """How one language model is asked.

    Attributes:
        tokenizer: writes prompts through its chat template, where it has one.
        encode: the language model's `encode`.
        truncates: whether a prompt is cut to leave room for so many new tokens.
        max_new_tokens: most tokens of a chain of thought.
        answers_apart: whether the model writes its answer beside the prompt instead of behind it
            (encoder-decoder).
    """

    tokenizer: Tokenizer
    encode: Encoder
    truncates: Callable[[str, int], bool]
    max_new_tokens: int
    answers_apart: bool = False

    def letters(self, prompt: str, num_choices: int) -> tuple[str, tuple[str, ...]]:
        """Return a context and the continuations that stand for the options."""
        names = [letter(index) for index in range(num_choices)]
        if self.answers_apart:
            return prompt, tuple(f"({name})" for name in names)
        # Behind a plain text the answer is another word; in a turn of its own it comes first.
        return prompt + ("(" if self.tokenizer.chat_template else " ("), tuple(names)


@dataclass(frozen=True, slots=True)
class PromptedDocument:
    """A question as it is asked.

    Attributes:
        example: the question.
        context: what the model is given.
        letters: continuations whose likelihoods are compared; empty where the model is to write.
        until: texts at which writing stops.
        max_new_tokens: most tokens that are written.
        truncated: whether the context is cut on its left to fit into the model.
    """

    example: Example
    context: str
    letters: tuple[str, ...]
    until: tuple[str, ...]
    max_new_tokens: int
    truncated: bool

    @property
    def requests(self) -> list[tuple[RequestType, tuple[Any, ...]]]:
        """One log-likelihood a letter, or one text to be written."""
        if self.letters:
            return [("loglikelihood", (self.context, one)) for one in self.letters]
        settings = {
            "until": list(self.until),
            "max_gen_toks": self.max_new_tokens,
            "do_sample": False,
        }
        return [("generate_until", (self.context, settings))]


@final
class PromptedTask(HeldTask[PromptedDocument]):
    """Questions of one task behind the same few-shot text.

    Args:
        name: of the task.
        questions: what is evaluated, in this order.
        shown: the text that comes before each question.
        asking: how the model is asked.
        chance: score that guessing is expected to give, between 0 and 1.
        training_hashes: content hashes of what the model was trained on.
    """

    OUTPUT_TYPE = "generate_until"

    def __init__(
        self,
        name: str,
        questions: Iterable[Example],
        *,
        shown: FewShot,
        asking: Asking,
        chance: float,
        training_hashes: frozenset[str] = frozenset(),
    ) -> None:
        documents = (_document(question, name, shown, asking) for question in questions)
        super().__init__(name, documents, training_hashes=training_hashes)
        self._shown = shown
        self._asking = asking
        self._chance = chance

    @property
    def new_tokens(self) -> int:
        """Most tokens that the model writes for all of its questions."""
        return sum(doc.max_new_tokens for doc in self.test_docs())

    def doc_to_target(self, doc: PromptedDocument) -> str:
        """Return the right answer as the prompt writes answers."""
        return short_answer(doc.example, self._shown.style)

    def record(self, doc: PromptedDocument, results: Sequence[Any]) -> ExampleRecord:
        """Return everything that is kept of one question.

        Args:
            doc: the question.
            results: the likelihood and greediness of each letter, or the text that was written.

        Raises:
            ModelError: if a log-likelihood is not a finite number.
        """
        content_hash = doc.example.content_hash()
        found = self._picked(doc, results) if doc.letters else self._read(doc, str(results[0]))
        return ExampleRecord(
            task=self._name,
            key=doc.example.key,
            content_hash=content_hash,
            prompt_hash=hash_of_pairs([(doc.context, one) for one in doc.letters or ("",)]),
            label=doc.example.label,
            chance=self._chance,
            seen=content_hash in self._training_hashes,
            truncated=doc.truncated,
            **found,
        )

    def _picked(self, doc: PromptedDocument, results: Sequence[Any]) -> dict[str, Any]:
        scores = tuple(self.likelihoods(doc.example, results))
        predicted = likeliest(scores)
        return {
            "choice_scores": scores,
            "predicted": predicted,
            "correct": predicted == doc.example.label,
            "extracted": f"({letter(predicted)})",
        }

    def _read(self, doc: PromptedDocument, output: str) -> dict[str, Any]:
        asked_alone = self._shown.mode == "direct"
        graded = graded_answer(
            (direct_answer(output) or "") if asked_alone else output, doc.example
        )
        written = self._asking.tokenizer(output, add_special_tokens=False)["input_ids"]
        return {
            "output": output,
            "extracted": graded.extracted,
            "correct": bool(graded.right),
            "unfinished": len(written) >= doc.max_new_tokens,
        }


def _document(example: Example, name: str, shown: FewShot, asking: Asking) -> PromptedDocument:
    prompt = chat_prompt(shown.asking(example), asking.tokenizer, task=name)
    if shown.mode == "direct" and shown.style.lettered and example.label is not None:
        context, letters = asking.letters(prompt, len(example.choices))
        truncated = asking.encode(context, letters[0]).truncated
        return PromptedDocument(example, context, letters, (), 0, truncated)
    direct = shown.mode == "direct"
    limit = min(asking.max_new_tokens, MOST_DIRECT_TOKENS) if direct else asking.max_new_tokens
    until = _END_OF_PARAGRAPH if direct else _NEXT_QUESTION
    return PromptedDocument(example, prompt, (), until, limit, asking.truncates(prompt, limit))
