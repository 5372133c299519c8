"""`flanmoe upcycle` on a T5: what it writes and says, and what it refuses on either kind of base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flanmoe.cli.main import invoke
from flanmoe.core.rundir import RunDir
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_model
from flanmoe.testing.tiny_models import tiny_model, tiny_text_tokenizer

ObjectOf = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 of four layers with its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("models") / "t5"
    tiny_model("t5", num_layers=4).save_pretrained(folder)
    tiny_text_tokenizer().save_pretrained(folder)
    return folder


def blocks_of(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Router, number of experts and top_k of each sparse block."""
    return {
        block.name: (type(block.router).__name__, block.num_experts, block.top_k)
        for block in moe_blocks(load_model(str(folder)))
    }


def test_a_t5_with_the_routers_of_flan_ec(t5: Path, tmp_path: Path, object_of: ObjectOf) -> None:
    out = tmp_path / "sparse"
    arguments = ["--encoder-router", "expert_choice", "--decoder-router", "top_k"]
    said = object_of(
        ["upcycle", str(t5), str(out), *arguments, "--num-experts", "4", "--seed", "3"]
    )
    assert not said["exact"]
    assert said["step0_max_abs_diff"] > 1e-3
    assert said["sparse"]["total"] > said["dense"]["total"]
    assert blocks_of(out) == {
        **{f"encoder.block.{i}.layer.1.mlp": ("ExpertChoiceRouter", 4, 0) for i in (1, 3)},
        **{f"decoder.block.{i}.layer.2.mlp": ("TopKRouter", 4, 2) for i in (1, 3)},
    }
    written = RunDir(out).read_json("upcycle.json")
    assert (written["stage"], written["seed"], written["base"]) == ("upcycle_t5", 3, str(t5))
    assert written["encoder_router"]["kind"] == "expert_choice.v1"


def test_every_and_more_settings(t5: Path, tmp_path: Path, object_of: ObjectOf) -> None:
    out = tmp_path / "sparse"
    arguments = [
        "--decoder-router",
        "top_k",
        "--every",
        "4",
        "--mode",
        "granular",
        "--granularity",
        "3",
    ]
    sets = [
        "--set",
        "granularity=4",
        "--set",
        "decoder_router.top_k=4",
        "--set",
        "extra_dense_ffn=true",
    ]
    said = object_of(["upcycle", str(t5), str(out), *arguments, *sets])
    assert said["exact"]
    assert said["step0_max_abs_diff"] < 1e-3
    assert blocks_of(out) == {"decoder.block.3.layer.2.mlp": ("TopKRouter", 8, 4)}
    assert load_model(str(out)).config.extra_dense_ffn


def test_a_router_may_come_from_settings_alone(
    t5: Path, tmp_path: Path, object_of: ObjectOf
) -> None:
    sets = ["--set", "encoder_router.kind=switch", "--set", "encoder_router.num_experts=3"]
    object_of(["upcycle", str(t5), str(tmp_path / "sparse"), *sets])
    assert {number for _, number, _ in blocks_of(tmp_path / "sparse").values()} == {3}


def test_settings_of_a_decoder(base: Path, tmp_path: Path, object_of: ObjectOf) -> None:
    out = tmp_path / "sparse"
    object_of(["upcycle", str(base), str(out), "--mode", "noise", "--set", "noise_std=0.3"])
    assert RunDir(out).read_json("upcycle.json")["noise_std"] == 0.3


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            "base",
            ["--decoder-router", "top_k"],
            "Error: The base of a FlanMoeT5 must be a T5, T5.1.1 or FLAN-T5 with its head, or a dense "
            "FlanMoeT5, but it is a LlamaForCausalLM. A decoder is upcycled without `encoder_router` and "
            "`decoder_router`, by the stage `upcycle`.",
        ),
        (
            "t5",
            ["--num-experts", "4"],
            "Error: The base of the stage `upcycle` must be a decoder, but its type is `t5`. Name its routers: "
            "`encoder_router` and `decoder_router` of the stage `upcycle_t5`, `--encoder-router` and "
            "`--decoder-router` of `flanmoe upcycle`.",
        ),
        (
            "t5",
            ["--decoder-router", "top_k", "--top-k", "2"],
            "Error: `--top-k` has no effect beside `--encoder-router` and `--decoder-router`, whose routers "
            "have one of their own (`--set decoder_router.top_k=2`). Leave it out.",
        ),
        (
            "t5",
            ["--decoder-router", "topk"],
            "The router `topk` is not known. Did you mean `top_k`?",
        ),
        (
            "t5",
            ["--encoder-router", "top_k", "--set", "extra_dense=true"],
            "Did you mean `extra_dense_ffn`?",
        ),
        ("base", ["--set", "noise_sd=0.2"], "Did you mean `noise_std`?"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: str,
    arguments: list[str],
    message: str,
    t5: Path,
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    reference = {"t5": t5, "base": base}[model]
    capfd.readouterr()
    assert invoke(["upcycle", str(reference), str(tmp_path / "sparse"), *arguments]) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "sparse").exists()
