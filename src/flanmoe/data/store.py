"""Examples on disk: a source is read and checked once, and from then on looked up.

A store is a folder of the cache: `examples.arrow`, memory-mapped when it is read, and `store.json`. It is
named by a fingerprint of what it was made from: the bytes of the file (not its path), the words of the
labels, and the code that reads records. So none ever has to be declared stale: another content is
another store. It is built beside its place and renamed when whole, under a lock (`flanmoe.core.cache`).
"""

# `pyarrow` ships no types; what it returns here was written here.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import os
import shutil
import time
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow as arrow
import pyarrow.ipc as ipc
from filelock import FileLock

from flanmoe.core.cache import cache_root, cached_folder
from flanmoe.core.console import say, warn
from flanmoe.core.errors import DataError, DiskError
from flanmoe.core.files import flush, read_json_file, write_json
from flanmoe.data.example import Example
from flanmoe.data.rows import example_from_row
from flanmoe.data.sources.base import LenientSource, Locator, Row, Source
from flanmoe.data.store_places import HASH_BYTES, StorePlace, file_state, store_place
from flanmoe.data.stored_values import NotStorableError, encoded, from_json, to_json

OnBadRecord = Literal["error", "skip"]

_EXAMPLES = "examples.arrow"
_FACTS = "store.json"

# Sources of no more examples than this stay in memory and leave nothing in the cache. An example is read
# from a store in 20 to 25 us, and made from its record in 35 to 100 us: once each has been drawn a few
# times, memory is faster, but thousands of tasks of this size must fit there together.
_MOST_IN_MEMORY = 128
# A batch is what is in memory while a store is written.
_BATCH_ROWS = 4096
_BATCH_CHARACTERS = 2**25
_UNUSED_SECONDS = 60 * 24 * 3600.0

_SCHEMA = arrow.schema(
    [
        ("inputs", arrow.string()),
        ("target", arrow.string()),
        ("choices", arrow.list_(arrow.string())),
        ("label", arrow.int64()),
        ("rationales", arrow.list_(arrow.string())),
        ("key", arrow.string()),
        ("history", arrow.string()),
        ("fields", arrow.string()),
        ("metadata", arrow.string()),
        ("content_hash", arrow.binary(HASH_BYTES)),
    ]
)

_Hashed = tuple[Example, str]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that was left out.

    Attributes:
        locator: file and line.
        reason: why it cannot be read.
    """

    locator: str
    reason: str


@dataclass(frozen=True, slots=True)
class ExampleStore:
    """All examples of a source, in its order; on disk, or in memory where they are few.

    Attributes:
        examples: read when they are asked for.
        content_hashes: `Example.content_hash` of each, without reading it.
        all_have_choices: whether every example offers options.
        rejected: records left out because they could not be read.
    """

    examples: Sequence[Example]
    content_hashes: Sequence[str]
    all_have_choices: bool
    rejected: tuple[Rejected, ...]


def example_store(
    source: Source, *, labels: Mapping[str, str] | None, on_bad_record: OnBadRecord
) -> ExampleStore:
    """Return the examples of a source, reading all of it only if no store holds them yet.

    Args:
        source: where the rows come from.
        labels: see `example_from_row`.
        on_bad_record: `error`, or `skip` to list records that cannot be read in `rejected`.

    Raises:
        DataError: with file and line, if a record cannot be read and is not to be skipped.
        DiskError: if the cache folder cannot be written.
    """
    place = store_place(source, labels)
    if place is None:
        return _in_memory(_Reading(source, labels, on_bad_record))
    with _cache_errors(place):
        found = _opened(place)
    if found is None:
        reading = _Reading(source, labels, on_bad_record)
        hashed = iter(reading)
        first = list(islice(hashed, _MOST_IN_MEMORY + 1))
        if len(first) <= _MOST_IN_MEMORY:
            return _held(first, reading.rejected)
        try:
            found = _made(place, chain(first, hashed), reading.rejected)
        except NotStorableError as error:
            warn(f"{place.identity.origin} stays in memory: {error}")
            return _in_memory(_Reading(source, labels, on_bad_record))
    if found.rejected and on_bad_record == "error":
        raise DataError(found.rejected[0].reason)
    return found


class _Reading:
    """One pass over a source: its examples with their hashes, and what had to be left out."""

    def __init__(
        self, source: Source, labels: Mapping[str, str] | None, on_bad_record: OnBadRecord
    ) -> None:
        self._source = source
        self._labels = labels
        self._skips = on_bad_record == "skip"
        self.rejected: list[Rejected] = []

    def __iter__(self) -> Iterator[_Hashed]:
        for locator, row in self._rows():
            try:
                example = example_from_row(row, locator, labels=self._labels)
                _check_unicode(example, locator)
            except DataError as error:
                self._leave_out(locator, error)
            else:
                yield example, example.content_hash()

    def _rows(self) -> Iterator[tuple[Locator, Row]]:
        if isinstance(self._source, LenientSource):
            return self._source.readable_rows(self._leave_out)
        return self._source.rows()

    def _leave_out(self, locator: Locator, error: DataError) -> None:
        if not self._skips:
            raise error
        self.rejected.append(Rejected(locator=str(locator), reason=str(error)))


def _check_unicode(example: Example, locator: Locator) -> None:
    said = (text for _, text in example.history)
    parts = (
        example.key,
        example.inputs,
        example.target,
        *example.choices,
        *example.rationales,
        *said,
    )
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{locator}: the record must be Unicode text, but holds half a character "
            f"({error.object[error.start]!r}). Write both halves of it, or leave it out."
        ) from error


def _in_memory(reading: _Reading) -> ExampleStore:
    return _held(list(reading), reading.rejected)


def _held(hashed: Sequence[_Hashed], rejected: Sequence[Rejected]) -> ExampleStore:
    return ExampleStore(
        examples=tuple(example for example, _ in hashed),
        content_hashes=tuple(content_hash for _, content_hash in hashed),
        all_have_choices=all(example.choices for example, _ in hashed),
        rejected=tuple(rejected),
    )


# --- from disk -------------------------------------------------------------------------------------


class _Batches:
    """The record batches of a store, memory-mapped."""

    def __init__(self, path: Path) -> None:
        # Closed at once: the mapping lives as long as what was read from it, and a mixture of very many
        # tasks would otherwise run out of open files.
        with arrow.memory_map(str(path)) as file:
            reader = ipc.open_file(file)
            if not reader.schema.equals(_SCHEMA):
                raise ValueError("it has other columns")
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.columns: list[list[Any]] = [batch.columns for batch in batches]
        self._ends = list(accumulate(batch.num_rows for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, row: int) -> tuple[list[Any], int]:
        """Return the columns of the batch that holds a row, and the row's number in it."""
        number = bisect_right(self._ends, row)
        return self.columns[number], row - (self._ends[number - 1] if number else 0)


class _StoredExamples(Sequence[Example]):
    def __init__(self, path: Path, batches: _Batches) -> None:
        self._path = path
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        place = range(len(self))[index]
        if isinstance(place, range):
            return tuple(map(self._read, place))
        return self._read(place)

    def _read(self, row: int) -> Example:
        columns, place = self._batches.place(row)
        try:
            values = [column[place].as_py() for column in columns[:-1]]
            inputs, target, choices, label, chains, key, history, fields, metadata = values
            return Example(
                inputs=inputs,
                target=target,
                choices=tuple(choices),
                label=label,
                rationales=tuple(chains),
                key=key,
                history=tuple((role, text) for role, text in json.loads(history)),
                fields=json.loads(fields),
                metadata=from_json(metadata),
            )
        except ValueError as error:
            raise DataError(
                f"Row {row + 1} of the store {self._path.parent} cannot be read back: {error}. Delete "
                "that folder; it is made again."
            ) from error


class _StoredHashes(Sequence[str]):
    def __init__(self, batches: _Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        place = range(len(self))[index]
        if isinstance(place, range):
            return tuple(map(self._read, place))
        return self._read(place)

    def _read(self, row: int) -> str:
        columns, place = self._batches.place(row)
        return columns[-1][place].as_py().hex()


def _opened(place: StorePlace) -> ExampleStore | None:
    """Return the store of a place; None if there is none, or one that is damaged and is taken away."""
    if not place.folder.is_dir():
        return None
    with suppress(OSError, ValueError, LookupError):
        return _open(place)
    # Another process may be about to replace it, or have done so.
    with FileLock(f"{place.folder}.lock"):
        try:
            return _open(place)
        except (OSError, ValueError, LookupError) as error:
            origin = place.identity.origin
            warn(f"The store of {origin} in the cache is damaged and made again: {error}.")
            shutil.rmtree(place.folder, ignore_errors=True)
    return None


def _open(place: StorePlace) -> ExampleStore:
    facts = read_json_file(place.folder / _FACTS)
    path = place.folder / _EXAMPLES
    if path.stat().st_size != facts["num_bytes"]:
        raise ValueError(f"{path.stat().st_size} bytes in place of {facts['num_bytes']}")
    batches = _Batches(path)
    if len(batches) != facts["num_examples"]:
        raise ValueError(f"{len(batches)} examples in place of {facts['num_examples']}")
    locators = [str(Locator(place.identity.origin, number)) for number, _ in facts["rejected"]]
    reasons = [reason for _, reason in facts["rejected"]]
    with suppress(OSError):
        # Says that it is in use; see `_remove_unused`.
        os.utime(place.folder)
    return ExampleStore(
        examples=_StoredExamples(path, batches),
        content_hashes=_StoredHashes(batches),
        all_have_choices=bool(facts["all_have_choices"]),
        rejected=tuple(
            Rejected(locator=locator, reason=reason.replace(_LOCATOR, locator))
            for locator, reason in zip(locators, reasons, strict=True)
        ),
    )


# --- to disk ---------------------------------------------------------------------------------------

# Stands for the place of a rejected record: the same file may lie elsewhere another time.
_LOCATOR = "\x00"


def _made(
    place: StorePlace, hashed: Iterable[_Hashed], rejected: Sequence[Rejected]
) -> ExampleStore:
    origin, root = place.identity.origin, place.folder.parent

    def build(partial: Path) -> None:
        say(f"Reading {origin} into the cache, once.")
        _write(partial, hashed, rejected)
        if file_state(place.identity) != place.state:
            raise DataError(
                f"{origin} must stay as it is while it is read, but changed. Start again when nothing "
                "writes to it."
            )

    with _cache_errors(place):
        cached_folder(place.folder.name, build, root=root)
        _remove_unused(root)
        return _open(place)


def _write(folder: Path, hashed: Iterable[_Hashed], rejected: Sequence[Rejected]) -> None:
    path = folder / _EXAMPLES
    num_examples, all_have_choices = 0, True
    with ipc.new_file(str(path), _SCHEMA) as writer:
        for batch in _batches(hashed):
            writer.write_batch(_record_batch(batch))
            num_examples += len(batch)
            all_have_choices &= all(example.choices for example, _ in batch)
    flush(path)
    facts = {
        "num_examples": num_examples,
        "num_bytes": path.stat().st_size,
        "all_have_choices": all_have_choices,
        "rejected": [_placeless(record) for record in rejected],
    }
    write_json(folder / _FACTS, facts)


def _placeless(record: Rejected) -> list[Any]:
    number = int(record.locator.rpartition(":")[2])
    return [number, record.reason.replace(record.locator, _LOCATOR)]


def _batches(hashed: Iterable[_Hashed]) -> Iterator[list[_Hashed]]:
    batch: list[_Hashed] = []
    characters = 0
    for example, content_hash in hashed:
        batch.append((example, content_hash))
        characters += len(example.inputs) + sum(map(len, example.fields.values()))
        characters += sum(len(text) for _, text in example.history)
        if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _record_batch(batch: Sequence[_Hashed]) -> Any:
    examples = [example for example, _ in batch]
    columns: dict[str, list[Any]] = {
        "inputs": [example.inputs for example in examples],
        "target": [example.target for example in examples],
        "choices": [example.choices for example in examples],
        "label": [example.label for example in examples],
        "rationales": [example.rationales for example in examples],
        "key": [example.key for example in examples],
        "history": [to_json(example.history) for example in examples],
        "fields": [to_json(example.fields) for example in examples],
        "metadata": [to_json(encoded(example.metadata)) for example in examples],
        "content_hash": [bytes.fromhex(content_hash) for _, content_hash in batch],
    }
    return arrow.RecordBatch.from_pydict(columns, schema=_SCHEMA)


@contextmanager
def _cache_errors(place: StorePlace) -> Generator[None]:
    """Turn what goes wrong with the cache folder into one sentence that names the way out."""
    try:
        yield
    except (DiskError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DiskError) else error
        reason = cause.strerror if isinstance(cause, OSError) else None
        raise DiskError(
            f"The examples of {place.identity.origin} must be kept in the cache folder {cache_root()}, but it "
            f"cannot be written: {reason or cause or error}. Free some space, or name another folder with the "
            "environment variable FLANMOE_CACHE."
        ) from error


def _remove_unused(root: Path) -> None:
    """Remove stores that no run has opened for two months, and what killed writers left."""
    for entry in root.iterdir():
        with suppress(OSError):
            if entry.is_dir() and time.time() - entry.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(entry)
