"""Which checks run, what `--json` holds, and the whole of it on the installed libraries."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from flanmoe.core.errors import ConfigError
from flanmoe.stages.doctor import doctor, text
from flanmoe.stages.doctor.check import Check, Finding, Measured
from flanmoe.stages.doctor.doctor import STACK_CHECKS, examine

FIELDS = {
    "name",
    "library",
    "version",
    "status",
    "measures",
    "figure",
    "expected",
    "detail",
    "meaning",
    "way_out",
    "seconds",
}


def test_names_differ_and_every_check_says_what_to_do() -> None:
    names = [check.name for check in STACK_CHECKS]
    assert len(set(names)) == len(names)
    assert not any(name.startswith("model_") for name in names)
    for check in STACK_CHECKS:
        assert check.library in ("transformers", "trl", "peft")
        assert check.meaning.endswith(".")
        assert check.way_out.endswith(".")


def test_chosen_checks_run_in_order_and_are_json() -> None:
    report = examine(names=["per_layer_experts", "pooled_layers"])
    assert [check["name"] for check in report["checks"]] == ["pooled_layers", "per_layer_experts"]
    assert all(set(check) == FIELDS for check in report["checks"])
    assert sum(report["counts"].values()) == 2
    assert report["model"] is None
    assert report["installed"]["transformers"] == importlib.metadata.version("transformers")
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_an_unknown_check_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError) as caught:
        examine(names=["pooled_layer"])
    assert str(caught.value).startswith(
        "The check `pooled_layer` is not known. Did you mean `pooled_layers`? Known: `accumulation`, "
    )


def test_a_check_of_a_model_needs_one() -> None:
    with pytest.raises(ConfigError) as caught:
        examine(names=["model_packing"])
    assert str(caught.value) == (
        "The check `model_packing` needs a model. Name one: `flanmoe doctor MODEL --check model_packing`."
    )


def test_libraries_that_are_absent_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    absent = ("trl", "peft")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else known(name)
    )
    names = [check.name for check in STACK_CHECKS if check.library in absent]
    report = examine(names=names)
    assert {check["status"] for check in report["checks"]} == {"skipped"}
    assert {check["detail"] for check in report["checks"]} == {
        "trl is not installed.",
        "peft is not installed.",
    }
    assert report["installed"]["trl"] is None
    assert report["counts"]["skipped"] == len(names) >= 5


def test_one_error_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> Measured:
        raise AttributeError("gone in this version")

    shared = ("transformers", "a figure", 1.0, "It matters.", "Do something.")
    checks = (Check("first", *shared, breaks), Check("second", *shared, lambda: Measured(1.0)))
    monkeypatch.setattr(doctor, "STACK_CHECKS", checks)
    report = examine()
    assert [check["status"] for check in report["checks"]] == ["error", "ok"]
    assert report["checks"][0]["detail"] == "AttributeError: gone in this version."


def finding(name: str, status: str, **values: object) -> Finding:
    given = {
        "library": "peft",
        "version": "1.2",
        "measures": "routers [adapted]",
        "figure": 2.0,
        "expected": 0.0,
        "detail": f"Of {name}.",
        "meaning": "Routers move.",
        "way_out": "Name the targets.",
        "seconds": 0.1,
        **values,
    }
    return Finding(name=name, status=status, **given)


def test_people_read_figures_then_meaning_and_way_out(capfd: pytest.CaptureFixture[str]) -> None:
    findings = [
        finding("first", "defect"),
        finding("second", "defect", figure=3.456),
        finding("third", "skipped", figure=None, detail="trl is not installed."),
        finding("fourth", "skipped", figure=None, detail="trl is not installed."),
        finding("fifth", "ok", detail="Nothing to say."),
    ]
    machine = {"python": "3.11", "cores": 2, "torch_threads": 1, "bfloat16_instructions": False}
    report = {
        "model": None,
        "installed": {"torch": "2.13", "trl": None},
        "machine": machine,
        "counts": {"ok": 1, "defect": 2, "note": 0, "skipped": 2, "error": 0},
        "seconds": 3.2,
    }
    text.show(findings, report)
    printed = capfd.readouterr().err
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == (
        "torch 2.13, trl (absent); Python 3.11; 2 cores, 1 torch threads, without bfloat16 instructions."
    )
    assert "peft 1.2" in lines
    assert "defect first: routers [adapted] 2 0" in lines
    assert "defect second: routers [adapted] 3.46 0" in lines
    assert "skipped third: routers [adapted] - -" in lines
    assert "first, second" in lines
    assert lines.count("means Routers move.") == 1
    assert lines.count("way out Name the targets.") == 1
    assert "skipped third, fourth: trl is not installed." in lines
    assert not any("Nothing to say." in line for line in lines)
    assert lines[-1].startswith("5 checks in 3 s: 1 ok, 2 defect, 2 skipped.")


# What research note 05 measured with these versions, and this program again.
MEASURED = {
    "accumulation": (4.0, "defect"),
    "accumulation_trl": (1.0, "ok"),
    "pooled_layers": (1.0, "defect"),
    "switch_config_flag": (0.0, "defect"),
    "switch_padding_balance": (1.34, "defect"),
    "switch_padding_z": (1.28, "defect"),
    "nllb_experts": (0.18, "defect"),
    "per_layer_experts": (1.0, "defect"),
    "bfloat16_weights": (0.71, "defect"),
    "packing_families": (1.0, "defect"),
    "packing_with_mask": (4.45, "defect"),
    "packing_with_cache": (4.45, "defect"),
    "packing_collator": (0.0, "ok"),
    "packing_trl": (0.0, "ok"),
    "lora_own_names": (4.0, "ok"),
    "lora_foreign_names": (3.0, "defect"),
    "lora_all_linear_router": (2.0, "defect"),
    "world_size": (2.0, "defect"),
}
_VERSIONS = {"transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2"}


@pytest.mark.slow
def test_the_whole_command_on_the_installed_libraries() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "flanmoe", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert set(found) == set(MEASURED)
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    for name, (figure, status) in MEASURED.items():
        check = found[name]
        if check["version"] is None:
            assert check["status"] == "skipped", check
        elif check["version"] == _VERSIONS[check["library"]]:
            assert check["status"] == status, check
            assert check["figure"] == pytest.approx(figure, abs=0.03), check
        else:
            assert check["status"] in ("ok", "defect"), check
