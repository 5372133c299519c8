"""Files that are either whole or absent: write beside, flush to disk, rename."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flanmoe.core.errors import DiskError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one clear sentence.

    safetensors and torch report a full disk as their own error types, so the message is searched too.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise DiskError(_full(path, error)) from error
        raise
    except Exception as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            raise DiskError(_full(path, error)) from error
        raise


def _full(path: Path, error: Exception) -> str:
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    return (
        f"Writing {path} failed: {error}. {free:.1f} GiB are free there. Free some space or choose "
        "another folder with `--out`; what was finished before is kept and `--resume` goes on from it."
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old content or the new, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with non-finite numbers refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically and durably."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON object as a line and flush it, so that a killed run keeps what it logged."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """Read a JSON-lines file that we wrote; a torn last line (a killed writer) is left out."""
    if not path.exists():
        return []
    rows: list[Any] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows


def read_json_file(path: Path) -> Any:
    """Read one JSON file that we wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
