"""`flanmoe export` on tiny saved models: one JSON object on stdout, one sentence with every reason, exit 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from flanmoe.cli.main import invoke
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.testing.tiny_models import tiny_text_tokenizer

ObjectOf = Callable[[list[str]], dict[str, Any]]


def saved(folder: Path, **values: Any) -> str:
    torch.manual_seed(0)
    router = {"kind": "switch.v1", "num_experts": 3}
    config = FlanMoeT5Config(
        vocab_size=128,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_heads=4,
        num_layers=2,
        encoder_router=router,
        decoder_router=router,
        **{"feed_forward_proj": "relu", **values},
    )
    FlanMoeT5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_text_tokenizer().save_pretrained(folder)
    return str(folder)


def test_it_says_how_far_what_it_wrote_is_from_the_model(
    tmp_path: Path, object_of: ObjectOf
) -> None:
    out = tmp_path / "out"
    said = object_of(["export", saved(tmp_path / "model"), str(out)])
    assert said["model"] == str(out)
    assert said["format"] == "SwitchTransformersForConditionalGeneration"
    assert 0 <= said["largest_logit_difference"] < 1e-4
    assert len(said["deviations"]) == 2
    assert AutoModelForSeq2SeqLM.from_pretrained(out).config.num_experts == 3


def test_people_are_told_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert invoke(["export", saved(tmp_path / "model"), str(out)]) == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "exporting: 3/3 parts" in printed.err
    assert "largest logit difference after reloading" in printed.err
    assert f"Written to {out} as SwitchTransformersForConditionalGeneration." in printed.err


def test_every_reason_is_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model", feed_forward_proj="gated-gelu", tied_head=True)
    capfd.readouterr()
    assert invoke(["export", model, str(tmp_path / "out"), "--json"]) == 2
    printed = capfd.readouterr()
    said = json.loads(printed.out)
    assert said["exit_status"] == 2
    assert "2 things have no counterpart there: (1) `feed_forward_proj`" in said["error"]
    assert "(2) `tied_head` is true and `scale_decoder_outputs` false" in said["error"]
    assert printed.err == f"Error: {said['error']}\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_files_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert invoke(["export", str(tmp_path / "model"), str(tmp_path)]) == 2
    assert capfd.readouterr().err == (
        f"Error: The folder {tmp_path} must be empty or new, but already holds files. "
        "Name another one as OUT.\n"
    )


def test_help_shows_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke(["export", "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "Example: flanmoe export runs/flan-switch/model exported/flan-switch" in shown
