"""The folder that a run writes: resolved recipe, versions, metrics as JSON lines, results of stages.

A run folder is recognised by its `run.json`. `--resume` is refused in a folder without one, or in one that
another recipe wrote.
"""

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flanmoe.core import files
from flanmoe.core.cache import fingerprint
from flanmoe.core.config import Config
from flanmoe.core.errors import RunError

_MARKER = "run.json"
_RECORDED_PACKAGES = (
    "flanmoe",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "lm_eval",
    "numpy",
)


@dataclass(frozen=True, slots=True)
class RunDir:
    """A folder of one run, or of one stage inside a run."""

    path: Path

    @classmethod
    def open(cls, path: Path, recipe: Config, *, resume: bool) -> "RunDir":
        """Create the folder of a new run, or open it again to go on.

        Raises:
            RunError: if `resume` is asked for in a folder that no run or another recipe wrote, or is not
                asked for in a folder that already holds something.
        """
        _check_no_file(path)
        marker = path / _MARKER
        identity = fingerprint(recipe.to_mapping())
        if resume:
            _check_resumable(path, marker, identity)
        elif path.exists() and any(path.iterdir()):
            raise RunError(
                f"The output folder {path} must be empty or new, but already holds files. "
                "Add `--resume` to go on with it, or choose another folder with `--out`."
            )
        run = cls(path)
        if not marker.exists():
            run.describe(recipe)
        return run

    @classmethod
    def resumable(cls, path: Path, *, kind: str) -> "RunDir":
        """Open the folder of an earlier run whose recipe may have changed since; see `describe`.

        Args:
            path: the folder.
            kind: name of the recipe's class.

        Raises:
            RunError: if no run, or one of another kind, wrote the folder.
        """
        _check_no_file(path)
        marker = path / _MARKER
        _check_started(path, marker)
        found = _written(path, marker).get("kind")
        if found != kind:
            raise RunError(
                f"`--resume` needs a folder of the kind `{kind}`, but {path} is of the kind `{found}`. Choose "
                "another folder with `--out`."
            )
        return cls(path)

    def describe(self, recipe: Config) -> None:
        """Write what is run and with which versions; over what stood there, if it has changed."""
        files.write_text(self.path / "recipe.yaml", recipe.to_yaml())
        files.write_json(self.path / "versions.json", versions())
        identity = fingerprint(recipe.to_mapping())
        files.write_json(self.path / _MARKER, {"kind": type(recipe).__name__, "identity": identity})

    @classmethod
    def existing(cls, path: Path) -> "RunDir":
        """Open a folder that a run has written, to read it.

        Raises:
            RunError: if the folder is missing or is not a run folder.
        """
        if not (path / _MARKER).exists():
            raise RunError(
                f"{path} is not a run folder: it has no {_MARKER}. "
                "Name a folder that `flanmoe run` wrote."
            )
        return cls(path)

    def child(self, *parts: str) -> "RunDir":
        """Return the folder of a part of the run."""
        return RunDir(self.path.joinpath(*parts))

    def file(self, name: str) -> Path:
        """Return the path of a file in this folder."""
        return self.path / name

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file atomically and return its path."""
        files.write_json(self.path / name, value)
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically and return its path."""
        files.write_text(self.path / name, text)
        return self.path / name

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this folder.

        Raises:
            RunError: if the file is missing or torn.
        """
        path = self.path / name
        try:
            return files.read_json_file(path)
        except FileNotFoundError as error:
            raise RunError(
                f"The run folder has no {path}. Finish the run first (`--resume`)."
            ) from error
        except ValueError as error:
            raise RunError(f"The file {path} is not valid JSON: {error}.") from error

    def has(self, name: str) -> bool:
        """Say whether a file of this name is there."""
        return (self.path / name).exists()

    def log(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one row to a JSON-lines file."""
        files.append_json_line(self.path / name, dict(row))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read a JSON-lines file of this folder (empty where there is none)."""
        return files.read_json_lines(self.path / name)


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that decide results."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _check_no_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunError(
            f"The output folder {path} must be a folder, but is a file. Choose another with `--out`."
        )


def _check_started(path: Path, marker: Path) -> None:
    if not marker.exists():
        raise RunError(
            f"`--resume` needs a folder that an earlier run wrote, but {path} "
            f"{'is no run folder' if path.exists() else 'does not exist'}. Leave `--resume` out to start there."
        )


def _check_resumable(path: Path, marker: Path, identity: str) -> None:
    _check_started(path, marker)
    written = _written(path, marker)["identity"]
    if written != identity:
        raise RunError(
            f"`--resume` needs the recipe that {path} was started with, but this one differs "
            f"(its hash is {identity}, the folder's is {written}). "
            f"Compare with {path / 'recipe.yaml'}, or choose another folder with `--out`."
        )


def _written(path: Path, marker: Path) -> dict[str, str]:
    """Return what the marker says: the kind of the recipe and its hash."""
    try:
        content: Any = files.read_json_file(marker)
    except (OSError, ValueError) as error:
        raise RunError(
            f"`--resume` needs a folder that an earlier run wrote, but the {_MARKER} of {path} cannot be "
            f"read as JSON: {error}. Choose another folder with `--out`, and leave `--resume` out."
        ) from error
    if not isinstance(content, dict) or "identity" not in content:
        raise RunError(
            f"`--resume` needs a folder that an earlier run wrote, but the {_MARKER} of {path} is another "
            "program's: it has no `identity`. Choose another folder with `--out`, and leave `--resume` out."
        )
    return {str(key): str(value) for key, value in cast("dict[str, Any]", content).items()}
