"""The examples run as they stand, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from flanmoe.models.loading import load_model
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run_example(name: str, *arguments: object, processes: int = 1) -> str:
    """Run an example, under torchrun if in several processes, and return what it printed."""
    launcher: list[str] = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_upcycle_and_look(base: Path) -> None:
    lines = run_example("upcycle_and_look.py", base).splitlines()
    assert float(lines[0].rpartition(" ")[2]) < 1e-3
    assert [line.split(",")[0] for line in lines[3:]] == ["layer  0", "layer  1"]


@pytest.mark.slow
def test_compare_in_python(base: Path, tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(9))
    )
    evaluate = {"stage": "evaluate", "tasks": ["exemplars/bbh/snarks", "exemplars/bbh/navigate"]}
    tune = {
        "stage": "tune",
        "data": {"tasks": [str(tmp_path / "sums.jsonl")]},
        "packing": {"length": 64, "window": 4},
        "train": {"length": 64, "steps": 2, "rows_per_step": 1},
    }
    arms = {
        "dense": {"model": str(base), "stages": [tune, evaluate]},
        "sparse": {"model": str(base), "stages": [{"stage": "upcycle"}, tune, evaluate]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "tiny", "arms": arms}))
    printed = run_example("compare_in_python.py", tmp_path / "study.yaml", tmp_path / "out")
    assert "sparse minus dense, loss:" in printed
    assert (tmp_path / "out" / "report.html").exists()
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "upcycle_and_look.py",
        "compare_in_python.py",
        "tune_in_several_processes.py",
    }


@pytest.mark.slow
def test_tune_in_several_processes(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "sparse")
    tiny_tokenizer().save_pretrained(tmp_path / "sparse")
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(9))
    )
    printed = run_example(
        "tune_in_several_processes.py",
        tmp_path / "sparse",
        tmp_path / "sums.jsonl",
        tmp_path / "out",
        processes=2,
    )
    assert printed.startswith("loss of step 10: ")
    before, after = (load_model(str(tmp_path / name)) for name in ("sparse", "out/model"))
    changed = [
        not torch.equal(one, other)
        for one, other in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert all(changed)
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-10" / "complete.json").exists()
