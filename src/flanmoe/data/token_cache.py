"""Tokens of texts that were tokenised before, on disk: `PackingConfig.token_cache`.

A text is known by a hash of what it says and which of its characters enter the loss. Its tokens lie in a
segment: a file that is written once, whole, by one process, and then only read. So processes that write
at the same time never touch each other's files, a text that both write is there twice, which does no harm,
and a kill loses at most the texts that had not yet made up a segment.
"""

# `pyarrow` ships no types; it only maps files here.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import importlib.metadata
import json
import secrets
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as arrow
from jaxtyping import Int, UInt64

from flanmoe.core.cache import cache_root, code_fingerprint, fingerprint
from flanmoe.core.console import warn
from flanmoe.core.errors import DiskError
from flanmoe.core.files import write_bytes
from flanmoe.data import packing
from flanmoe.data.example import Rendered
from flanmoe.data.packing import TokenizedExample, tokenize_all
from flanmoe.data.tokenizer import Tokenizer

_FOLDER = "tokens"
_SUFFIX = ".tokens"
_MAGIC = b"flanmoe tokens 1"
_HEADER_BYTES = 32
# A segment is written when it holds so many tokens of 4 bytes; a kill loses no more.
_SEGMENT_TOKENS = 2**20
# Beyond these the oldest segments are removed, those of other tokenizers too.
_MOST_BYTES = 4 * 2**30
_MOST_SEGMENTS = 1024
_ABANDONED_SECONDS = 24 * 3600.0


class _FastTokenizer(Protocol):
    """What tells two fast tokenizers of transformers apart."""

    backend_tokenizer: Any
    special_tokens_map: Any
    split_special_tokens: Any


class TokenCache:
    """Tokenises texts, looking up those that were tokenised before, by whatever process.

    What has been added is written when a segment is full, at `close`, and when the process ends. Where the
    cache folder cannot be written, that is said once, and texts are tokenised every time.

    Args:
        tokenizer: whose tokens they are; each tokenizer has a folder of its own.
        writes: whether what is new is written.
    """

    def __init__(self, tokenizer: Tokenizer, *, writes: bool = True) -> None:
        self._tokenizer = tokenizer
        folder = cache_root() / _FOLDER / tokenizer_identity(tokenizer)
        self._segments = _read_segments(folder)
        self._writer = _Writer(folder, works=writes)
        weakref.finalize(self, self._writer.write)

    def tokenize_all(self, rendered: Sequence[Rendered]) -> list[TokenizedExample]:
        """Return what `flanmoe.data.packing.tokenize_all` returns."""
        keys = [_key(one) for one in rendered]
        found = self._find(keys)
        missing = [index for index, values in enumerate(found) if values is None]
        fresh = tokenize_all([rendered[index] for index in missing], self._tokenizer)
        for index, example in zip(missing, fresh, strict=True):
            found[index] = values = _values(example)
            self._writer.add(keys[index], values)
        if (written := self._writer.written()) is not None:
            self._segments.append(written)
        return [
            _example(one, values)
            for one, values in zip(rendered, found, strict=True)
            if values is not None
        ]

    def close(self) -> None:
        """Write what has been added since the last full segment."""
        if (written := self._writer.write()) is not None:
            self._segments.append(written)

    def _find(self, keys: Sequence[bytes]) -> list[Int[np.ndarray, " L"] | None]:
        found = [self._writer.texts.get(key) for key in keys]
        places = np.array([index for index, values in enumerate(found) if values is None], np.int64)
        wanted = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
        for segment in reversed(self._segments):
            if not len(places):
                break
            rows = segment.rows_of(wanted[places])
            there = rows >= 0
            for place, row in zip(places[there].tolist(), rows[there].tolist(), strict=True):
                found[place] = segment.values(row)
            places = places[~there]
        return found


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """Return a hash that is equal for tokenizers that give the same tokens."""
    # A call without truncation and padding takes what an earlier one left of them out of the backend.
    tokenizer("", add_special_tokens=False, verbose=False)
    fast = cast(_FastTokenizer, tokenizer)
    backend = hashlib.blake2b(str(fast.backend_tokenizer.to_str()).encode(), digest_size=16)
    return fingerprint(
        [
            backend.hexdigest(),
            fast.special_tokens_map,
            fast.split_special_tokens,
            importlib.metadata.version("tokenizers"),
            code_fingerprint(packing),
        ]
    )


@dataclass(frozen=True, slots=True)
class _Segment:
    """A written segment, memory-mapped. N texts in the order of their keys, T tokens.

    Attributes:
        firsts, seconds: the two halves of the keys.
        starts: where the tokens of each text begin, and at last where they end.
        tokens: the token where it does not enter the loss, its complement (below 0) where it does.
    """

    firsts: UInt64[np.ndarray, " N"]
    seconds: UInt64[np.ndarray, " N"]
    starts: Int[np.ndarray, " N+1"]
    tokens: Int[np.ndarray, " T"]

    def rows_of(self, keys: UInt64[np.ndarray, "K 2"]) -> Int[np.ndarray, " K"]:
        """Return the row of each key, -1 where it is not there."""
        rows = np.searchsorted(self.firsts, keys[:, 0])
        rows[rows == len(self.firsts)] = 0
        same = (self.firsts[rows] == keys[:, 0]) & (self.seconds[rows] == keys[:, 1])
        return np.where(same, rows, -1)

    def values(self, row: int) -> Int[np.ndarray, " L"]:
        """Return the tokens of a row, still mapped."""
        return self.tokens[self.starts[row] : self.starts[row + 1]]

    def content(self) -> bytes:
        """Return the file that `_read_segment` reads."""
        counts = np.array([len(self.firsts), len(self.tokens)], np.int64)
        parts = (counts, self.firsts, self.seconds, self.starts, self.tokens)
        return _MAGIC + b"".join(part.tobytes() for part in parts)


class _Writer:
    """The open segment of this process, in memory until it is written."""

    def __init__(self, folder: Path, *, works: bool) -> None:
        self._folder = folder
        self._num_tokens = 0
        self._works = works
        self.texts: dict[bytes, Int[np.ndarray, " L"]] = {}

    def add(self, key: bytes, values: Int[np.ndarray, " L"]) -> None:
        if self._works and key not in self.texts:
            self.texts[key] = values
            self._num_tokens += len(values)

    def written(self) -> _Segment | None:
        """Write the segment if it is full."""
        return self.write() if self._num_tokens >= _SEGMENT_TOKENS else None

    def write(self) -> _Segment | None:
        """Write the segment if it holds anything, and begin another."""
        if not self.texts:
            return None
        path = self._folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}{_SUFFIX}"
        content = _segment_of(self.texts).content()
        self.texts, self._num_tokens = {}, 0
        try:
            write_bytes(path, content)
            _remove_oldest(self._folder.parent)
            return _read_segment(path)
        except (OSError, ValueError, DiskError) as error:
            self._works = False
            warn(f"Tokens are not kept any more, but made anew for every text: {error}")
            return None


def _key(rendered: Rendered) -> bytes:
    digest = hashlib.blake2b(rendered.text.encode(), digest_size=16)
    digest.update(json.dumps(rendered.loss_spans).encode())
    return digest.digest()


def _values(example: TokenizedExample) -> Int[np.ndarray, " L"]:
    ids = example.input_ids.astype(np.int32)
    return np.where(example.loss_mask, ~ids, ids)


def _example(rendered: Rendered, values: Int[np.ndarray, " L"]) -> TokenizedExample:
    mask = values < 0
    return TokenizedExample(
        input_ids=np.where(mask, ~values, values).astype(np.int64),
        loss_mask=mask,
        task=rendered.task,
        key=rendered.key,
        content_hash=rendered.content_hash,
    )


def _segment_of(texts: dict[bytes, Int[np.ndarray, " L"]]) -> _Segment:
    keys = np.frombuffer(b"".join(texts), np.uint64).reshape(-1, 2)
    order = np.argsort(keys[:, 0], kind="stable")
    values = list(texts.values())
    ordered = [values[index] for index in order]
    return _Segment(
        firsts=keys[order, 0],
        seconds=keys[order, 1],
        starts=np.cumsum([0, *map(len, ordered)], dtype=np.int64),
        tokens=np.concatenate(ordered).astype(np.int32),
    )


def _read_segments(folder: Path) -> list[_Segment]:
    """Map the segments of a folder, oldest first; take away what is no whole segment."""
    segments: list[_Segment] = []
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        # Removed by another process, or not to be read: then its texts are tokenised again.
        with suppress(OSError):
            try:
                segments.append(_read_segment(path))
            except ValueError as error:
                warn(f"The cached tokens in {path} are damaged and left out: {error}.")
                path.unlink()
    for path in folder.glob(f".*{_SUFFIX}.*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
    return segments


def _read_segment(path: Path) -> _Segment:
    # Closed at once: the mapping lives as long as its arrays, and many segments need no open files.
    with arrow.memory_map(str(path)) as file:
        buffer = file.read_buffer()
    if buffer.size < _HEADER_BYTES or buffer[: len(_MAGIC)].to_pybytes() != _MAGIC:
        raise ValueError("it does not begin like cached tokens")
    num_texts, num_tokens = np.frombuffer(buffer, np.int64, 2, len(_MAGIC)).tolist()
    expected = _HEADER_BYTES + 8 * (3 * num_texts + 1) + 4 * num_tokens
    if buffer.size != expected:
        raise ValueError(f"it has {buffer.size} bytes in place of {expected}")
    seconds_at, starts_at = _HEADER_BYTES + 8 * num_texts, _HEADER_BYTES + 16 * num_texts
    return _Segment(
        firsts=np.frombuffer(buffer, np.uint64, num_texts, _HEADER_BYTES),
        seconds=np.frombuffer(buffer, np.uint64, num_texts, seconds_at),
        starts=np.frombuffer(buffer, np.int64, num_texts + 1, starts_at),
        tokens=np.frombuffer(buffer, np.int32, num_tokens, starts_at + 8 * (num_texts + 1)),
    )


def _remove_oldest(root: Path) -> None:
    """Remove the oldest segments of all tokenizers until the rest is within the limits."""
    found: list[tuple[str, Path, int]] = []
    for path in root.glob(f"*/*{_SUFFIX}"):
        with suppress(OSError):
            found.append((path.name, path, path.stat().st_size))
    num_bytes = sum(size for _, _, size in found)
    num_segments = len(found)
    for _, path, size in sorted(found):
        if num_bytes <= _MOST_BYTES and num_segments <= _MOST_SEGMENTS:
            break
        with suppress(OSError):
            path.unlink()
        num_bytes -= size
        num_segments -= 1
