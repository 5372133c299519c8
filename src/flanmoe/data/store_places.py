"""Where a store of examples lies: a folder named by everything that decides what the store holds.

The bytes of the file and not its path, the words of the labels in their order, the code that reads records.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flanmoe.core.cache import cache_root, code_fingerprint, fingerprint
from flanmoe.core.errors import DiskError
from flanmoe.core.files import write_text
from flanmoe.data import conversations, options, rationales, rows
from flanmoe.data import example as example_module
from flanmoe.data.sources import hub, json_lines, parquet
from flanmoe.data.sources.base import Identity, Source, StorableSource

_STORES_FOLDER = "examples"
# Raised when the files of a store change their form.
_LAYOUT = 2
HASH_BYTES = 12
# Files below this are hashed at every start, which takes milliseconds.
_REMEMBERED_BYTES = 4 * 2**20
# A file can change without a new time stamp as long as the clock of its disk has not moved on.
_SETTLED_NANOSECONDS = 3 * 10**9

# The code that decides what a store holds: where any of it changes, stores are made anew.
_READERS = (conversations, example_module, options, rationales, rows, hub, json_lines, parquet)


@dataclass(frozen=True, slots=True)
class StorePlace:
    """Where the store of a source lies, and what its file looked like before it was read."""

    folder: Path
    identity: Identity
    state: str


def store_place(source: Source, labels: Mapping[str, str] | None) -> StorePlace | None:
    """Say where the store of a source is; None for one that has none or cannot be read."""
    identity = source.identity() if isinstance(source, StorableSource) else None
    # What is no plain file may give its bytes only once.
    if identity is None or (identity.file is not None and not identity.file.is_file()):
        return None
    try:
        state = file_state(identity)
        content = None if identity.file is None else _file_hash(identity.file)
    except OSError:
        # Reading it says what is wrong.
        return None
    # As pairs: the order of the labels is that of the choices.
    words = None if labels is None else list(labels.items())
    name = fingerprint([identity.content, content, words, _LAYOUT, _reader_version()])
    return StorePlace(cache_root() / _STORES_FOLDER / name, identity, state)


@cache
def _reader_version() -> str:
    return code_fingerprint(*_READERS)


def file_state(identity: Identity) -> str:
    """What changes when the file does, without reading it."""
    return "" if identity.file is None else _state_of(identity.file.stat())


def _state_of(status: os.stat_result) -> str:
    # More than size and time of writing: a copy may carry both over from another file.
    parts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return "-".join(map(str, parts))


def _file_hash(file: Path) -> str:
    """Return a hash of the bytes of a file; of a large one it is remembered by its state."""
    status = file.stat()
    if status.st_size < _REMEMBERED_BYTES:
        return _hash_of(file)
    memory = (
        cache_root()
        / _STORES_FOLDER
        / "hashes"
        / fingerprint([str(file.resolve()), _state_of(status)])
    )
    with suppress(OSError, ValueError):
        found = memory.read_text(encoding="ascii")
        if len(bytes.fromhex(found)) == HASH_BYTES:
            return found
    age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
    found = _hash_of(file)
    if age > _SETTLED_NANOSECONDS:
        with suppress(OSError, DiskError):
            write_text(memory, found)
    return found


def _hash_of(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=HASH_BYTES))
    return digest.hexdigest()
