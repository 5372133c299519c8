"""The benchmarks of expert compute run at a tiny size and print what they promise; no figure is looked at."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, folder: Path) -> dict[str, Any]:
    out = folder / "result.json"
    command = [sys.executable, str(BENCHMARKS / name), "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


def test_one_layer_beside_its_peers(tmp_path: Path) -> None:
    found = run("moe_layer.py", tmp_path)
    assert [(one["shape"], one["dtype"]) for one in found["results"]] == [
        (shape, dtype)
        for shape in ("4, 1, 16, 32, 24", "4, 2, 16, 32, 24")
        for dtype in ("float32", "bfloat16")
    ]
    top_1, _, top_2, low = found["results"]
    both = {
        "dense",
        "flanmoe",
        "flanmoe, kept",
        "transformers eager",
        "transformers grouped_mm",
        "products",
    }
    assert top_1["results"].keys() == both | {"transformers Switch", "flanmoe, no gate"}
    assert top_2["results"].keys() == both | {"st-moe-pytorch"}
    assert low["path"]["name"] == "rounded"
    assert top_1["goals"].keys() == {
        "step over dense",
        "best of transformers over ours",
        "Switch over ours without a gate",
        "peak over grouped_mm's",
    }
    for one in found["results"]:
        # All have the same weights and choices.
        assert one["largest_difference_to_eager"] < (1e-5 if one["dtype"] == "float32" else 0.02)
        saved = one["results"]["flanmoe"]["saved_bytes"]
        assert 0 < saved < one["results"]["transformers grouped_mm"]["saved_bytes"]
        visits, width = 24 * int(one["shape"].split(", ")[1]), 32
        kept = one["results"]["flanmoe, kept"]["saved_bytes"] - saved
        assert kept == visits * width * (4 if one["dtype"] == "float32" else 2)


def test_ways_of_products(tmp_path: Path) -> None:
    found = run("moe_products.py", tmp_path)
    ways = {one["what"]: set(one["ms"]) for one in found["results"]}
    assert ways == {
        "product": {"expert", "batched", "grouped", "threads"},
        "gradient": {"expert", "batched", "grouped", "threads"},
        "sum": {"added", "bags", "gathered"},
        "bytes": {"fresh", "reused"},
    }
