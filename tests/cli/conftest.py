"""A tiny model for the command line, and what a command answers to `--json`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.cli.main import invoke
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

ObjectOf = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with its tokenizer, saved; prompts of exemplars fit into it."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_model("llama", max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with experts."""
    folder = tmp_path_factory.mktemp("models") / "sparse"
    tiny_model("mixtral", max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def object_of(capfd: pytest.CaptureFixture[str]) -> ObjectOf:
    """Runs a command with --json and parses its stdout, which must hold nothing else."""

    def run(arguments: list[str]) -> dict[str, Any]:
        capfd.readouterr()
        status = invoke([*arguments, "--json"])
        printed = capfd.readouterr()
        assert status == 0, printed.err
        return json.loads(printed.out)

    return run
