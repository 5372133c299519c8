"""Finished requests on disk, so that an evaluation that was stopped goes on where it was.

One line a request, and before each batch's what this leg of the evaluation has spent so far. Batches are formed
as if nothing had been finished, and one whose requests are all in the journal is not run again; so the numbers
are those of a run that was never stopped, to the last bit.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flanmoe.core.errors import RunError
from flanmoe.evaluation.lm.work import Spent

JOURNAL_FILE = "requests.jsonl"


class Journal:
    """Answers of a language model by what it was asked; kept in memory where no file is named.

    Args:
        path: file to go on with, or to begin; None for memory only.
        identity: what the answers depend on beside the request (model, precision, ...), as plain JSON
            types.

    Attributes:
        spent_before: what earlier legs of the evaluation had spent when their last batches were finished.

    Raises:
        RunError: if the file belongs to something else, or cannot be read.
    """

    def __init__(self, path: Path | None = None, *, identity: dict[str, Any] | None = None) -> None:
        self._answers: dict[str, Any] = {}
        self._file: Any = None
        self._spent: Callable[[], Spent] | None = None
        self.spent_before = Spent()
        if path is None:
            return
        identity = {} if identity is None else identity
        if path.exists():
            self._read(path, identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.exists() and path.stat().st_size > 0
        self._file = path.open("a", encoding="utf-8")
        self._write({"leg": True} if begun else {"identity": identity})

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was added is on disk already."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self._answers)

    def account(self, spent: Callable[[], Spent]) -> None:
        """Write down with each batch what `spent` says this leg has spent."""
        self._spent = spent

    def known(self, keys: Iterable[str]) -> list[Any] | None:
        """Return the answers to all of these requests, None where one of them is missing."""
        found = [self._answers.get(key) for key in keys]
        return None if any(answer is None for answer in found) else found

    def add(self, answers: Sequence[tuple[str, Any]]) -> None:
        """Keep the answers of a batch, each a plain JSON type."""
        if self._file is not None and self._spent is not None:
            # First: whatever a kill in between takes away has been spent.
            self._write({"spent": asdict(self._spent())})
        for key, answer in answers:
            self._answers[key] = answer
            if self._file is not None:
                self._write({"key": key, "answer": answer})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self, path: Path, identity: dict[str, Any]) -> None:
        whole = path.read_bytes()
        # A process that was killed may have left half a line.
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            with path.open("r+b") as file:
                file.truncate(end)
        try:
            records = [json.loads(line) for line in whole[:end].splitlines()]
            found = records[0]["identity"] if records else identity
            for record in records[1:]:
                if "key" in record:
                    self._answers[record["key"]] = record["answer"]
            self.spent_before = _sum_of_legs(records[1:])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"The finished requests in {path} must be one JSON object a line, but cannot be read: "
                f"{error!r}. Remove the file to begin anew."
            ) from error
        expected = json.loads(json.dumps(identity))
        if found != expected:
            different = sorted(
                name for name in {*found, *expected} if found.get(name) != expected.get(name)
            )
            raise RunError(
                f"The finished requests in {path} must belong to the same evaluation, but differ in "
                f"{', '.join(different)}. Name another folder, or evaluate as before."
            )


def _sum_of_legs(records: Iterable[dict[str, Any]]) -> Spent:
    """Return what all legs spent; each says with every batch what it has spent so far."""
    total = leg = Spent()
    for record in records:
        if "spent" in record:
            leg = Spent(**record["spent"])
        elif "leg" in record:
            total, leg = total + leg, Spent()
    return total + leg


def request_key(kind: str, *parts: Any) -> str:
    """Return a name for a request: equal for equal requests."""
    text = json.dumps([kind, *parts], ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
