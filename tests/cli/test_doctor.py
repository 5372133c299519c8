"""`flanmoe doctor`: one JSON object on stdout, nothing of what libraries print, exit 0 when it has run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.cli.main import invoke

ObjectOf = Callable[[list[str]], dict[str, Any]]


def test_a_check_by_name(object_of: ObjectOf) -> None:
    said = object_of(["doctor", "--check", "pooled_layers", "--check", "lora_own_names"])
    assert [check["name"] for check in said["checks"]] == ["pooled_layers", "lora_own_names"]
    for check in said["checks"]:
        assert check["status"] in ("ok", "defect")
        assert isinstance(check["figure"], int | float)
        assert isinstance(check["expected"], int | float)


def test_a_model(sparse: Path, object_of: ObjectOf) -> None:
    checks = ["model_blocks", "model_packing", "model_lora_router"]
    said = object_of(["doctor", str(sparse), *(a for name in checks for a in ("--check", name))])
    assert said["model"] == str(sparse)
    assert [(check["name"], check["version"]) for check in said["checks"]] == [
        (name, None) for name in checks
    ]
    assert said["checks"][0]["figure"] == 2


def test_people_are_told_and_machines_are_not(
    base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["doctor", str(base), "--check", "model_blocks"]) == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "LlamaForCausalLM is dense." in printed.err
    assert "flanmoe upcycle" in printed.err
    assert "1 checks in" in printed.err


def test_an_unknown_check_and_a_missing_model_are_mistakes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert invoke(["doctor", "--check", "nothing", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"].startswith(
        "The check `nothing` is not known."
    )
    assert invoke(["doctor", "./nowhere", "--json"]) == 2
    assert "does not exist" in json.loads(capfd.readouterr().out)["error"]
