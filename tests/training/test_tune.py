"""The one entry that stages call: its result, its files, its silence, and that weights move."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError, RunError
from flanmoe.core.rundir import RunDir
from flanmoe.data.example import Packed
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.testing.tuning import tune_rows
from flanmoe.training.tune import TuneResult

Rows = Callable[..., list[Packed]]


run = partial(tune_rows, steps=4)


def test_result_of_a_sparse_model(tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(16)
    result = run(tiny_model("mixtral"), rows, tmp_path)
    real = [sum(row.num_real_tokens for row in rows[4 * i : 4 * i + 4]) for i in range(4)]
    ledger = result.ledger
    assert (ledger.sequences, ledger.steps, ledger.real_tokens) == (16, 4, sum(real))
    assert ledger.padding_tokens == 16 * 24 - sum(real)
    assert ledger.loss_tokens == sum(row.num_loss_tokens for row in rows)
    # A third of a training pass more for counting experts, four micro-batches a step.
    assert ledger.flops == pytest.approx(16 * 24 * 400)
    assert result.counting_pass_flops == pytest.approx(16 * 24 * 100)
    assert 0 < result.counting_pass_seconds < ledger.seconds
    assert [point.tokens for point in result.loss_history] == [sum(real[: i + 1]) for i in range(4)]
    assert result.final_loss == result.loss_history[-1].loss
    load = result.expert_load
    assert load is not None
    assert load.layers == (0, 1)
    assert [sum(counts) for counts in load.counts] == [2 * sum(real)] * 2
    assert [sum(shares) for shares in load.shares] == pytest.approx([1.0, 1.0])
    assert load.max_over_mean[0] == pytest.approx(8 * max(load.shares[0]))
    assert load.names == ("model.layers.0.mlp", "model.layers.1.mlp")
    # Native decoders have no capacity.
    assert result.drops is not None
    assert result.drops.dropped_share == result.drops.unserved_share == (0.0, 0.0)
    assert result.router_losses
    assert result.router_settings == {
        "balance_coefficient": 0.01,
        "importance_coefficient": 0.0,
        "z_coefficient": 0.001,
        "convention": "t5x",
        "scope": "global",
    }
    last = RunDir(tmp_path).rows("metrics.jsonl")[-1]
    assert result.router_last == {k: v for k, v in last.items() if k.startswith("router/")}
    assert len(result.router_last) == 6
    assert TuneResult.parse(result.to_mapping()) == result


def test_result_of_a_dense_model(tmp_path: Path, packed_rows: Rows) -> None:
    result = run(tiny_model("llama"), packed_rows(8), tmp_path)
    assert result.expert_load is None
    assert result.drops is None
    assert not result.router_losses
    assert result.router_settings == {}
    assert result.router_last == {}
    assert result.ledger.flops == pytest.approx(16 * 24 * 300)
    assert not (tmp_path / "routing.jsonl").exists()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_router_losses_can_be_off(tmp_path: Path, packed_rows: Rows) -> None:
    router = {"balance_coefficient": 0, "z_coefficient": 0}
    result = run(tiny_model("mixtral"), packed_rows(8), tmp_path, router=router)
    assert not result.router_losses
    assert result.expert_load is not None
    (row, *_) = RunDir(tmp_path).rows("metrics.jsonl")
    assert row["loss"] == row["loss/cross_entropy"]
    assert row["router/balance_raw"] > 1


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_nothing_goes_to_stdout(
    name: str, tmp_path: Path, packed_rows: Rows, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tiny_model(name), packed_rows(8), tmp_path, steps=2, checkpoint_every_steps=1)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Tuning: 2/2 steps" in captured.err
    assert "Writing model shards" not in captured.err


def test_the_loss_falls_on_rows_that_repeat(tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(4)
    values = {"steps": 15, "learning_rate": 3e-3, "schedule": "constant"}
    result = run(tiny_model("mixtral"), rows, tmp_path, **values)
    assert result.final_loss < result.loss_history[0].loss - 1.0


def test_more_checkpoints_are_kept_on_request(tmp_path: Path, packed_rows: Rows) -> None:
    values = {"steps": 5, "checkpoint_every_steps": 2, "keep_checkpoints": 2}
    run(tiny_model("llama"), packed_rows(4), tmp_path, **values)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-4", "checkpoint-5"]


def test_resuming_a_finished_run_trains_no_more(tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(8)
    model = tiny_model("mixtral")
    first = run(model, rows, tmp_path, checkpoint_every_steps=4)
    other = tiny_model("mixtral", seed=5)
    again = run(other, rows, tmp_path, checkpoint_every_steps=4, resume=True)
    assert again == first
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_resume_needs_a_checkpoint(tmp_path: Path, packed_rows: Rows) -> None:
    with pytest.raises(RunError) as caught:
        run(tiny_model("llama"), packed_rows(4), tmp_path, resume=True)
    assert str(caught.value) == (
        f"`--resume` needs a complete checkpoint, but {tmp_path / 'checkpoints'} holds none. "
        "Start the run without `--resume`."
    )


def test_the_same_run_twice_gives_the_same_bits(tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(8)
    one, other = tiny_model("mixtral"), tiny_model("mixtral")
    run(one, rows, tmp_path / "one", precision="bfloat16")
    run(other, rows, tmp_path / "other", precision="bfloat16")
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def update(name: str, rows: list[Packed], folder: Path, precision: str) -> torch.Tensor:
    """What 20 steps at a fine-tuning rate add to the weights."""
    # Weights of a usual size: with the tiny models' own, rounding flips many choices of experts.
    model = tiny_model(name, initializer_range=0.05)
    before = torch.cat([value.detach().flatten().clone() for value in model.parameters()])
    values = {"steps": 20, "learning_rate": 2e-5, "schedule": "constant", "precision": precision}
    run(model, rows, folder, rows_per_step=8, micro_batch_rows=4, **values)
    after = torch.cat([value.detach().flatten() for value in model.parameters()])
    assert after.dtype == torch.float32
    return after - before


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_weights_move_as_in_float32(name: str, tmp_path: Path, packed_rows: Rows) -> None:
    rows = packed_rows(160, length=32)
    exact = update(name, rows, tmp_path / "exact", "float32")
    found = update(name, rows, tmp_path / "found", "bfloat16")
    assert not torch.equal(exact, found)
    assert (found != 0).float().mean() > 0.95
    cosine = torch.nn.functional.cosine_similarity(exact, found, dim=0)
    assert float(cosine) >= 0.99


def test_rows_that_leak_are_refused_before_the_first_step(
    tmp_path: Path, packed_rows: Rows
) -> None:
    model = tiny_model("gpt_oss")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"in GptOssForCausalLM moved by .*examples_per_row: 1"):
        run(model, packed_rows(8), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.rglob("*.jsonl"))


def test_one_example_a_row_trains_what_leaks(
    tmp_path: Path, packed_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unasked(model: PreTrainedModel) -> None:
        raise AssertionError("Rows of one example need no check.")

    monkeypatch.setattr("flanmoe.training.model_checks.require_packing_without_leak", unasked)
    rows = packed_rows(4, most_in_a_row=1)
    values = {"steps": 10, "learning_rate": 3e-3, "schedule": "constant"}
    result = run(tiny_model("gpt_oss"), rows, tmp_path, **values)
    assert result.final_loss < result.loss_history[0].loss - 0.5
