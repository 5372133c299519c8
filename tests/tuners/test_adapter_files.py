"""Adapters on disk against PEFT itself: ours read by it, its own read by us, and everything refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, NemotronHConfig, PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.compute.low_rank import LowRankFactors
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.tuners.adapter_loading import load_adapter
from flanmoe.tuners.adapter_saving import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from flanmoe.tuners.low_rank import LowRankConfig, LowRankTuner, attach_low_rank
from flanmoe.tuners.peft_layout import PeftScale, common_scale, fill, to_peft

FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def drawn(tuner: LowRankTuner) -> LowRankTuner:
    """Random numbers in everything that trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuner.trained.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tuner


def ours(name: str, **settings: Any) -> LowRankTuner:
    """A tiny model with a tuner that holds random changes."""
    config = LowRankConfig.parse({"kind": "low_rank", **settings})
    return drawn(attach_low_rank(tiny_model(name), config, torch.Generator().manual_seed(0)))


def native(name: str) -> PreTrainedModel:
    """The plain model on transformers' own path, which is all that PEFT needs."""
    model = tiny_model(name)
    model.set_experts_implementation("eager")
    return model


def read_by_peft(name: str, folder: Path) -> Any:
    """The plain model with an adapter, by PEFT; what it warns of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return PeftModel.from_pretrained(native(name), str(folder))


def peft_trained(name: str, folder: Path, **settings: Any) -> Any:
    """A PEFT model with random changes, saved to a folder."""
    values = {"r": 4, "lora_alpha": 6, "target_modules": [], "target_parameters": BOTH}
    config = LoraConfig(**{**values, **settings}, init_lora_weights=False)
    with warnings.catch_warnings():
        # PEFT says of the ranks that it gives fused experts itself that they match nothing.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match any")
        model = get_peft_model(native(name), config)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return model.eval()


ADAPTERS: dict[str, dict[str, Any]] = {
    "both": {"rank": 4, "alpha": 6.0},
    "down alone, rsLoRA": {"rank": 3, "matrices": ["down"], "rank_stabilised": True},
    "gate and up alone": {"rank": 2, "alpha": 2.5, "matrices": ["gate_up"]},
    "uneven ranks": {"rank": [1, 2, 0, 4, 3, 4, 0, 2], "alpha": 5.0},
    "shared A": {"rank": 3, "shared_a": True},
    "shared A, uneven ranks": {"rank": [1, 2, 0, 4, 3, 4, 0, 2], "shared_a": True},
    "with linear layers": {"rank": 4, "linear": {"targets": ["q_proj", "o_proj"], "rank": 2}},
    "with routers": {"rank": 4, "alpha": 6.0, "linear": {"router": True, "rank": 6, "alpha": 3.0}},
}


# Every family, and every kind of adapter on the one whose experts are stored transposed, with biases.
CASES = [
    *((family, "both") for family in FAMILIES),
    *(("gpt_oss", adapter) for adapter in ADAPTERS if adapter != "both"),
]


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_peft_computes_the_same_with_what_we_save(
    family: str, adapter: str, tmp_path: Path, logits: Any
) -> None:
    tuner = ours(family, **ADAPTERS[adapter])
    tuner.save(tmp_path)
    expected = logits(tuner.model)
    found = logits(read_by_peft(family, tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # The adapter does something, and comes back to us as well.
    assert (expected - logits(tiny_model(family))).abs().max() > 0.1
    again = load_adapter(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(again.model), expected, rtol=1e-4, atol=1e-4)


TRAINED: dict[str, dict[str, Any]] = {
    "both": {},
    "down alone": {"target_parameters": ["experts.down_proj"]},
    "gate and up alone, rsLoRA": {"target_parameters": ["gate_up_proj"], "use_rslora": True},
    "with linear layers": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 9},
    },
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "both") for family in FAMILIES),
        *(("gpt_oss", kind) for kind in TRAINED if kind != "both"),
    ],
)
def test_we_compute_the_same_with_what_peft_trained(
    family: str, kind: str, tmp_path: Path, logits: Any
) -> None:
    expected = logits(peft_trained(family, tmp_path, **TRAINED[kind]))
    tuner = load_adapter(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(tuner.model), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(tiny_model(family))).abs().max() > 0.1
    # Saved again, it is what it was, and takes as much room.
    tuner.save(tmp_path / "again")
    torch.testing.assert_close(
        load_file(tmp_path / "again" / ADAPTER_WEIGHTS), load_file(tmp_path / ADAPTER_WEIGHTS)
    )
    torch.testing.assert_close(
        logits(read_by_peft(family, tmp_path / "again")), expected, rtol=1e-4, atol=1e-4
    )


def test_old_names_of_mixtrals_experts_are_read_as_peft_saves_them(
    tmp_path: Path, logits: Any
) -> None:
    settings = {"target_modules": ["w1", "w2", "w3"], "target_parameters": None}
    expected = logits(peft_trained("mixtral", tmp_path, **settings))
    tuner = load_adapter(tiny_model("mixtral"), tmp_path)
    torch.testing.assert_close(logits(tuner.model), expected, rtol=1e-4, atol=1e-4)


def test_one_rank_is_saved_as_it_is(tmp_path: Path) -> None:
    tuner = ours("olmoe", rank=4, alpha=6.0)
    tuner.save(tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, False)
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == []
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    # Inner wrapper first: gate_up is registered before down.
    path = "base_model.model.model.layers.1.mlp.experts"
    factors = tuner.changes["model.layers.1.mlp"].gate_up
    assert factors is not None
    assert torch.equal(tensors[f"{path}.base_layer.lora_A.weight"], factors.a)
    b = tensors[f"{path}.base_layer.lora_B.weight"].view(48, 4, 8)
    for expert in range(8):
        assert torch.equal(b[:, :, expert].T, factors.of_expert(expert).b)


def test_layers_without_a_change_are_not_named(tmp_path: Path, logits: Any) -> None:
    tuner = ours("mixtral", rank={"model.layers.1.mlp": 4})
    tuner.save(tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert config["target_parameters"] == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    found = logits(read_by_peft("mixtral", tmp_path))
    torch.testing.assert_close(found, logits(tuner.model), rtol=1e-4, atol=1e-4)


def test_a_shared_expert_goes_there_and_back(tmp_path: Path, logits: Any) -> None:
    targets = ["shared_expert.gate_proj", "shared_expert.down_proj"]
    tuner = ours("qwen2_moe", rank=2, linear={"targets": targets, "rank": 3})
    tuner.save(tmp_path)
    found = logits(read_by_peft("qwen2_moe", tmp_path))
    torch.testing.assert_close(found, logits(tuner.model), rtol=1e-4, atol=1e-4)
    again = load_adapter(tiny_model("qwen2_moe"), tmp_path)
    assert again.linear.layers.keys() == tuner.linear.layers.keys()


def nemotron_h() -> PreTrainedModel:
    """A native family whose experts have no gate: their first matrices are called `up_proj`."""
    config = NemotronHConfig(
        vocab_size=128,
        hidden_size=32,
        layers_block_type=["attention", "moe", "attention", "moe"],
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_group=1,
        topk_group=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def test_experts_without_a_gate_go_there_and_back(tmp_path: Path, logits: Any) -> None:
    model = nemotron_h()
    model.set_experts_implementation("flanmoe")
    config = LowRankConfig(kind="low_rank", rank=2)
    tuner = drawn(attach_low_rank(model, config, torch.Generator().manual_seed(0)))
    tuner.save(tmp_path)
    expected = logits(model)
    found = logits(PeftModel.from_pretrained(nemotron_h(), str(tmp_path)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = nemotron_h()
    plain.set_experts_implementation("flanmoe")
    assert (expected - logits(plain)).abs().max() > 0.1
    torch.testing.assert_close(logits(load_adapter(plain, tmp_path).model), expected)
    report = tuner.merge()
    assert report.changed == 16


def test_the_layout_goes_there_and_back() -> None:
    factors = LowRankFactors(
        (2, 2, 2),
        alpha=3.0,
        rank_stabilised=False,
        inputs=4,
        outputs=5,
        shared_a=False,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    before = {name: value.detach().clone() for name, value in factors.named_parameters()}
    saved = common_scale([factors])
    assert saved == PeftScale(2, 3.0)
    a, b = to_peft(factors, saved)
    fill(factors, a, b)
    for name, value in factors.named_parameters():
        assert torch.equal(value, before[name])


# ---- What is refused ----


def changed_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file(change(tensors), folder / ADAPTER_WEIGHTS)


def refusal(name: str, folder: Path) -> str:
    model = tiny_model(name)
    before = [id(module) for module in model.modules()]
    with pytest.raises(ModelError) as error:
        load_adapter(model, folder)
    assert [id(module) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(error.value)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    assert refusal("mixtral", tmp_path) == (
        f"An adapter folder must hold adapter_config.json, but {tmp_path} has none. Name a folder that PEFT or "
        "flanmoe wrote."
    )


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    ours("olmoe", rank=2).save(tmp_path)
    assert refusal("mixtral", tmp_path) == (
        "An adapter of model.layers.0.mlp.experts.gate_up_proj must hold matrices of shapes (rank x 8, 32) and "
        "(128, rank x 8), but holds (16, 32) and (48, 16). Name the model that it was trained on."
    )


def test_an_adapter_of_layers_that_are_not_there(tmp_path: Path) -> None:
    ours("granitemoe", rank=2).save(tmp_path)
    assert refusal("mixtral", tmp_path) == (
        "An adapter must be of experts, linear layers and routers of the model, but holds a change of "
        "model.layers.0.block_sparse_moe.experts, which is not there. Name the model that it was trained on."
    )


def test_an_adapter_with_more_than_pairs(tmp_path: Path) -> None:
    ours("olmoe", rank=2).save(tmp_path)
    name = "base_model.model.model.layers.0.mlp.experts.lora_B.bias"
    changed_tensors(tmp_path, lambda tensors: {**tensors, name: torch.zeros(3)})
    assert refusal("olmoe", tmp_path) == (
        f"An adapter must hold pairs of `lora_A` and `lora_B` alone, but {tmp_path} also holds or lacks "
        f"`{name}`. Biases, DoRA and whole modules are not read; use it with PEFT."
    )


def test_an_adapter_that_lacks_a_parameter(tmp_path: Path) -> None:
    ours("olmoe", rank=2).save(tmp_path)
    wrapped = "layers.0.mlp.experts.base_layer"
    changed_tensors(tmp_path, lambda all: {n: v for n, v in all.items() if wrapped not in n})
    assert refusal("olmoe", tmp_path) == (
        "An adapter must hold 1 pair of matrices for each parameter of model.layers.0.mlp.experts that its "
        "`target_parameters` name, which are `gate_up_proj`, `down_proj`, but holds 1. It was trained on "
        "experts that are stored in another way; load it with PEFT and save it again."
    )


def test_experts_that_run_something_else(tmp_path: Path) -> None:
    ours("olmoe", rank=2).save(tmp_path)
    with pytest.raises(
        ModelError, match=r"run flanmoe.s compute, but those of model\.layers\.0\.mlp run `eager`"
    ):
        load_adapter(native("olmoe"), tmp_path)


def test_every_sparse_block_has_a_path_of_its_own() -> None:
    # Saving names experts by their modules.
    for family in FAMILIES:
        model = tiny_model(family)
        experts = {id(block.experts) for block in moe_blocks(model)}
        assert len([name for name, m in model.named_modules() if id(m) in experts]) == len(experts)
