"""Two processes (gloo, DDP) take the same step as one. Sharding is in `test_fsdp.py`."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flanmoe.core.errors import ConfigError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

SCRIPT = Path(__file__).parent / "scripts" / "one_of_two.py"


LOSSES = {"balance_coefficient": 0.5, "importance_coefficient": 0.3, "z_coefficient": 0.1}
ROUTERS = [
    *({**LOSSES, "scope": scope} for scope in ("global", "lagged", "sequence")),
    {**LOSSES, "scope": "global", "convention": "mesh_tf"},
]


@pytest.mark.slow
def test_gradients_equal_those_of_one_process(
    tmp_path: Path,
    packed_rows: Callable[..., list[Packed]],
    gradients_of: Callable[..., list[dict[str, torch.Tensor]]],
    in_two_processes: Callable[..., None],
) -> None:
    rows = packed_rows(16)
    (tmp_path / "rows").write_bytes(pickle.dumps(rows))
    (tmp_path / "routers.json").write_text(json.dumps(ROUTERS))
    in_two_processes(SCRIPT, tmp_path / "routers.json", tmp_path / "rows", tmp_path / "out.pt")
    for router, found in zip(ROUTERS, torch.load(tmp_path / "out.pt"), strict=True):
        expected = gradients_of(
            tiny_model("mixtral").double(),
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


@pytest.mark.parametrize("outside", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "fsdp"])
def test_other_sharding_is_refused(
    outside: str,
    tmp_path: Path,
    packed_rows: Callable[..., list[Packed]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = training_arguments(TuneConfig(), tmp_path, SeedTree(0))
    if outside == "fsdp":
        arguments.fsdp = True
    else:
        monkeypatch.setenv(outside, "true")
    with pytest.raises(ConfigError) as caught:
        SparseTrainer(tiny_model("mixtral"), arguments, stream=FixedRows(packed_rows(1)))
    assert str(caught.value) == (
        "Tuning spreads a model by itself where `sharding: fsdp` is set, but FSDP or DeepSpeed is "
        "switched on from outside, which is not supported. Launch with torchrun and without it."
    )
