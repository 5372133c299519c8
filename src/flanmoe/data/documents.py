"""Documents: plain texts that a model learns language from, without questions and answers."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from flanmoe.core.config import Config
from flanmoe.core.console import warn
from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
from flanmoe.data.sources.base import EVALUATION_ONLY_REASON, Locator, Row, Source
from flanmoe.data.sources.finding import DEFAULT_SPLIT, find_source
from flanmoe.data.sources.text_file import TEXT_FIELD, TEXT_SUFFIX, TextFile

Part = Literal["train", "held_out"]


class DocumentSource(Config):
    """Where documents come from. A plain text is read as `name`.

    Attributes:
        name: a file (`.txt`, the whole of it one document; `.jsonl`, `.jsonl.gz`, `.parquet`, one document a
            row), a folder of the data folder (`wikitext2`), or a data set on the hub (`owner/name`).
        split: split of a folder or hub data set.
        subset: configuration of a hub data set.
        field: field of a row that holds the text.
    """

    name: str = Field(min_length=1)
    split: str = DEFAULT_SPLIT
    subset: str | None = None
    field: str = TEXT_FIELD

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _plain_text_has_no_parts(self) -> "DocumentSource":
        chosen = list(self.model_dump(exclude_defaults=True))
        if self.is_plain_text and chosen != ["name"]:
            raise ValueError(
                f"a {TEXT_SUFFIX} file is one text as a whole, but found {listing(chosen[1:])}; leave "
                "out what chooses a part of it"
            )
        return self

    @property
    def is_plain_text(self) -> bool:
        """Whether the name is that of a file which is one document as a whole."""
        return self.name.endswith(TEXT_SUFFIX)

    @property
    def identity(self) -> str:
        """Name in messages: `name`, with `:split` if not the default."""
        return self.name if self.split == DEFAULT_SPLIT else f"{self.name}:{self.split}"


class DocumentsConfig(Config):
    """Which documents, and how many of them are kept from training.

    Attributes:
        sources: where they come from; each a mapping, or just its name.
        held_out_share: about this share of the documents is left out of training, for measuring the loss.
            Which ones follows from their text alone, so that equal documents are on one side.
    """

    sources: tuple[DocumentSource, ...] = Field(min_length=1)
    held_out_share: float = Field(default=0.0, ge=0, lt=1)


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        text: the text, white space around it taken off.
        origin: the source and the place in it.
        content_hash: hash of what it says; equal for equal texts from different sources.
    """

    text: str
    origin: str
    content_hash: str

    @classmethod
    def of(cls, text: str, origin: str) -> "Document":
        """Return a text with where it came from."""
        folded = " ".join(text.split()).casefold()
        digest = hashlib.blake2b(folded.encode(), digest_size=12).hexdigest()
        return cls(text.strip(), origin, digest)


def load_documents(
    config: DocumentsConfig, *, part: Part = "train", data_dir: Path | None = None
) -> list[Document]:
    """Read the documents of one part, in the order of their sources. Blank ones are left out with a warning.

    Args:
        config: which documents.
        part: what is trained on, or what is kept from it.
        data_dir: the data folder; without it FLANMOE_DATA.

    Raises:
        DataError: if a source cannot be read, may only be evaluated on, or lacks the field, or the part holds
            nothing.
    """
    documents = [document for source in config.sources for document in _documents(source, data_dir)]
    kept = [one for one in documents if _part(one, config.held_out_share) == part]
    if not kept:
        raise DataError(
            f"The part `{part}` must hold at least 1 document, but holds none of {len(documents)} with "
            f"`held_out_share` {config.held_out_share}. Change the share, or add documents."
        )
    return kept


def _part(document: Document, held_out_share: float) -> Part:
    point = int(document.content_hash[:16], 16) / 2**64
    return "held_out" if point < held_out_share else "train"


def _documents(config: DocumentSource, data_dir: Path | None) -> Iterator[Document]:
    source = document_source(config, data_dir)
    if source.evaluation_only:
        raise DataError(
            f"The documents of `{config.identity}` are for evaluation only and cannot be trained on: "
            f"{EVALUATION_ONLY_REASON} Take them out."
        )
    num_blank = 0
    for locator, row in source.rows():
        text = _text(row, config.field, locator)
        if text.strip():
            yield Document.of(text, str(locator))
        else:
            num_blank += 1
    if num_blank:
        warn(f"Of the documents of `{config.identity}`, {num_blank} are blank and left out.")


def document_source(config: DocumentSource, data_dir: Path | None) -> Source:
    """Return the rows that hold the documents of one source.

    Raises:
        DataError: if nothing of its name is there.
    """
    if config.is_plain_text:
        return TextFile(Path(config.name).expanduser())
    return find_source(config.name, split=config.split, subset=config.subset, data_dir=data_dir)


def _text(row: Row, field: str, locator: Locator) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        found = "no such field" if field not in row else f"a {type(text).__name__}"
        raise DataError(
            f"{locator}: the field `{field}` of a document must hold its text, but there is {found}. Name the "
            f"field in `field`; there are {listing(row)}."
        )
    return text
