"""Rows to examples, by the fields that a row has.

One table says which fields ask and which answer. The first entry whose asking fields are all there
decides; it is pure, and a row that no entry fits is an error that lists what is understood.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
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
    """

    needs: tuple[str, ...]
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    separator: str = "\n\n"


SHAPES = (
    Shape(("question",), ("context", "question"), ("answer", "target"), separator="\n"),
    Shape(("definition", "input"), ("definition", "input"), ("output",)),
    Shape(("instruction",), ("instruction", "context", "input"), ("output", "response")),
    Shape(("inputs",), ("inputs",), ("targets", "target")),
    Shape(("prompt",), ("prompt",), ("completion", "response")),
    Shape(("input",), ("input",), ("output", "target")),
)

_IMAGE_FIELDS = ("image", "image_id", "image_path", "png")
_RATIONALE_FIELDS = ("rationale", "correct_chains")


def example_from_row(row: Row, locator: Locator) -> Example:
    """Return the example that a row holds.

    Args:
        row: field names and values.
        locator: where the row stands; it is part of every message.

    Raises:
        DataError: if the fields fit no known shape, the target is missing or empty, a label is out
            of range, or the row asks about an image.
    """
    _refuse_images(row, locator)
    shape = _shape_of(row, locator)
    inputs = shape.separator.join(_texts(row, shape.asks, locator))
    if not inputs:
        raise DataError(f"{locator}: the record asks nothing: {listing(shape.needs)} is empty.")
    key = str(row["id"]) if row.get("id") is not None else f"row-{locator.number or 0}"
    used = {"id", "label", "choices", *shape.asks, *shape.answers, *_RATIONALE_FIELDS}
    metadata = {
        name: value for name, value in row.items() if name not in used and value is not None
    }
    asked = Example(inputs=inputs, target="", key=key, metadata=metadata)
    if row.get("choices") is not None:
        return _with_choices(asked, row, locator)
    return _with_target(asked, row, shape, locator)


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
    understood = [" + ".join(shape.needs) for shape in SHAPES]
    raise DataError(
        f"{locator}: a record must have the fields of a known form ({listing(understood)}), but "
        f"has {listing(sorted(row)) or 'none'}. Rename its fields."
    )


def _texts(row: Row, names: Sequence[str], locator: Locator) -> list[str]:
    texts: list[str] = []
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(
                f"{locator}: the field `{name}` must be text, but is a {type(value).__name__}."
            )
        if value.strip():
            texts.append(value.strip())
    return texts


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
    target, others = _target(row, shape, locator)
    inputs, metadata = asked.inputs, dict(asked.metadata)
    if others:
        metadata["other_targets"] = others
    choices, label = (), None
    if shape is SHAPES[0]:
        inputs, choices, label = _options_out(row, inputs, target)
        if label is None and looks_optional(inputs):
            metadata["options_in_text"] = True
        elif label is not None:
            metadata.pop("options", None)
            target = choices[label]
    return replace(
        asked,
        inputs=inputs,
        target=target,
        choices=choices,
        label=label,
        rationales=_rationales(row, target, label),
        metadata=metadata,
    )


def _target(row: Row, shape: Shape, locator: Locator) -> tuple[str, list[str]]:
    for name in shape.answers:
        value = row.get(name)
        values = as_list(value) or [value]
        texts = [text for text in map(_as_text, values) if text]
        if texts:
            return texts[0], texts[1:]
    raise DataError(
        f"{locator}: the record has no target: {listing(shape.answers)} is missing or empty. Fill "
        "it in, or set `on_bad_record: skip` for the task to leave such records out."
    )


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return ""


def _options_out(row: Row, inputs: str, target: str) -> tuple[str, tuple[str, ...], int | None]:
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
