"""The cache folder: things that can be made again, each made once and whole.

An entry is a folder built beside its final place and renamed when complete, under a file lock, so that two
processes never build the same one twice and a kill leaves nothing half-made that would later be read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from flanmoe.core.files import disk_errors


def cache_root() -> Path:
    """Return the cache folder: `FLANMOE_CACHE`, else `XDG_CACHE_HOME/flanmoe`, else `~/.cache/flanmoe`."""
    if explicit := os.environ.get("FLANMOE_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flanmoe"


def fingerprint(value: Any) -> str:
    """Return a short stable hash of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def code_fingerprint(*modules: ModuleType) -> str:
    """Return a hash of the source of modules: a part of the name of what they make."""
    digest = hashlib.blake2b(digest_size=12)
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def cached_folder(name: str, build: Callable[[Path], None], *, root: Path | None = None) -> Path:
    """Return the cache entry `name`, calling `build(folder)` first if it does not exist yet."""
    final = (root or cache_root()) / name
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.is_dir():
            return final
        with FileLock(f"{final}.lock"):
            if final.is_dir():
                return final
            partial = final.with_name(f"{final.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                build(partial)
                os.replace(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return final
