"""Training with `sharding: fsdp` in two processes (gloo, CPU): the same numbers, half of every weight.

One start of two processes makes all runs; see `scripts/sharded_runs.py`. What every test here compares
was written by both processes.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from flanmoe.core.errors import ConfigError, ModelError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.models.loading import load_model
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.checkpoints import (
    Layout,
    RunState,
    latest_checkpoint,
    read_run_state,
    write_run_state,
)
from flanmoe.training.rows import FixedRows
from flanmoe.training.sharding import layers_of
from flanmoe.training.trainer import SparseTrainer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "sharded_runs.py"
Weights = dict[str, torch.Tensor]
ROUTER = {"balance_coefficient": 0.5, "z_coefficient": 0.1}
MODELS = {"tied": "granitemoe"}
SCOPES = {"global": "global", "lagged": "lagged", "tied": "global", "recomputed": "lagged"}
LEARNING_RATE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def both(
    folder: Path,
    packed_rows: Callable[..., list[Packed]],
    in_two_processes: Callable[..., None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of the two processes found."""
    (folder / "rows").write_bytes(pickle.dumps(packed_rows(32)))
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{2 * n}"} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    in_two_processes(SCRIPT, folder)
    first, second = (torch.load(folder / f"out-{rank}.pt") for rank in range(2))
    return first, second


@pytest.fixture(scope="module")
def found(both: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return both[0]


def assert_same(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def largest_difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", SCOPES)
def test_gradients_equal_those_of_one_process(
    name: str,
    found: dict[str, Any],
    packed_rows: Callable[..., list[Packed]],
    gradients_of: Callable[..., list[Weights]],
) -> None:
    expected = gradients_of(
        tiny_model(MODELS.get(name, "mixtral")).double(),
        packed_rows(32),
        steps=2,
        rows_per_step=8,
        micro_batch_rows=2,
        router={**ROUTER, "scope": SCOPES[name]},
    )
    for one, other in zip(found["gradients"][name]["gradients"], expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            difference = (one[key] - value).abs().max() / value.abs().max()
            assert float(difference) < 1e-10, key


@pytest.mark.parametrize("name", SCOPES)
def test_each_process_holds_half_of_every_weight(name: str, both: tuple[dict, dict]) -> None:
    names = [key for key, _ in tiny_model(MODELS.get(name, "mixtral")).named_parameters()]
    for found in both:
        assert found["gradients"][name]["shares"] == dict.fromkeys(names, 0.5)
        # So are gradients between the two micro-batches of a step.
        assert found["gradients"][name]["early shares"] == {0.5}


@pytest.mark.parametrize(
    "name", ["float32", "bfloat16", "recomputed", "frozen gate", "frozen rest"]
)
def test_weights_equal_those_without_sharding(name: str, found: dict[str, Any]) -> None:
    # Two processes add two gradients in either order to the same sum, and halving is exact.
    sharded, plain = (found["weights"][f"{name}, {kind}"] for kind in ("fsdp", "none"))
    assert_same(sharded["weights"], plain["weights"])
    # The squares of a norm are added up in another order: a few roundings of float32.
    assert sharded["norms"] == pytest.approx(plain["norms"], rel=1e-6)
    assert sharded["shares"]
    assert not plain["shares"]


def test_bfloat16_was_part_of_it(found: dict[str, Any]) -> None:
    runs = [found["weights"][f"{name}, fsdp"]["weights"] for name in ("bfloat16", "float32")]
    assert largest_difference(*runs) > LEARNING_RATE / 10


@pytest.mark.parametrize(
    ("name", "trains"),
    [
        ("frozen gate", lambda key: ".gate." not in key),
        ("frozen rest", lambda key: ".mlp." in key),
    ],
)
def test_frozen_weights_stay(
    name: str, trains: Callable[[str], bool], found: dict[str, Any]
) -> None:
    before = tiny_model("mixtral").state_dict()
    after = found["weights"][f"{name}, fsdp"]["weights"]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if trains(key)}


def test_gradients_are_clipped_by_their_whole_norm(found: dict[str, Any]) -> None:
    sharded, plain = (found["weights"][f"clipped, {kind}"] for kind in ("fsdp", "none"))
    assert sharded["norms"] == pytest.approx(plain["norms"], rel=1e-6)
    assert min(plain["norms"]) > 0.1
    unclipped = found["weights"]["float32, fsdp"]["weights"]
    difference = largest_difference(sharded["weights"], plain["weights"])
    assert difference < largest_difference(sharded["weights"], unclipped) / 100


def test_weights_equal_those_of_one_process(
    found: dict[str, Any], packed_rows: Callable[..., list[Packed]], tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    config = TuneConfig.parse(
        {
            "steps": 4,
            "rows_per_step": 8,
            "micro_batch_rows": 4,
            "learning_rate": LEARNING_RATE,
            "precision": "float32",
            "max_grad_norm": 0.0,
        }
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = SparseTrainer(
        model,
        training_arguments(config, tmp_path, SeedTree(0)),
        stream=FixedRows(packed_rows(32)),
        router=config.router,
    )
    trainer.train()
    trainer.close()
    sharded = found["weights"]["float32, fsdp"]["weights"]
    moved = largest_difference(model.state_dict(), before)
    assert moved > LEARNING_RATE
    # AdamW divides a gradient by its own size, so what rounding does to a small one (1e-7 of the
    # largest) counts in full: a hundredth of what the weights moved is far above that, and far below
    # what a wrong factor of the loss or a lost micro-batch would do.
    assert largest_difference(sharded, model.state_dict()) < moved / 100


def test_both_processes_get_the_weights_back(both: tuple[dict, dict]) -> None:
    first, second = both
    for name, run in first["weights"].items():
        assert_same(run["weights"], second["weights"][name]["weights"])
    for name, run in first["resumed"].items():
        assert_same(run["whole"], second["resumed"][name]["whole"])


@pytest.mark.parametrize("name", ["fsdp", "fsdp global", "none"])
def test_resumed_equals_uninterrupted(name: str, found: dict[str, Any]) -> None:
    run = found["resumed"][name]
    assert_same(run["resumed"], run["whole"])
    assert_same(run["restored"], run["whole"])
    assert [row["step"] for row in run["rows"]] == [1, 2, 3, 4, 5, 6]
    assert run["rows again"] == run["rows"]
    before = tiny_model("mixtral").state_dict()
    assert largest_difference(run["whole"], before) > LEARNING_RATE


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_model])
def test_a_sharded_checkpoint_is_a_plain_model(
    load: Callable[..., PreTrainedModel], found: dict[str, Any], folder: Path
) -> None:
    run = found["resumed"]["fsdp"]
    model = load(str(folder / "fsdp" / "finished"))
    assert type(model) is type(tiny_model("mixtral"))
    assert model.config.architectures == ["MixtralForCausalLM"]
    assert_same(model.state_dict(), run["whole"])
    if load is load_model:
        with torch.no_grad():
            assert torch.equal(model(input_ids=run["ids"]).logits, run["logits"])


def test_experts_have_their_names_on_disk(found: dict[str, Any], folder: Path) -> None:
    with safe_open(folder / "fsdp" / "finished" / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
    for layer, expert, matrix in ((0, 0, "w1"), (1, 7, "w2"), (1, 3, "w3")):
        name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
        assert name in names


@pytest.mark.parametrize("name", ["fsdp", "none"])
def test_a_checkpoint_holds_the_files_of_both_processes(
    name: str, found: dict[str, Any], folder: Path
) -> None:
    checkpoint = latest_checkpoint(folder / name)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-6"
    written = set(json.loads((checkpoint / "complete.json").read_text())["files"])
    optimizer = {"optimizer.pt"}
    if name == "fsdp":
        optimizer = {f"optimizer/{part}" for part in (".metadata", "__0_0.distcp", "__1_0.distcp")}
    assert written == optimizer | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "rng_state_0.pth",
        "rng_state_1.pth",
        "run_state.json",
        "run_state_1.json",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
    }


def test_what_cannot_be_resumed_is_said_in_every_process(
    both: tuple[dict, dict], folder: Path
) -> None:
    for found in both:
        assert found["refusals"] == {
            "other shape": (
                f"The checkpoint {folder / 'fsdp' / 'finished'} must hold the model that is to be "
                "trained, but 6 tensors differ, the first is "
                "model.layers.0.mlp.experts.down_proj. Start a new run."
            ),
            "other sharding": (
                f"The checkpoint {folder / 'fsdp' / 'checkpoints' / 'checkpoint-6'} was written by "
                "2 processes with `sharding: fsdp`, but resumed by 2 processes with "
                "`sharding: none`. Resume as the run was started."
            ),
        }


def test_an_error_reaches_every_process_and_nothing_waits(both: tuple[dict, dict]) -> None:
    for found in both:
        assert found["failure"] == {
            "text": (
                "Training needs a finite loss, but that of step 1 is nan. Lower `learning_rate` or "
                "`max_grad_norm`; the last checkpoint is good."
            ),
            "left": 0,
        }


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    two = Layout(num_processes=2)
    for process in range(2):
        state = RunState(rows_trained=7 + process, stream={}, scope={}, callbacks={}, layout=two)
        write_run_state(tmp_path, state, process=process)
    assert read_run_state(tmp_path, layout=two, process=1).rows_trained == 8
    with pytest.raises(RunError) as caught:
        read_run_state(tmp_path)
    assert str(caught.value) == (
        f"The checkpoint {tmp_path} was written by 2 processes with `sharding: none`, but resumed "
        "by 1 process with `sharding: none`. Resume as the run was started."
    )


def test_one_process_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        training_arguments(TuneConfig(sharding="fsdp"), tmp_path, SeedTree(0))
    assert str(caught.value) == (
        "`sharding: fsdp` needs at least 2 processes to spread the model over, but there is 1. "
        "Start a script with `torchrun --nproc-per-node 2` (`docs/guide/distributed.md`), or set "
        "`sharding: none`."
    )


@pytest.mark.parametrize("name", ["mixtral", "llama", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_layers_are_found_by_their_number(name: str) -> None:
    model = tiny_model(name)
    assert layers_of(model) == list(model.model.layers)
    model.config.num_hidden_layers = 40
    with pytest.raises(ModelError) as caught:
        layers_of(model)
    found = len(model.model.layers)
    assert str(caught.value) == (
        "`sharding: fsdp` needs a model with a list of its 40 layers, but the lists of "
        f"{type(model).__name__} have the lengths [{found}]. Set `sharding: none`."
    )
