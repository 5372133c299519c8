"""Files that are either whole or absent: write beside, flush to disk, rename."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flanmoe.core.errors import DiskError, RunError

_TAIL_BYTES = 65536
_PARTIAL_FOLDER = ".partial"


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn a full disk or a read-only folder into one clear sentence.

    safetensors and torch report a full disk as their own error types, so the message is searched too.
    """
    try:
        yield
    except DiskError:
        # Already one clear sentence, from a block inside this one.
        raise
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


def require_new_folder(folder: Path, *, way_out: str) -> None:
    """Refuse to write into a folder that holds something.

    Args:
        folder: where something is to be written.
        way_out: what the user can do, as a sentence without its point.

    Raises:
        RunError: if it holds files.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RunError(
            f"The folder {folder} must be empty or new, but already holds files. {way_out}."
        )


@contextmanager
def whole_folder(folder: Path, *, marker: str) -> Generator[Path]:
    """Yield a folder to write into; its files then become those of `folder`, the one named `marker` last.

    So a folder that holds its marker is complete: a full disk leaves nothing behind, and a kill nothing
    that has the marker. What stood in `folder` before is replaced.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    with disk_errors(folder):
        is_new = not folder.exists()
        partial = folder / _PARTIAL_FOLDER
        _empty(folder, first=marker)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in partial.rglob("*"):
                flush(path)
            # Renamed inside `folder`, which may be the top of a disk and so cannot be renamed itself.
            for path in sorted(partial.iterdir(), key=lambda path: path.name == marker):
                if path.name == marker:
                    # Only a flushed folder keeps the names before it through a power cut.
                    flush(folder)
                os.replace(path, folder / path.name)
            partial.rmdir()
            flush(folder)
        except BaseException:
            (folder / marker).unlink(missing_ok=True)
            shutil.rmtree(folder if is_new else partial, ignore_errors=True)
            raise


def _empty(folder: Path, *, first: str) -> None:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name != first):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def flush(path: Path) -> None:
    """Bring what was written to a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        # Opened here and not by tempfile, which would leave the file readable by its owner alone.
        name = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            with name.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON object as a line and flush it, so that a killed run keeps what it logged.

    What a killed writer left of a line is removed first, so that it never stands in the middle.
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_torn_line(path)
        with path.open("ab") as stream:
            stream.write(line)


def read_json_lines(path: Path) -> list[Any]:
    """Read a JSON-lines file that we wrote; a torn last line (a killed writer) is left out.

    Raises:
        ValueError: if any other line is not JSON.
    """
    if not path.exists():
        return []
    # Only a line that ends was written to its end.
    *lines, _torn = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines if line]


def _remove_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    content_end = path.stat().st_size
    with path.open("rb+") as stream:
        kept = content_end
        while kept > 0:
            stream.seek(max(0, kept - _TAIL_BYTES))
            tail = stream.read(kept - stream.tell())
            kept = kept - len(tail) + tail.rfind(b"\n") + 1
            if b"\n" in tail:
                break
        if kept < content_end:
            stream.truncate(kept)


def read_json_file(path: Path) -> Any:
    """Read one JSON file that we wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
