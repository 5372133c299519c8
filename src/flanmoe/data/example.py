"""The records that flow through the data package: `Example`, `Rendered`, `Packed`, `PackedPair`.

An `Example` is one supervised item as its data set gives it. Rendering turns it into text whose
prompt and response are kept apart (`Rendered`). Tokenised and put side by side in rows of one
length it is `Packed`, for a decoder, or `PackedPair`, for an encoder-decoder.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

# The label of a place that enters no loss, as transformers has it.
IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised item.

    Attributes:
        inputs: the question or instruction, without answer options.
        target: the answer text.
        choices: the answer options in order, empty where the answer is free.
        label: index of the right option, None where there are no options.
        rationales: chains of thought that lead to the target, empty where there are none.
        key: name of the example within its task and split, stable between runs.
        fields: the texts of the record by the names that its source gives them, for templates;
            without answer options where those became choices.
        metadata: whatever else the source says (subject, description, ...).
        history: turns of a conversation before the inputs, as (role, text) in order; the roles are
            `system` (the first turn only), `user` and `assistant`.
    """

    inputs: str
    target: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    rationales: tuple[str, ...] = ()
    key: str = ""
    fields: dict[str, str] = field(default_factory=dict[str, str])
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    history: tuple[tuple[str, str], ...] = ()

    def content_hash(self) -> str:
        """Hash of what the example asks and answers, with the turns before it;
        equal for equal examples from different sources.

        Kept with a trained model, so that a later evaluation can mark what the model has seen.
        """
        before = (f"{role}\x1e{_folded(turn)}" for role, turn in self.history)
        text = "\x1f".join((_folded(self.inputs), _folded(self.target), *before))
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as text for one model family.

    Attributes:
        prompt: what the model is given; no loss.
        response: what the model is to write; loss on every token of it.
        task: name of the task that it came from.
        key: the example's key.
        content_hash: the example's hash.
    """

    prompt: str
    response: str
    task: str
    key: str
    content_hash: str

    @classmethod
    def of(cls, example: Example, *, prompt: str, response: str, task: str) -> "Rendered":
        """Return the two texts with where they came from."""
        return cls(prompt, response, task, example.key, example.content_hash())

    @property
    def text(self) -> str:
        """Prompt and response as one string."""
        return self.prompt + self.response

    @property
    def loss_spans(self) -> tuple[tuple[int, int], ...]:
        """Character spans of `text` whose tokens enter the loss."""
        return ((len(self.prompt), len(self.text)),)


@dataclass(frozen=True, slots=True)
class Packed:
    """One row of tokens for a decoder. L positions.

    Segment 0 is padding; examples are numbered from 1. Position ids restart at 0 in every segment,
    padding included, which is what keeps examples apart inside native transformers attention.

    Attributes:
        input_ids: token ids.
        labels: the token itself where it enters the loss as a prediction target, else -100
            (unshifted, as transformers expects).
        segment_ids: 0 for padding, else the number of the example in the row.
        position_ids: position within the segment.
        tasks: task name of each example in the row, in order of their segments.
    """

    input_ids: Int[np.ndarray, " L"]
    labels: Int[np.ndarray, " L"]
    segment_ids: Int[np.ndarray, " L"]
    position_ids: Int[np.ndarray, " L"]
    tasks: tuple[str, ...]

    @property
    def num_real_tokens(self) -> int:
        """Tokens that belong to an example."""
        return int((self.segment_ids != 0).sum())

    @property
    def num_loss_tokens(self) -> int:
        """Tokens whose prediction enters the loss; never the first of a row."""
        return int((self.labels[1:] != IGNORED_LABEL).sum())

    @property
    def segment_sizes(self) -> tuple[int, ...]:
        """Tokens of padding, then of each example in order."""
        return _sizes(self.segment_ids, len(self.tasks))


@dataclass(frozen=True, slots=True)
class PackedPair:
    """One row of tokens for an encoder-decoder. M positions of the encoder, L of the decoder.

    Example k of the row is what carries segment k on both sides. There are no position ids: the models
    that read such rows know positions as distances between tokens only.

    Attributes:
        input_ids: what the encoder reads.
        segment_ids: of the encoder's positions: 0 for padding, else the number of the example.
        decoder_input_ids: what the decoder is given: of each example a start token, then its target
            without the last token.
        decoder_segment_ids: of the decoder's positions, as `segment_ids`.
        labels: aligned: the token that the decoder is to predict at this very position, -100 where
            nothing enters the loss.
        tasks: task name of each example in the row, in order of their segments.
    """

    input_ids: Int[np.ndarray, " M"]
    segment_ids: Int[np.ndarray, " M"]
    decoder_input_ids: Int[np.ndarray, " L"]
    decoder_segment_ids: Int[np.ndarray, " L"]
    labels: Int[np.ndarray, " L"]
    tasks: tuple[str, ...]

    @property
    def num_real_tokens(self) -> int:
        """Tokens of encoder and decoder that belong to an example."""
        return int((self.segment_ids != 0).sum() + (self.decoder_segment_ids != 0).sum())

    @property
    def num_loss_tokens(self) -> int:
        """Tokens whose prediction enters the loss."""
        return int((self.labels != IGNORED_LABEL).sum())

    @property
    def segment_sizes(self) -> tuple[int, ...]:
        """Tokens of padding, then of each example in order; those of both sides together."""
        sides = (self.segment_ids, self.decoder_segment_ids)
        inputs, targets = (_sizes(side, len(self.tasks)) for side in sides)
        return tuple(map(sum, zip(inputs, targets, strict=True)))


def _sizes(segment_ids: Int[np.ndarray, " N"], num_examples: int) -> tuple[int, ...]:
    return tuple(np.bincount(segment_ids, minlength=num_examples + 1).tolist())


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
