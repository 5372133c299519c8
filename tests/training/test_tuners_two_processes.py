"""Tuners in two processes (gloo, CPU): the same weights with the model whole or spread, stopped or not."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flanmoe.data.example import Packed
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig
from flanmoe.training.rows import FixedRows
from flanmoe.training.task_statistics import with_statistics

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "tuners_of_two.py"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    packed_rows: Callable[..., list[Packed]],
    in_two_processes: Callable[..., None],
) -> Path:
    """What the two processes left behind."""
    made = tmp_path_factory.mktemp("tuners")
    rows = packed_rows(16)
    (made / "rows").write_bytes(pickle.dumps(rows))
    config = TuneConfig.parse({"tuner": {"kind": "expert_specialised"}})
    with_statistics(config, tiny_model("mixtral"), FixedRows(rows), made / "statistics")
    in_two_processes(SCRIPT, made / "rows", made / "statistics", made)
    return made


@pytest.mark.parametrize("kind", ["low_rank", "expert_specialised"])
def test_sharding_and_stopping_change_nothing(kind: str, folder: Path) -> None:
    def weights(name: str) -> Weights:
        return torch.load(folder / f"{kind}-{name}.pt", weights_only=True)

    whole = weights("none")
    torch.testing.assert_close(weights("fsdp"), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights("none-resumed"), whole, rtol=0, atol=0)
    torch.testing.assert_close(weights("fsdp-resumed"), weights("fsdp"), rtol=0, atol=0)
    before = dict(tiny_model("mixtral").named_parameters())
    moved = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    assert any("experts" in name for name in moved)
    assert not any("lm_head" in name or "norm" in name for name in moved)
