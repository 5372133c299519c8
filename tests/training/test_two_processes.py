"""Two processes (gloo, DDP) take the same step as one. FSDP and DeepSpeed are refused, not tested."""

import os
import pickle
import socket
import subprocess
import sys
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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_both(scope: str, folder: Path) -> None:
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(SCRIPT), scope, str(folder / "rows"), str(folder / "out.pt")]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]
        assert out == ""


@pytest.mark.exhaustive
@pytest.mark.parametrize("scope", ["global", "lagged", "sequence"])
def test_gradients_equal_those_of_one_process(
    scope: str,
    tmp_path: Path,
    packed_rows: Callable[..., list[Packed]],
    gradients_of: Callable[..., list[dict[str, torch.Tensor]]],
) -> None:
    rows = packed_rows(16)
    (tmp_path / "rows").write_bytes(pickle.dumps(rows))
    run_both(scope, tmp_path)
    found = torch.load(tmp_path / "out.pt")
    router = {"balance_coefficient": 0.5, "z_coefficient": 0.1, "scope": scope}
    expected = gradients_of(
        tiny_model("mixtral").double(),
        rows,
        steps=2,
        rows_per_step=8,
        micro_batch_rows=2,
        router=router,
    )
    for one, other in zip(found["gradients"], expected, strict=True):
        for name, value in other.items():
            difference = (one[name] - value).abs().max() / value.abs().max()
            assert float(difference) < 1e-10, name


def test_sharding_is_refused(
    tmp_path: Path,
    packed_rows: Callable[..., list[Packed]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    created = SparseTrainer.create_accelerator_and_postprocess

    def sharded(trainer: SparseTrainer) -> None:
        created(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(SparseTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ConfigError) as caught:
        SparseTrainer(
            tiny_model("mixtral"),
            training_arguments(TuneConfig(), tmp_path, SeedTree(0)),
            stream=FixedRows(packed_rows(1)),
        )
    assert str(caught.value) == (
        "Tuning runs in one process or with data parallelism (torchrun), but FSDP or DeepSpeed is "
        "switched on; sharded checkpoints are not supported yet. Launch without it."
    )
