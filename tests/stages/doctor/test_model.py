"""What the doctor says about a named model: sound ones of several families, and one for each fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.meta import meta_model
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.stages.doctor import model as model_module
from flanmoe.stages.doctor import model_weights
from flanmoe.stages.doctor.check import Finding, run_check
from flanmoe.stages.doctor.lora_targets import adapt
from flanmoe.stages.doctor.model import ModelInQuestion, model_checks
from flanmoe.stages.doctor.model_targets import expert_tensors
from flanmoe.testing.tiny_models import SPARSE_NAMES, tiny_model

Examine = Callable[[PreTrainedModel], dict[str, Finding]]


@pytest.fixture
def examine(tmp_path: Path) -> Examine:
    """Saves a model and runs every check on what was saved."""

    def run(model: PreTrainedModel) -> dict[str, Finding]:
        model.save_pretrained(tmp_path)
        checks = model_checks(ModelInQuestion.load(str(tmp_path)))
        return {check.name: run_check(check) for check in checks}

    return run


def statuses(findings: dict[str, Finding]) -> dict[str, str]:
    return {name.removeprefix("model_"): finding.status for name, finding in findings.items()}


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_sound_models_of_every_family(name: str, examine: Examine) -> None:
    found = examine(tiny_model(name))
    said = statuses(found)
    leaks = name == "gpt_oss"
    assert said["packing"] == ("defect" if leaks else "ok"), found["model_packing"].detail
    for sound in ("blocks", "expert_counts", "weights_dtype", "finite_weights", "router_rows"):
        assert said[sound] == "ok", (sound, found[f"model_{sound}"].detail)
    assert said["experts"] == "ok", found["model_experts"].detail
    assert "error" not in said.values()


def flan_moe_t5() -> PreTrainedModel:
    torch.manual_seed(0)
    router = {"kind": "switch.v1", "num_experts": 4}
    config = FlanMoeT5Config(
        vocab_size=64,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_heads=4,
        num_layers=2,
        encoder_router={**router, "capacity": {"group": "segment"}},
        decoder_router={**router, "num_experts": 2, "capacity": {"group": "segment"}},
    )
    return FlanMoeT5ForConditionalGeneration(config)


def test_an_encoder_decoder_of_ours(examine: Examine) -> None:
    found = examine(flan_moe_t5())
    said = statuses(found)
    assert said["blocks"] == said["packing"] == said["router_rows"] == "ok"
    assert said["balance_loss"] == said["experts"] == "skipped"
    counts = found["model_expert_counts"]
    assert (counts.status, counts.figure) == ("note", 2)
    assert "error" not in said.values()


def test_a_dense_model_is_said_to_be_dense(examine: Examine) -> None:
    found = examine(tiny_model("llama"))
    blocks = found["model_blocks"]
    assert (blocks.status, blocks.figure) == ("note", 0)
    assert blocks.detail == "LlamaForCausalLM is dense."
    assert "`flanmoe upcycle`" in blocks.way_out
    assert found["model_packing"].status == found["model_finite_weights"].status == "ok"
    of_experts = [f for name, f in found.items() if "lora" in name or "router" in name]
    assert {finding.status for finding in of_experts} == {"skipped"}
    assert {finding.detail for finding in of_experts} == {"There are no sparse blocks."}


def test_a_native_switch_is_not_taken_for_a_dense_model(examine: Examine) -> None:
    blocks = examine(tiny_model("switch_transformers"))["model_blocks"]
    assert (blocks.status, blocks.figure, blocks.expected) == ("defect", 0, 2)
    assert blocks.detail == (
        "SwitchTransformersForConditionalGeneration keeps experts as 2 separate groups of modules."
    )


def test_blocks_that_cannot_be_read_are_a_finding(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(model: Any) -> Any:
        raise ModelError("flanmoe cannot read this architecture yet.")

    monkeypatch.setattr(model_module, "moe_blocks", unreadable)
    found = examine(tiny_model("mixtral"))
    blocks = found["model_blocks"]
    assert blocks.status == "defect"
    assert blocks.detail == "flanmoe cannot read this architecture yet."
    assert found["model_packing"].detail == blocks.detail
    assert found["model_packing"].status == "skipped"


def test_without_room_for_the_weights_only_shapes_are_looked_at(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoMemory:
        available = 1000

    monkeypatch.setattr(model_module.psutil, "virtual_memory", lambda: NoMemory)
    found = examine(tiny_model("mixtral"))
    said = statuses(found)
    assert said["blocks"] == "ok"
    assert said["lora_router"] == "defect"
    assert {said[name] for name in ("packing", "weights_dtype", "finite_weights")} == {"skipped"}
    assert "0.0 GB are free: only shapes were looked at." in found["model_packing"].detail


def test_weights_that_are_not_finite_are_counted(examine: Examine) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        moe_blocks(model)[1].router.get_parameter("weight")[2, :3] = float("nan")
        model.lm_head.weight[0, 0] = float("inf")
    found = examine(model)["model_finite_weights"]
    assert (found.status, found.figure) == ("defect", 4)
    assert found.detail.startswith("In 2 tensors, the first ")
    assert found.detail.endswith("; in routers 3.")


def test_router_rows_that_cannot_tell_experts_apart_are_counted(examine: Examine) -> None:
    model = tiny_model("mixtral")
    first, second = (block.router.get_parameter("weight") for block in moe_blocks(model))
    with torch.no_grad():
        first[3] = 0
        second[5] = second[1]
        second[6] = second[1]
    found = examine(model)["model_router_rows"]
    assert (found.status, found.figure) == ("defect", 4)
    assert found.detail == "model.layers.0.mlp: 1; model.layers.1.mlp: 3"


def test_a_model_right_after_upcycling_is_no_defect(examine: Examine) -> None:
    sparse = upcycle(tiny_model("llama"), UpcycleConfig(), SeedTree(0))
    found = examine(sparse)["model_router_rows"]
    assert (found.status, found.figure) == ("note", sum(b.num_experts for b in moe_blocks(sparse)))
    with torch.no_grad():
        router = moe_blocks(sparse)[0].router.get_parameter("weight")
        router.copy_(torch.randn(router.shape))
    assert examine(sparse)["model_router_rows"].status == "defect"


def test_the_share_of_weights_that_bfloat16_holds_fast(examine: Examine) -> None:
    model = tiny_model("mixtral").to(torch.bfloat16)
    found = examine(model)["model_weights_dtype"]
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters() if p.ndim > 1])
    # bfloat16 keeps 8 bits: in [2^n, 2^(n+1)) numbers lie 2^(n-7) apart.
    spacing = 2.0 ** (weights.abs().log2().floor() - 7)
    same = (spacing / 2 > 2e-5).double().mean()
    assert found.status == "note"
    assert found.figure == pytest.approx(float(same), abs=0.005)
    assert found.detail == "Written in bfloat16."


@pytest.mark.parametrize(("on", "share", "status"), [(False, 0.0, "note"), (True, 1.0, "ok")])
def test_whether_the_models_own_balance_loss_is_on(
    on: bool, share: float, status: str, examine: Examine
) -> None:
    model = tiny_model("olmoe", output_router_logits=on, router_aux_loss_coef=0.5)
    found = examine(model)["model_balance_loss"]
    assert (found.status, found.figure) == (status, pytest.approx(share, abs=1e-6))
    assert found.detail == (
        "`router_aux_loss_coef` is 0.5. Even use scores 4.00 with 4 experts a token: all choices are counted, "
        "`convention: huggingface`."
    )


def test_a_coefficient_of_zero_is_no_loss(examine: Examine) -> None:
    found = examine(tiny_model("mixtral", router_aux_loss_coef=0.0))["model_balance_loss"]
    assert found.status == "skipped"
    assert found.detail == "`router_aux_loss_coef` is 0: nothing is added."


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    asked = ModelInQuestion.load(str(tmp_path))
    before = {name: value.clone() for name, value in asked.with_weights().state_dict().items()}
    for check in model_checks(asked):
        run_check(check)
    after = asked.with_weights()
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())
    assert after.config._experts_implementation == "flanmoe"


def test_expert_compute_that_disagrees_is_a_defect(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    monkeypatch.setattr(model_weights, "EXPERTS_IMPLEMENTATION", "eager")
    assert examine(model)["model_experts"].status == "ok"
    own = model_weights._disagreement

    def disturbed(loaded: Any) -> Any:
        switch = loaded.set_experts_implementation

        def switched(name: str) -> None:
            with torch.no_grad():
                moe_blocks(loaded)[0].experts.get_parameter("down_proj").mul_(1.5)
            switch(name)

        loaded.set_experts_implementation = switched
        return own(loaded)

    monkeypatch.setattr(model_weights, "_disagreement", disturbed)
    found = examine(model)["model_experts"]
    assert found.status == "defect"
    assert found.figure is not None
    assert found.figure > 0.05


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_the_way_out_names_tensors_that_peft_finds(name: str) -> None:
    model = tiny_model(name)
    names = expert_tensors(moe_blocks(model))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], target_parameters=names)
    adapted = peft.get_peft_model(model, config)
    trained = [key for key, value in adapted.named_parameters() if value.requires_grad]
    in_experts = [key for key in trained if ".experts." in key and "lora_A" in key]
    assert len(in_experts) == 2 * len(moe_blocks(tiny_model(name)))


def test_adapters_are_counted_alike_with_and_without_weights() -> None:
    from_weights = adapt(tiny_model("mixtral"), "all-linear")
    assert adapt(meta_model(tiny_model("mixtral").config), "all-linear") == from_weights


def test_a_folder_without_a_model_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold a config\.json"):
        ModelInQuestion.load(str(tmp_path))
