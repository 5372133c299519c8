"""Rows to examples, by the fields that a row has.

One table says which fields ask and which answer. The first entry whose needed fields are all there
decides; it is pure, and a row that no entry fits is an error that says why, or lists what is
understood. Rows that hold turns are read by `conversations`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
from flanmoe.data.conversations import conversation_field, read_conversation
from flanmoe.data.example import Example
from flanmoe.data.options import (
    MAXIMUM_OPTIONS,
    label_of,
    letter,
    looks_optional,
    read_options,
    split_question,
)
from flanmoe.data.rationales import clean_rationale
from flanmoe.data.sources.base import Locator, Row, as_list, as_mapping


@dataclass(frozen=True, slots=True)
class Shape:
    """One way in which rows hold an example.

    Attributes:
        needs: fields that must be there for the shape to fit.
        asks: fields whose texts make up the inputs, in order; those that are absent or empty are
            left out.
        answers: fields that may hold the target; the first that is there counts.
        separator: what stands between the texts of the inputs.
        lists: whether an asking field may be a list of texts, which are joined by commas.
    """

    needs: tuple[str, ...]
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    separator: str = "\n\n"
    lists: bool = False


QUESTION = Shape(("question",), ("context", "question"), ("answer", "target"), separator="\n")

SHAPES = (
    QUESTION,
    Shape(("definition", "input"), ("definition", "input"), ("output",)),
    Shape(("instruction",), ("instruction", "context", "input"), ("output", "response")),
    Shape(("inputs",), ("inputs",), ("targets", "target")),
    Shape(("prompt",), ("prompt",), ("completion", "response")),
    Shape(("input",), ("input",), ("output", "target")),
    Shape(("premise", "hypothesis"), ("premise", "hypothesis"), ("label", "answer")),
    Shape(("sentence1", "sentence2"), ("word", "sentence1", "sentence2"), ("label", "answer")),
    Shape(("text", "intent"), ("text",), ("intent",)),
    Shape(("text", "summary"), ("text",), ("summary",)),
    Shape(("text", "label"), ("text",), ("label",)),
    Shape(("sentence", "label"), ("sentence",), ("label",)),
    Shape(("items", "concept"), ("items",), ("concept",), lists=True),
)

# What records without a question or without an answer are, by the fields that show it.
_UNANSWERED = (
    (("tokens", "bio"), "marks spans of its text, for which there is no form in words"),
    (("input_pattern", "target_pattern"), "is a template; tasks use one through `template.family`"),
    (("instructions",), "only says in which words a task can be asked for"),
    (("service_name",), "describes a service"),
    (("dataset", "generic_task_category"), "describes a task"),
    (("turns",), "holds questions of a user, the answers to which are to be judged"),
    (("text",), "is plain text"),
)

_IMAGE_FIELDS = ("image", "image_id", "image_path", "png")
_RATIONALE_FIELDS = ("rationale", "correct_chains")


def example_from_row(
    row: Row, locator: Locator, *, labels: Mapping[str, str] | None = None
) -> Example:
    """Return the example that a row holds.

    Args:
        row: field names and values.
        locator: where the row stands; it is part of every message.
        labels: what the labels of a classification are called in words, in the order in which they are
            offered; they become the choices.

    Raises:
        DataError: if the fields fit no known shape, the target is missing or empty, a label is out
            of range or not one of `labels`, `labels` would have no effect, a conversation does not
            end in an answer (see `read_conversation`), or the row asks about an image.
    """
    _refuse_images(row, locator)
    turns = conversation_field(row)
    if turns is not None:
        return _from_turns(row, turns, locator, labels)
    row = _with_first_example(row, locator)
    shape = _shape_of(row, locator)
    inputs = shape.separator.join(_texts(row, shape, locator))
    if not inputs:
        raise DataError(f"{locator}: the record asks nothing: {listing(shape.needs)} is empty.")
    used = {"id", "label", "choices", *shape.asks, *shape.answers, *_RATIONALE_FIELDS}
    asked = replace(_described(row, locator, used), inputs=inputs)
    if labels is not None:
        return _with_label(asked, row, shape, labels, locator)
    if row.get("choices") is not None:
        return _with_choices(asked, row, locator)
    return _with_target(asked, row, shape, locator)


def _described(row: Row, locator: Locator, used: set[str]) -> Example:
    """The example without question and answer; fields that are `used` do not become metadata."""
    return Example(
        inputs="",
        target="",
        key=str(row["id"]) if row.get("id") is not None else f"row-{locator.number or 0}",
        fields={name: value.strip() for name, value in row.items() if isinstance(value, str)},
        metadata={
            name: value for name, value in row.items() if name not in used and value is not None
        },
    )


def _from_turns(
    row: Row, field: str, locator: Locator, labels: Mapping[str, str] | None
) -> Example:
    if labels is not None:
        raise DataError(_without_effect(locator, f"a conversation (`{field}`)"))
    conversation = read_conversation(row, field, locator)
    return replace(
        _described(row, locator, {"id", field}),
        inputs=conversation.user,
        target=conversation.assistant,
        history=conversation.history,
    )


def _with_first_example(row: Row, locator: Locator) -> Row:
    """A task definition with its first positive example as input and output; other rows as they are.

    Further examples stay under their name.
    """
    examples = as_list(row.get("positive_examples"))
    if "definition" not in row or "input" in row or examples is None:
        return row
    first = as_mapping(examples[0]) if examples else None
    if first is None:
        raise DataError(
            f"{locator}: a task definition must have a positive example (`positive_examples`: a list "
            f"of mappings with `input` and `output`), but has {examples!r:.80}."
        )
    shown = {name: first.get(name) for name in ("input", "output", "explanation")}
    return {**row, **shown, "positive_examples": examples[1:] or None}


def _refuse_images(row: Row, locator: Locator) -> None:
    for name in _IMAGE_FIELDS:
        if row.get(name) is not None:
            raise DataError(
                f"{locator}: the record needs an image (`{name}`), but tasks of text cannot show "
                "one."
            )


def _shape_of(row: Row, locator: Locator) -> Shape:
    for shape in SHAPES:
        if all(name in row for name in shape.needs):
            return shape
    for needs, what in _UNANSWERED:
        if all(row.get(name) is not None for name in needs):
            raise DataError(
                f"{locator}: a record must ask and answer, but this one {what} ({listing(needs)}). "
                "Choose another split, or set `on_bad_record: skip` for the task to leave such records "
                "out."
            )
    understood = ["messages", *(" + ".join(shape.needs) for shape in SHAPES)]
    raise DataError(
        f"{locator}: a record must have the fields of a known form "
        f"({listing(understood, limit=len(understood))}), but has {listing(sorted(row)) or 'none'}. "
        "Rename its fields."
    )


def _texts(row: Row, shape: Shape, locator: Locator) -> list[str]:
    texts: list[str] = []
    for name in shape.asks:
        value = _joined(row.get(name)) if shape.lists else row.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(
                f"{locator}: the field `{name}` must be text, but is a {type(value).__name__}."
            )
        if value.strip():
            texts.append(value.strip())
    return texts


def _joined(value: Any) -> Any:
    items = as_list(value)
    if items is None or not all(isinstance(item, str) for item in items):
        return value
    return ", ".join(item.strip() for item in items)


def _with_choices(asked: Example, row: Row, locator: Locator) -> Example:
    choices = _choice_texts(row["choices"], locator)
    label = row.get("label", row.get("answer"))
    if label is None:
        raise DataError(
            f"{locator}: the record has no target: neither `label` nor `answer` is set. Fill one "
            "in, or set `on_bad_record: skip` for the task to leave such records out."
        )
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise DataError(
            f"{locator}: the label must be between 0 and {len(choices) - 1}, but is {label!r}."
        )
    answer = row.get("answer")
    if isinstance(answer, str) and answer.strip() != choices[label]:
        raise DataError(
            f"{locator}: label and answer contradict each other: choice {label} is "
            f"{choices[label]!r}, the answer {answer!r}."
        )
    return replace(
        asked,
        target=choices[label],
        choices=choices,
        label=label,
        rationales=_rationales(row, choices[label], label),
    )


def _with_label(
    asked: Example, row: Row, shape: Shape, labels: Mapping[str, str], locator: Locator
) -> Example:
    found, others = _target(row, (*shape.answers, "label"), locator)
    listed = row.get("choices") is not None or isinstance(row.get("options"), str)
    if listed or _options_out(row, shape, asked.inputs, found)[1]:
        raise DataError(_without_effect(locator, "answer options of its own"))
    if others:
        raise DataError(
            f"{locator}: the record must have one label, but has {listing([found, *others])}."
        )
    if found not in labels:
        raise DataError(
            f"{locator}: the label must be one of {listing(labels)} (`labels` of the task), but is "
            f"`{found}`."
        )
    label = list(labels).index(found)
    target = labels[found]
    return replace(
        asked,
        target=target,
        choices=tuple(labels.values()),
        label=label,
        rationales=_rationales(row, target, label),
    )


def _without_effect(locator: Locator, what: str) -> str:
    return (
        f"{locator}: the record has {what}, so `labels` of the task would have no effect. Leave "
        "`labels` out."
    )


def _choice_texts(value: Any, locator: Locator) -> tuple[str, ...]:
    items = as_list(value)
    if items is None or not all(isinstance(item, str) for item in items):
        raise DataError(f"{locator}: `choices` must be a list of texts, but is {value!r:.80}.")
    if not 2 <= len(items) <= MAXIMUM_OPTIONS:
        raise DataError(
            f"{locator}: `choices` must hold between 2 and {MAXIMUM_OPTIONS} texts, but holds "
            f"{len(items)}."
        )
    choices = tuple(str(item).strip() for item in items)
    if not all(choices):
        raise DataError(f"{locator}: `choices` must not hold empty texts.")
    return choices


def _with_target(asked: Example, row: Row, shape: Shape, locator: Locator) -> Example:
    target, others = _target(row, shape.answers, locator)
    metadata, fields = dict(asked.metadata), asked.fields
    if others:
        metadata["other_targets"] = others
    inputs, choices, label = _options_out(row, shape, asked.inputs, target)
    if label is not None:
        metadata.pop("options", None)
        fields = _without_options(fields, asked.inputs, inputs)
        target = choices[label]
    elif shape is QUESTION and looks_optional(inputs):
        metadata["options_in_text"] = True
    return replace(
        asked,
        inputs=inputs,
        target=target,
        choices=choices,
        label=label,
        rationales=_rationales(row, target, label),
        fields=fields,
        metadata=metadata,
    )


def _target(row: Row, names: Sequence[str], locator: Locator) -> tuple[str, list[str]]:
    for name in names:
        value = row.get(name)
        values = as_list(value) or [value]
        texts = [text for text in map(_as_text, values) if text]
        if texts:
            return texts[0], texts[1:]
    raise DataError(
        f"{locator}: the record has no target: {listing(dict.fromkeys(names))} is missing or empty. "
        "Fill it in, or set `on_bad_record: skip` for the task to leave such records out."
    )


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else ""


def _options_out(
    row: Row, shape: Shape, inputs: str, target: str
) -> tuple[str, tuple[str, ...], int | None]:
    """Question, choices and label, where the record holds its options in words."""
    if shape is not QUESTION:
        return inputs, (), None
    listed = row.get("options")
    if isinstance(listed, str):
        choices = read_options(listed.strip())
        label = label_of(target, choices) if choices else None
        if choices and label is not None:
            return inputs, choices, label
        return f"{inputs}\n{listed.strip()}", (), None
    found = split_question(inputs, target)
    if found is None:
        return inputs, (), None
    return found.stem, found.choices, found.label


def _without_options(fields: Mapping[str, str], inputs: str, stem: str) -> dict[str, str]:
    """The texts of a record whose options became choices; `stem` is what is left of `inputs`."""
    start = len(inputs) - len(fields["question"])
    kept = {name: text for name, text in fields.items() if name != "options"}
    if "context" in kept:
        kept["context"] = stem[:start].strip()
    return {**kept, "question": stem[start:].strip()}


def _rationales(row: Row, target: str, label: int | None) -> tuple[str, ...]:
    texts: list[str] = []
    if isinstance(row.get("rationale"), str):
        texts.append(row["rationale"])
    for chain in as_list(row.get("correct_chains")) or []:
        text = (as_mapping(chain) or {}).get("rationale")
        if isinstance(text, str):
            texts.append(text)
    answers = (target, *_written_labels(target, label))
    cleaned = (clean_rationale(text, answers=answers) for text in texts)
    return tuple(text for text in cleaned if text)


def _written_labels(target: str, label: int | None) -> tuple[str, ...]:
    if label is None:
        return ()
    name = letter(label)
    return name, f"({name})", f"{name})", f"{name}) {target}", f"({name}) {target}"
