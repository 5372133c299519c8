"""Names to sources: exemplars, files, the data folder, the Hugging Face hub, in this order."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.data.sources.base import Source
from flanmoe.data.sources.exemplars import PREFIX, exemplar_index, exemplar_source
from flanmoe.data.sources.hub import HubDataset
from flanmoe.data.sources.json_lines import JsonLines
from flanmoe.data.sources.parquet import Parquet

DATA_VARIABLE = "FLANMOE_DATA"
DEFAULT_SPLIT = "train"

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_HUB_IDENTIFIER = re.compile(r"^[\w.-]+/[\w.-]+$")


class AbsentDataError(DataError):
    """No folder of that name in the data folder, or no such file: the data as a whole is not there."""


def resolve_data_dir(data_dir: Path | None) -> Path | None:
    """Return the data folder: the argument, else the environment variable FLANMOE_DATA, else None.

    Raises:
        DataError: if the folder that is named does not exist.
    """
    origin = "`--data-dir`"
    if data_dir is None:
        named = os.environ.get(DATA_VARIABLE)
        if not named:
            return None
        data_dir, origin = Path(named), f"the environment variable {DATA_VARIABLE}"
    if not data_dir.is_dir():
        raise DataError(
            f"The data folder must exist, but {data_dir} (from {origin}) is no folder. Check the "
            "path."
        )
    return data_dir


def find_source(
    name: str,
    *,
    split: str = DEFAULT_SPLIT,
    subset: str | None = None,
    data_dir: Path | None = None,
) -> Source:
    """Return the rows that a name and a split stand for.

    Args:
        name: an exemplar task (`exemplars/...`), a file (`.jsonl`, `.jsonl.gz`, `.parquet`), a
            folder in the data folder, or the id of a data set on the Hugging Face hub
            (`owner/name`).
        split: the split; files and exemplars have only one.
        subset: configuration of a data set on the hub.
        data_dir: the data folder; without it FLANMOE_DATA.

    Raises:
        AbsentDataError: if nothing of that name is there; names the nearest one.
        DataError: if it has no such split, or `split` or `subset` mean nothing for it.
    """
    folder = resolve_data_dir(data_dir)
    try:
        return _found(name, split, subset, folder)
    except PermissionError as error:
        raise DataError(
            f"{error.filename}, for the task `{name}`, cannot be read: {error.strerror}. Check its "
            "permissions."
        ) from error


def _found(name: str, split: str, subset: str | None, folder: Path | None) -> Source:
    if kind := unsplit_kind(name):
        _refuse_unused(name, kind, split=split, subset=subset)
    if name.startswith(PREFIX):
        return exemplar_source(name)
    if name.endswith(_SUFFIXES):
        return _file_source(Path(name).expanduser(), name)
    if folder is not None and (folder / name).is_dir():
        _refuse_unused(name, "a folder of the data folder", split=DEFAULT_SPLIT, subset=subset)
        return _split_source(folder / name, name, split)
    if _HUB_IDENTIFIER.match(name):
        return HubDataset(identifier=name, split=split, subset=subset)
    raise AbsentDataError(_unknown(name, folder))


def unsplit_kind(name: str) -> str | None:
    """Say what a name is that has no splits (an exemplar task, a file); None where it may have some."""
    if name.startswith(PREFIX):
        return "an exemplar task"
    return "a file" if name.endswith(_SUFFIXES) else None


def known_names(data_dir: Path | None) -> list[str]:
    """Return the task names that the data folder and the exemplars hold."""
    folder = resolve_data_dir(data_dir)
    names = [] if folder is None else [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return [*sorted(names), *exemplar_index().tasks]


def splits_of(folder: Path) -> Iterator[str]:
    """Yield the names of the splits in one folder of the data folder, sorted."""
    found: set[str] = set()
    for entry in folder.iterdir():
        for suffix in _SUFFIXES:
            if entry.name.endswith(suffix):
                found.add(entry.name.removesuffix(suffix))
    yield from sorted(found)


def _refuse_unused(name: str, kind: str, *, split: str, subset: str | None) -> None:
    if split != DEFAULT_SPLIT:
        raise DataError(
            f"`{name}` is {kind} and has no splits, but `split` is `{split}`. Leave `split` out."
        )
    if subset is not None:
        raise DataError(
            f"`{name}` is {kind} and has no subsets, but `subset` is `{subset}`. Leave `subset` "
            "out."
        )


def _split_source(folder: Path, name: str, split: str) -> Source:
    files = [folder / f"{split}{suffix}" for suffix in _SUFFIXES]
    present = [file for file in files if file.exists()]
    if len(present) > 1:
        raise DataError(
            f"The split `{split}` of `{name}` must be one file, but there are "
            f"{listing(file.name for file in present)}. Remove all but one."
        )
    if not present:
        splits = list(splits_of(folder))
        raise DataError(
            f"`{name}` has no split `{split}`.{nearest_name_hint(split, splits)} Its folder "
            f"{folder} holds {listing(splits) or 'no .jsonl, .jsonl.gz or .parquet file'}."
        )
    return _file_source(present[0], name)


def _file_source(file: Path, name: str) -> Source:
    if not file.exists():
        raise AbsentDataError(f"The file {name} does not exist. Check the path.")
    if file.name.endswith(".parquet"):
        return Parquet(file)
    return JsonLines(file)


def _unknown(name: str, folder: Path | None) -> str:
    hint = nearest_name_hint(name, known_names(folder))
    if folder is None:
        return (
            f"The task `{name}` is not known.{hint} No data folder is set: give one with "
            f"`--data-dir` or {DATA_VARIABLE}, or name an exemplar task, a file, or a data set on "
            "the hub (`owner/name`)."
        )
    return (
        f"The task `{name}` is not known.{hint} The data folder {folder} has no folder of that "
        "name, and it is no exemplar task, file, or data set on the hub (`owner/name`)."
    )
