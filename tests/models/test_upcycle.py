"""Upcycling: exact modes are exact, inexact ones differ as they say, and nothing is left behind."""

import itertools

import pytest
import torch
from torch import Tensor

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_model, save_model
from flanmoe.models.upcycle import UpcycleConfig, check_step0, step0_max_abs_diff, upcycle
from flanmoe.moe.block import ExpertWeights
from flanmoe.testing.contracts import check_moe_blocks
from flanmoe.testing.tiny_models import DENSE_NAMES, tiny_model, tiny_tokenizer

_SPARSE = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}

_EXACT = (
    UpcycleConfig(),
    UpcycleConfig(num_experts=16, top_k=8, granularity=4),
    UpcycleConfig(num_experts=6, top_k=6, granularity=2),
    UpcycleConfig(num_experts=5, top_k=1, granularity=1),
    UpcycleConfig(mode="copy"),
    UpcycleConfig(mode="copy", num_experts=3, top_k=3),
    UpcycleConfig(mode="copy", top_k=1),
)
_INEXACT = (UpcycleConfig(mode="noise"), UpcycleConfig(mode="drop"))


def _tokens(rows: int = 2, length: int = 32, *, seed: int = 0) -> Tensor:
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", _EXACT, ids=lambda c: f"{c.mode}-{c.num_experts}-{c.top_k}")
@pytest.mark.parametrize("name", DENSE_NAMES)
def test_exact_modes_equal_the_dense_model_in_double_precision(
    name: str, config: UpcycleConfig
) -> None:
    dense = tiny_model(name).double()
    sparse = upcycle(dense, config, SeedTree(0))
    assert sparse.config.model_type == _SPARSE[name]
    with torch.no_grad():
        expected = dense(_tokens()).logits
        found = sparse(_tokens()).logits
    # Gates go through float32 in every native router.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DENSE_NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"rms_norm_eps": 0.3},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"head_dim": 24},
        {"hidden_act": "gelu"},
        {"num_key_value_heads": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_unusual_options_are_carried_over(name: str, options: dict) -> None:
    dense = tiny_model(name, **options)
    usual = tiny_model(name)
    sparse = upcycle(dense, UpcycleConfig(), SeedTree(0))
    assert step0_max_abs_diff(dense, sparse, _tokens()) < 1e-4
    # The option matters, or carrying it over would not be tested.
    if options not in ({"tie_word_embeddings": usual.config.tie_word_embeddings},):
        assert step0_max_abs_diff(dense, usual, _tokens()) > 1e-3


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_windows_are_carried_over(name: str) -> None:
    layers = {"qwen2": 1, "qwen3": 0}
    window = {"sliding_window": 4}
    if name != "mistral":
        window |= {"use_sliding_window": True, "max_window_layers": layers[name]}
    dense, wide = tiny_model(name, **window), tiny_model(name)
    sparse = upcycle(dense, UpcycleConfig(), SeedTree(0))
    assert step0_max_abs_diff(dense, wide, _tokens()) > 1e-3
    assert step0_max_abs_diff(dense, sparse, _tokens()) < 1e-4


def test_biases_of_qwen3_attention_are_carried_over() -> None:
    dense = tiny_model("qwen3", attention_bias=True)
    assert dense.model.layers[0].self_attn.q_proj.bias.abs().max() > 0.01
    sparse = upcycle(dense, UpcycleConfig(), SeedTree(0))
    assert step0_max_abs_diff(dense, sparse, _tokens()) < 1e-4


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("every", [2, 3])
def test_every_nth_layer(name: str, every: int) -> None:
    dense = tiny_model(name, num_hidden_layers=5)
    sparse = upcycle(dense, UpcycleConfig(every=every), SeedTree(0))
    expected = [layer for layer in range(5) if layer % every == every - 1]
    assert [block.layer for block in moe_blocks(sparse)] == expected
    assert step0_max_abs_diff(dense, sparse, _tokens()) < 1e-4


@pytest.mark.parametrize("config", [*_EXACT[:2], _EXACT[4], *_INEXACT], ids=lambda c: c.mode)
@pytest.mark.parametrize("name", DENSE_NAMES)
def test_every_expert_gets_used(name: str, config: UpcycleConfig) -> None:
    sparse = upcycle(tiny_model(name), config, SeedTree(0))
    counts = []
    for block in moe_blocks(sparse):
        block.router.register_forward_hook(
            lambda m, a, returned: counts.append(
                torch.bincount(returned[2].flatten(), minlength=config.num_experts)
            )
        )
        for index in range(block.num_experts):
            weights = block.read_expert(index)
            assert min(m.std() for m in (weights.gate, weights.up, weights.down)) > 0.01
    with torch.no_grad():
        sparse(_tokens(16, 64), use_cache=False)
    assert len(counts) == 2
    assert min(int(count.min()) for count in counts) > 0


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_the_blocks_of_the_result_keep_the_contract(name: str) -> None:
    check_moe_blocks(upcycle(tiny_model(name), UpcycleConfig(mode="drop"), SeedTree(0)))


def test_a_granular_expert_is_its_slice() -> None:
    dense = tiny_model("llama")
    sparse = upcycle(dense, UpcycleConfig(num_experts=8, top_k=4, granularity=4), SeedTree(0))
    mlp = dense.model.layers[1].mlp
    block = moe_blocks(sparse)[1]
    for index in range(8):
        units = slice(16 * (index % 4), 16 * (index % 4) + 16)
        expert = block.read_expert(index)
        assert torch.equal(expert.gate, mlp.gate_proj.weight[units])
        assert torch.equal(expert.up, mlp.up_proj.weight[units])
        assert torch.equal(expert.down, 4 * mlp.down_proj.weight[:, units])
    rows = block.router.get_parameter("weight")
    assert all(torch.equal(rows[4 * g + i], rows[4 * g]) for g in range(2) for i in range(4))
    assert not torch.equal(rows[0], rows[4])


def test_experts_of_drop_and_noise_differ_from_each_other() -> None:
    for config in _INEXACT:
        block = moe_blocks(upcycle(tiny_model("llama"), config, SeedTree(0)))[0]
        gates = [block.read_expert(index).gate for index in range(8)]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(gates, 2))


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_saved_and_loaded_it_gives_the_same_logits_to_the_bit(name: str, tmp_path) -> None:
    dense = tiny_model(name)
    dense.generation_config.max_new_tokens = 17
    sparse = upcycle(dense, UpcycleConfig(every=2 if name == "qwen3" else 1), SeedTree(0))
    save_model(sparse, tiny_tokenizer(), tmp_path)
    loaded = load_model(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(_tokens()).logits, sparse(_tokens()).logits)
    assert type(loaded) is type(sparse)
    assert loaded.generation_config.max_new_tokens == 17
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == dense.config.tie_word_embeddings


def test_the_dense_model_stays_and_shares_nothing() -> None:
    dense = tiny_model("qwen2")
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = upcycle(dense, UpcycleConfig(), SeedTree(0))
    for parameter in sparse.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_draws_depend_on_seed_layer_and_expert_only() -> None:
    dense = tiny_model("llama")
    config = UpcycleConfig(mode="noise")
    first, again = (upcycle(dense, config, SeedTree(3)) for _ in range(2))
    other = upcycle(dense, config, SeedTree(4))
    wider = upcycle(dense, UpcycleConfig(mode="noise", num_experts=9), SeedTree(3))
    blocks = [moe_blocks(model) for model in (first, again, other, wider)]
    experts = [model_blocks[1].read_expert(2).up for model_blocks in blocks]
    assert torch.equal(experts[0], experts[1])
    assert not torch.equal(experts[0], experts[2])
    assert torch.equal(experts[0], experts[3])
    assert not torch.equal(
        blocks[0][0].router.get_parameter("weight"), blocks[0][1].router.get_parameter("weight")
    )


def test_the_dtype_is_the_dense_models_and_the_check_leaves_both_as_they_are() -> None:
    dense = tiny_model("llama")
    for parameter in dense.parameters():
        # As loading in bfloat16 does it: RoPE's buffers stay in float32.
        parameter.data = parameter.data.bfloat16()
    sparse = upcycle(dense, UpcycleConfig(), SeedTree(0))
    before = [(t.dtype, t.clone()) for m in (dense, sparse) for t in _tensors(m)]
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    assert check_step0(dense, sparse, _tokens(), UpcycleConfig()) < 1e-4
    for tensor, (dtype, value) in zip([*_tensors(dense), *_tensors(sparse)], before, strict=True):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, value)


def _tensors(model: torch.nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_the_shared_expert_of_qwen2_moe_is_silent_and_stays_so() -> None:
    dense = tiny_model("qwen2")
    sparse = upcycle(dense, UpcycleConfig(), SeedTree(0)).train()
    block = sparse.model.layers[0].mlp
    assert block.shared_expert.down_proj.in_features == 1
    sparse(_tokens(), labels=_tokens()).loss.backward()
    silent = [*block.shared_expert.parameters(), *block.shared_expert_gate.parameters()]
    assert all(parameter.abs().max() == 0 for parameter in silent)
    assert all(parameter.grad.abs().max() == 0 for parameter in silent)
    assert block.gate.weight.grad.abs().max() > 0


def test_an_exact_mode_that_differs_is_refused() -> None:
    dense = tiny_model("llama")
    sparse = upcycle(dense, UpcycleConfig(), SeedTree(0))
    assert check_step0(dense, sparse, _tokens(), UpcycleConfig()) < 1e-4
    block = moe_blocks(sparse)[-1]
    weights = block.read_expert(0)
    block.write_expert(0, ExpertWeights(weights.gate, weights.up, weights.down * 1.5))
    with pytest.raises(ModelError, match=r"must equal the dense model's within 0.001 in float32, "):
        check_step0(dense, sparse, _tokens(), UpcycleConfig())
    block.write_expert(0, ExpertWeights(weights.gate, weights.up, weights.down * float("nan")))
    with pytest.raises(ModelError, match="but differ by nan"):
        check_step0(dense, sparse, _tokens(), UpcycleConfig())


@pytest.mark.parametrize("config", _INEXACT, ids=lambda c: c.mode)
def test_an_inexact_mode_prints_its_gap(config: UpcycleConfig, capsys) -> None:
    dense = tiny_model("llama")
    gap = check_step0(dense, upcycle(dense, config, SeedTree(0)), _tokens(), config)
    assert gap > 1e-2
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith(f"Mode `{config.mode}` changes the model: its logits differ")
    assert f"by up to {gap:.3g}" in printed


def test_a_single_choice_is_warned_about(capsys) -> None:
    upcycle(tiny_model("llama"), UpcycleConfig(mode="copy", top_k=1), SeedTree(0))
    printed = " ".join(capsys.readouterr().err.split())
    assert "the task's loss gives the routers no gradient" in printed


def test_a_single_choice_really_gives_routers_no_gradient_and_two_do() -> None:
    for top_k, largest in ((1, 1e-6), (2, None)):
        config = UpcycleConfig(mode="noise", top_k=top_k)
        sparse = upcycle(tiny_model("llama"), config, SeedTree(0)).train()
        sparse(_tokens(), labels=_tokens()).loss.backward()
        found = moe_blocks(sparse)[0].router.get_parameter("weight").grad.abs().max()
        assert found < largest if largest else found > 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 9}, "`top_k` must be at most `num_experts` (8), but is 9"),
        (
            {"top_k": 3},
            "`top_k` must be a multiple of `granularity` (2), but is 3: a token needs every slice "
            "of the FFN once",
        ),
        ({"num_experts": 7}, "`num_experts` must be a multiple of `granularity` (2), but is 7"),
        (
            {"noise_std": 0.3},
            "`noise_std` only has an effect in mode `noise`, but is 0.3 in mode `granular`; leave "
            "it out",
        ),
        (
            {"mode": "copy", "granularity": 4},
            "`granularity` only has an effect in mode `granular` or `sliced`",
        ),
        ({"mode": "copy", "drop_fraction": 0.1}, "`drop_fraction` only has an effect in mode"),
        ({"mode": "split"}, "mode: "),
        ({"num_experts": 1}, "num_experts: "),
    ],
)
def test_bad_values_are_refused_in_words(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        UpcycleConfig.parse(values)
    assert message in str(caught.value)


def test_a_resolved_config_reads_back() -> None:
    for config in (*_EXACT, *_INEXACT):
        assert UpcycleConfig.parse(config.to_mapping()) == config


def test_a_width_that_cannot_be_sliced() -> None:
    dense = tiny_model("llama", intermediate_size=66)
    with pytest.raises(ModelError) as caught:
        upcycle(dense, UpcycleConfig(top_k=4, granularity=4), SeedTree(0))
    assert str(caught.value) == (
        "The FFN's width (66) must be a multiple of `granularity`, but `granularity` is 4. Choose "
        "a divisor of the width."
    )


def test_weights_that_are_not_floating_point() -> None:
    dense = tiny_model("llama")
    norm = dense.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"needs floating-point weights, but model\.norm\.weight"):
        upcycle(dense, UpcycleConfig(), SeedTree(0))


def test_parts_that_the_sparse_class_does_not_have() -> None:
    dense = tiny_model("llama")
    dense.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ModelError, match=r"do not share `model.layers.0.self_attn.q_proj.bias`"):
        upcycle(dense, UpcycleConfig(), SeedTree(0))
