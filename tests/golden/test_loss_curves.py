"""Two golden loss curves, dense and sparse: what training does may not change unnoticed.

They hold exactly, on one thread and with the instruction sets that every x86-64 machine has. Elsewhere, or
with another torch, they hold to a tolerance. After a change that is meant, write them again with

    python tests/golden/test_loss_curves.py

and say in the commit why they moved.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig
from flanmoe.training.rows import FixedRows
from flanmoe.training.tune import tune

FOLDER = Path(__file__).parent
MODELS = {"dense": "llama", "sparse": "mixtral"}
NAMES = ("loss", "loss/cross_entropy", "gradient_norm", "router/balance_raw", "router/z_raw")
# The same sums in the same order on every x86-64 machine.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "HF_HUB_OFFLINE": "1",
}


def made_row(number: int) -> Packed:
    """A row of three examples and some padding; nothing here depends on the data package."""
    lengths = (9 + number % 5, 7, 5)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 32 - sum(lengths)])
    positions = np.concatenate([np.arange(n) for n in (*lengths, 32 - sum(lengths))])
    ids = np.where(segments == 0, 0, 3 + (np.arange(32) * (number + 2) + 5 * number) % 120)
    labels = np.where((segments != 0) & (positions > 2), ids, -100)
    return Packed(ids, labels, segments, positions, ("a", "b", "c"))


def curve(model: str) -> dict[str, list[float]]:
    """Tune a tiny model for 12 steps and return what each step reported."""
    config = TuneConfig(
        steps=12,
        rows_per_step=4,
        micro_batch_rows=2,
        length=32,
        learning_rate=1e-3,
        warmup_steps=2,
        schedule="cosine",
        weight_decay=0.01,
        precision="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        rows = FixedRows([made_row(number) for number in range(20)])
        tune(
            tiny_model(model),
            rows,
            config,
            run=run,
            seeds=SeedTree(0),
            flops_per_token=1.0,
            resume=False,
        )
        steps = run.rows("metrics.jsonl")
    return {name: [step[name] for step in steps] for name in NAMES if name in steps[0]}


def curves_in_a_fixed_process() -> dict[str, Any]:
    """Compute both curves in a process with the fixed environment."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--here"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def conditions() -> dict[str, str]:
    """What exact equality depends on."""
    return {"torch": torch.__version__.partition("+")[0], "machine": platform.machine()}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return curves_in_a_fixed_process()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_curve(kind: str, found: dict[str, Any]) -> None:
    golden = json.loads((FOLDER / f"{kind}.json").read_text())
    if golden["conditions"] == conditions():
        assert found[kind] == golden["steps"]
    else:
        assert found[kind].keys() == golden["steps"].keys()
        for name, values in golden["steps"].items():
            assert found[kind][name] == pytest.approx(values, rel=1e-3), name


def main() -> None:
    """Write the golden curves, or print them from inside the fixed process."""
    if sys.argv[1:] == ["--here"]:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        print(json.dumps({kind: curve(model) for kind, model in MODELS.items()}))
        return
    for kind, steps in curves_in_a_fixed_process().items():
        content = {"conditions": conditions(), "steps": steps}
        (FOLDER / f"{kind}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
