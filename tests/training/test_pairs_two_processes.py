"""Two processes (gloo, DDP) take the same step of an encoder-decoder as one."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flanmoe.data.example import PackedPair

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "one_of_two_pairs.py"
LOSSES = {"balance_coefficient": 0.5, "importance_coefficient": 0.3, "z_coefficient": 0.1}
ROUTERS = [{**LOSSES, "scope": scope} for scope in ("global", "lagged", "sequence")]


def test_gradients_equal_those_of_one_process(
    tmp_path: Path,
    tiny_t5: Callable[..., PreTrainedModel],
    pairs_in_rows: Callable[..., list[Any]],
    pair_rows: Callable[..., list[PackedPair]],
    gradients_of: Callable[..., list[dict[str, torch.Tensor]]],
    in_two_processes: Callable[..., None],
) -> None:
    rows = pair_rows(pairs_in_rows(16))
    tiny_t5().save_pretrained(tmp_path / "model")
    (tmp_path / "rows").write_bytes(pickle.dumps(rows))
    (tmp_path / "routers.json").write_text(json.dumps(ROUTERS))
    inputs = (tmp_path / name for name in ("model", "routers.json", "rows"))
    in_two_processes(SCRIPT, *inputs, tmp_path / "out.pt")
    for router, found in zip(ROUTERS, torch.load(tmp_path / "out.pt"), strict=True):
        expected = gradients_of(
            tiny_t5().double(),
            rows,
            steps=2,
            rows_per_step=8,
            micro_batch_rows=2,
            router=router,
        )
        for one, other in zip(found, expected, strict=True):
            for name, value in other.items():
                difference = (one[name] - value).abs().max() / value.abs().max()
                assert float(difference) < 1e-10, (router, name)
