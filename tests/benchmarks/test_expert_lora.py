"""The benchmark of low-rank experts runs at a tiny size and prints what it promises; no figure is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "expert_lora.py"


def test_low_rank_experts_beside_peft_and_full_tuning(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARK), "--tiny", "--peer-experts", "grouped_mm"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads(out.read_text(encoding="utf-8"))["results"]
    ways = ["low-rank", "full, flanmoe", "PEFT, grouped_mm", "full, grouped_mm"]
    assert list(found["seconds"]) == list(found["peak_bytes"]) == ways
    # Ours and PEFT's train as much.
    assert found["trained"]["low-rank"] == found["trained"]["PEFT, grouped_mm"]
    assert found["goals"].keys() == {
        "step over full tuning",
        "PEFT's step over ours",
        "peak memory over PEFT's",
    }
