"""The command line: help that teaches, exit statuses, one JSON object on stdout."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

VERBS = ["quickstart", "run", "plan", "doctor", "upcycle", "eval", "inspect", "report", "chat"]


def flanmoe(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process of its own, as a person does."""
    command = [sys.executable, "-m", "flanmoe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_names_every_verb() -> None:
    result = flanmoe("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in [*VERBS, "data"])


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example_that_parses(verb: str) -> None:
    result = flanmoe(verb, "--help")
    assert result.returncode == 0
    assert f"Example: flanmoe {verb}" in " ".join(result.stdout.replace("│", " ").split())


def test_help_loads_no_heavy_library() -> None:
    program = (
        "import sys; sys.argv=['flanmoe','--help']\n"
        "from flanmoe.cli.main import invoke; invoke(['--help'])\n"
        "heavy = {'torch','transformers','matplotlib','datasets','lm_eval','numpy','scipy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, f"loaded by --help: {result.stderr}"


def test_unknown_option_is_the_users_mistake() -> None:
    result = flanmoe("plan", "nowhere.yaml", "--bogus")
    assert result.returncode == 2
    assert "--bogus" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_file_is_one_sentence_and_json_when_asked() -> None:
    result = flanmoe("plan", "nowhere.yaml", "--json")
    assert result.returncode == 2
    assert json.loads(result.stdout) == {
        "error": "The file nowhere.yaml does not exist. Check the path.",
        "exit_status": 2,
    }
    assert "Traceback" not in result.stderr


def test_version_is_the_packages() -> None:
    result = flanmoe("--version")
    assert result.stdout.strip() == importlib.metadata.version("flanmoe")
