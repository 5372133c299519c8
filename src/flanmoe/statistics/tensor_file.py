"""The file of statistics: one safetensors file whose metadata say in one JSON object what it holds.

One object, because safetensors writes several in any order: equal statistics make equal files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flanmoe.core.errors import RunError
from flanmoe.core.files import write_bytes

FORMAT = "flanmoe.statistics"
FORMAT_VERSION = 1


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what they are about, plain JSON types, atomically.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    text = json.dumps({"version": FORMAT_VERSION, **about}, sort_keys=True, allow_nan=False)
    whole = {name: values.contiguous() for name, values in tensors.items()}
    write_bytes(path, save(whole, metadata={FORMAT: text}))


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensor_file` wrote.

    Raises:
        RunError: if the file is missing, torn, something else, or of another version of the format.
    """
    if not path.is_file():
        raise RunError(
            f"Statistics of experts are read from a file, but {path} "
            f"{'is a folder' if path.exists() else 'does not exist'}. Name a file that "
            "`ExpertStatistics.save` wrote."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = _about(path, metadata)
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except SafetensorError as error:
        raise RunError(
            f"Statistics of experts must be one whole safetensors file, but {path} is not: {error}. Collect "
            "them again."
        ) from error


def _about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise RunError(
            f"The file {path} must hold statistics of experts, but says nothing of them in its metadata. Name "
            "a file that `ExpertStatistics.save` wrote."
        )
    about: dict[str, Any] = json.loads(metadata[FORMAT])
    if about.get("version") != FORMAT_VERSION:
        raise RunError(
            f"The statistics in {path} must have format version {FORMAT_VERSION}, but have version "
            f"{about.get('version')}. Collect them again, or read them with the flanmoe that wrote them."
        )
    return about
