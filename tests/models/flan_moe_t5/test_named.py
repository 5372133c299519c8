"""Named shapes: the table typed again, sizes by formula, and transformers' T5 and Switch beside them."""

from typing import NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    SwitchTransformersConfig,
    T5Config,
)

from flanmoe.core.errors import ConfigError
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.configuration import SIDES
from flanmoe.models.flan_moe_t5.named import NAMED, named_config
from flanmoe.models.meta import meta_model
from flanmoe.models.plan import count_parameters
from flanmoe.moe.routers import ExpertChoiceConfig, GShardConfig, StMoeConfig, SwitchConfig


class _Row(NamedTuple):
    """One row of the table of T5X's configurations."""

    d_model: int
    d_ff: int
    heads: tuple[int, int]
    layers: int
    sparse: int
    experts: int
    train: float
    evaluation: float
    group: int
    z: float = 0.0
    minimum: int = 4


_ROWS = {
    "switch_base": _Row(768, 3072, (12, 64), 12, 6, 128, 1.25, 2.0, 8192),
    "switch_large": _Row(1024, 4096, (16, 64), 24, 12, 128, 1.25, 2.0, 4096),
    "switch_xxl": _Row(4096, 10240, (64, 64), 24, 12, 128, 1.25, 4.0, 4096, minimum=2),
    "tokens_choose_tiny": _Row(32, 64, (6, 64), 2, 1, 8, 1.25, 2.0, 4096),
    "tokens_choose_base": _Row(768, 2048, (12, 64), 12, 3, 64, 1.25, 2.0, 4096),
    "tokens_choose_large": _Row(1024, 2816, (16, 64), 24, 6, 64, 1.25, 2.0, 4096),
    "tokens_choose_xl": _Row(2048, 5120, (32, 64), 24, 6, 64, 1.25, 2.0, 4096),
    "tokens_choose_xxl": _Row(4096, 10240, (64, 64), 24, 6, 64, 1.25, 2.0, 4096),
    "experts_choose_tiny": _Row(32, 64, (6, 64), 2, 1, 8, 1.0, 1.0, 4096),
    "experts_choose_base": _Row(768, 2048, (12, 64), 12, 6, 64, 1.0, 1.0, 4096),
    "experts_choose_large": _Row(1024, 2816, (16, 64), 24, 12, 64, 1.0, 1.0, 4096),
    "experts_choose_xl": _Row(2048, 5120, (32, 64), 24, 12, 64, 1.0, 1.0, 4096),
    "experts_choose_xxl": _Row(4096, 10240, (64, 64), 24, 12, 64, 1.0, 1.0, 4096),
    "st_moe_base": _Row(768, 2048, (12, 64), 12, 3, 16, 1.25, 2.0, 4096, z=1e-4),
    "st_moe_xl": _Row(2048, 5120, (32, 64), 24, 6, 16, 2.0, 4.0, 1024, z=1e-4),
    "st_moe_32b": _Row(5120, 20480, (64, 128), 24, 6, 64, 1.25, 2.0, 4096, z=1e-3),
}
_SIZES = {
    "switch_base": 7.42,
    "switch_large": 26.3,
    "switch_xxl": 394.7,
    "tokens_choose_base": 2.03,
    "tokens_choose_large": 7.32,
    "tokens_choose_xl": 26.6,
    "tokens_choose_xxl": 106.3,
    "experts_choose_base": 3.82,
    "experts_choose_large": 13.9,
    "experts_choose_xl": 50.4,
    "experts_choose_xxl": 201.4,
    "st_moe_base": 0.70,
    "st_moe_xl": 8.89,
    "st_moe_32b": 269.1,
}
_DENSE = sorted(name for name, shape in NAMED.items() if shape.dense_twin is None)


def _relu(name: str) -> bool:
    return name in ("switch_base", "switch_large")


def _total_by_hand(name: str, row: _Row) -> int:
    d, heads = row.d_model, row.heads
    attention = 4 * d * heads[0] * heads[1] + d
    matrices = (2 if _relu(name) else 3) * d * row.d_ff
    dense = matrices + d
    sparse = row.experts * matrices + d * row.experts + d
    if name.startswith("st_moe"):
        sparse += dense
    feed_forward = (row.layers - row.sparse) * dense + row.sparse * sparse
    encoder = row.layers * attention + feed_forward
    decoder = 2 * row.layers * attention + feed_forward
    rest = 2 * (32 * heads[0] + d)
    return encoder + decoder + rest + (1 if _relu(name) else 2) * 32128 * d


def test_every_row_has_its_name() -> None:
    assert sorted([*_ROWS, *_DENSE]) == sorted(NAMED)
    assert {name: NAMED[name].total_billions for name in _SIZES} == _SIZES


@pytest.mark.parametrize("name", _ROWS)
def test_sizes(name: str) -> None:
    found = count_parameters(named_config(name))
    assert found.total == found.trainable == _total_by_hand(name, _ROWS[name])
    if name in _SIZES:
        assert found.total / 1e9 == pytest.approx(_SIZES[name], rel=0.01)


@pytest.mark.parametrize("name", _ROWS)
def test_shapes_are_those_of_the_table(name: str) -> None:
    row, config = _ROWS[name], named_config(name)
    assert (config.d_model, config.d_ff, config.num_heads, config.d_kv) == (
        row.d_model,
        row.d_ff,
        *row.heads,
    )
    every = row.layers // row.sparse
    for side in SIDES:
        assert config.layers(side) == row.layers
        assert config.sparse_layers(side) == tuple(range(every - 1, row.layers, every))
    assert config.feed_forward_proj == ("relu" if _relu(name) else "gated-gelu")
    assert config.tied_head == config.scale_decoder_outputs == _relu(name)
    assert config.extra_dense_ffn == name.startswith("st_moe")
    assert NAMED[name].balance_coefficient == 0.01
    assert NAMED[name].z_coefficient == row.z


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", _ROWS)
def test_routers_are_those_of_the_table(name: str, side: str) -> None:
    row = _ROWS[name]
    router = named_config(name).router("encoder" if side == "encoder" else "decoder")
    assert router is not None
    assert router.num_experts == row.experts
    assert (router.jitter, router.init_std) == (0.0, 0.02)
    if isinstance(router, ExpertChoiceConfig):
        assert (name.startswith("experts_choose"), side) == (True, "encoder")
        assert router.capacity_factor == 1.0
        return
    kind = {"switch": SwitchConfig, "st": StMoeConfig}.get(name.split("_")[0], GShardConfig)
    assert isinstance(router, SwitchConfig | GShardConfig | StMoeConfig)
    assert type(router) is kind
    capacity = router.capacity
    assert (capacity.train, capacity.evaluation) == (row.train, row.evaluation)
    assert (capacity.minimum, capacity.group, capacity.group_size) == (
        row.minimum,
        "batch",
        row.group,
    )
    assert capacity.rounding == "nearest"
    first = name.startswith("tokens_choose") and side == "encoder"
    assert router.order == ("batch_priority" if first else "natural")
    if isinstance(router, GShardConfig):
        assert (router.normalize, router.second_choice) == (False, "all")


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", _DENSE)
def test_a_dense_shape_is_that_of_transformers_t5(name: str) -> None:
    config = named_config(name)
    shared = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    theirs = T5Config(
        **{field: getattr(config, field) for field in shared},
        feed_forward_proj=config.feed_forward_proj,
    )
    assert _shapes(meta_model(config)) == _shapes(meta_model(theirs))


def test_a_twin_is_the_shape_without_routers() -> None:
    routing = {"encoder_router", "decoder_router", "extra_dense_ffn"}
    routing |= {"encoder_sparse_every", "decoder_sparse_every"}
    for name, shape in NAMED.items():
        if shape.dense_twin is None:
            assert shape.config.encoder_router is shape.config.decoder_router is None
            continue
        sparse, dense = shape.config.to_dict(), NAMED[shape.dense_twin].config.to_dict()
        different = {key for key in sparse if sparse[key] != dense[key]}
        assert different <= routing, name


def test_switch_base_is_the_size_of_transformers_switch() -> None:
    config = named_config("switch_base")
    for side in SIDES:
        getattr(config, f"{side}_router")["num_experts"] = 8
    theirs = SwitchTransformersConfig(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_decoder_layers=12,
        num_sparse_encoder_layers=6,
        num_sparse_decoder_layers=6,
        num_heads=12,
        num_experts=8,
    )
    assert count_parameters(config) == count_parameters(theirs)


def test_a_configuration_is_a_new_one_each_time() -> None:
    first = named_config("switch_base")
    assert first.encoder_router is not None
    first.encoder_router["capacity"]["train"] = 9.0
    first.d_model = 1
    again = named_config("switch_base")
    assert again.d_model == 768
    for side in SIDES:
        router = again.router(side)
        assert isinstance(router, SwitchConfig)
        assert router.capacity.train == 1.25


@pytest.mark.parametrize("name", ["t5_tiny", "tokens_choose_tiny", "experts_choose_tiny"])
def test_the_tiny_ones_train_and_come_back_from_their_file(name: str, tmp_path) -> None:
    named_config(name).save_pretrained(tmp_path)
    config = FlanMoeT5Config.from_pretrained(tmp_path)
    assert config.to_diff_dict() == named_config(name).to_diff_dict()
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).train()
    assert isinstance(model, FlanMoeT5ForConditionalGeneration)
    tokens = torch.randint(2, 32128, (2, 12), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    unreached = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert unreached == []


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"`st_moe_32b`, but not `st_moe_32`\. Did you mean `st_"):
        named_config("st_moe_32")
    with pytest.raises(ConfigError, match=r"named one of `t5_tiny`, .*, but not `gpt2`\.$"):
        named_config("gpt2")
