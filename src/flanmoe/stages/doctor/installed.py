"""The libraries that are asked: which are there, in which version, and on what machine."""

import importlib
import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from flanmoe.core.cores import usable_cores
from flanmoe.models.precision import computes_bfloat16

STACK = ("torch", "transformers", "accelerate", "trl", "peft")


def is_installed(library: str) -> bool:
    """Return whether a library can be imported; it is not imported for that."""
    return importlib.util.find_spec(library) is not None


def version_of(library: str) -> str | None:
    """Return the version of an installed distribution, None of anything else."""
    if not is_installed(library):
        return None
    return importlib.metadata.version(library)


def library(name: str) -> Any:
    """Import a library that need not be there; ask `is_installed` before.

    Raises:
        ModuleNotFoundError: if it is not there.
    """
    return importlib.import_module(name)


def machine() -> dict[str, Any]:
    """Describe what the checks run on."""
    return {
        "python": platform.python_version(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "bfloat16_instructions": computes_bfloat16(),
    }
