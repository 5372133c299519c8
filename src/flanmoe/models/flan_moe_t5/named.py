"""FlanMoeT5 under the names of its published shapes, and the dense T5 of each shape beside it.

Shapes and routing are those of T5X's public pre-training configurations (google/flaxformer,
`configs/moe`), from which FLAN-MoE (arXiv 2305.14705) most likely started: `tokens_choose_*` is its
FLAN-GS, `experts_choose_*` its FLAN-EC. Three things are ours:

- Groups are runs of the batch of at most `group_size` tokens; Flaxformer's may be larger.
- Capacity in evaluation mode is the published one, which drops tokens. Set `capacity.evaluation` of
  a router to null for answers that do not depend on what else is in the batch.
- `st_moe_*` has the router of its paper (arXiv 2202.08906: renormalised gates, second choices at
  random in training); T5X gives it raw probabilities and all second choices, as `tokens_choose_*`
  has them here.

Expert choice has no group size: experts choose among the tokens of one example.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config

_FLAXFORMER = "Shape of google/flaxformer `configs/moe/models/{name}.gin`"


@dataclass(frozen=True, slots=True)
class NamedShape:
    """A configuration with what was published about it.

    Attributes:
        settings: values of `FlanMoeT5Config`; all others are its defaults.
        balance_coefficient, z_coefficient: of the router losses in pre-training; 0 without any.
        total_billions: billions of parameters that the shape comes to; None for shapes that nobody
            gives a size of.
        gflops_per_token: billions of forward operations of a token, as published; None where that
            is not known for sure.
        dense_twin: name of the same shape without routers and extra FFNs; None for those themselves.
        provenance: where the numbers come from.
    """

    settings: Mapping[str, Any]
    balance_coefficient: float
    z_coefficient: float
    total_billions: float | None
    gflops_per_token: float | None
    dense_twin: str | None
    provenance: str

    @property
    def config(self) -> FlanMoeT5Config:
        """The configuration, a new one each time."""
        return FlanMoeT5Config(**copy.deepcopy(dict(self.settings)))


@dataclass(frozen=True, slots=True)
class _Capacity:
    """Factors and groups of one family of shapes."""

    train: float
    evaluation: float
    group_size: int
    minimum: int = 4

    def to_mapping(self) -> dict[str, Any]:
        """Return values of `CapacityConfig`."""
        return {
            "train": self.train,
            "evaluation": self.evaluation,
            "rounding": "nearest",
            "minimum": self.minimum,
            "group": "batch",
            "group_size": self.group_size,
        }


def _trunk(
    *, d_model: int, d_ff: int, num_heads: int, num_layers: int, d_kv: int = 64
) -> dict[str, Any]:
    return {
        "vocab_size": 32128,
        "d_model": d_model,
        "d_kv": d_kv,
        "d_ff": d_ff,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "feed_forward_proj": "gated-gelu",
    }


# T5 before T5.1.1.
_RELU = {"feed_forward_proj": "relu", "tied_head": True, "scale_decoder_outputs": True}

_TRUNKS: Mapping[str, Mapping[str, Any]] = {
    "tiny": _trunk(d_model=32, d_ff=64, num_heads=6, num_layers=2),
    "base": _trunk(d_model=768, d_ff=2048, num_heads=12, num_layers=12),
    "large": _trunk(d_model=1024, d_ff=2816, num_heads=16, num_layers=24),
    "xl": _trunk(d_model=2048, d_ff=5120, num_heads=32, num_layers=24),
    "xxl": _trunk(d_model=4096, d_ff=10240, num_heads=64, num_layers=24),
    "32b": _trunk(d_model=5120, d_ff=20480, num_heads=64, num_layers=24, d_kv=128),
    "relu_base": _trunk(d_model=768, d_ff=3072, num_heads=12, num_layers=12) | _RELU,
    "relu_large": _trunk(d_model=1024, d_ff=4096, num_heads=16, num_layers=24) | _RELU,
}


def _dense(trunk: str) -> NamedShape:
    version = "T5" if trunk.startswith("relu_") else "T5.1.1"
    return NamedShape(
        settings=_TRUNKS[trunk],
        balance_coefficient=0.0,
        z_coefficient=0.0,
        total_billions=None,
        gflops_per_token=None,
        dense_twin=None,
        provenance=f"A {version} of the shape of the sparse models that name it as their twin.",
    )


def _sparse(
    name: str,
    trunk: str,
    routers: tuple[Mapping[str, Any], Mapping[str, Any]],
    *,
    every: int,
    total_billions: float | None,
    source: str = "",
    z_coefficient: float = 0.0,
    gflops_per_token: float | None = None,
    extra_dense_ffn: bool = False,
) -> NamedShape:
    """Return a sparse shape; `routers` are those of the encoder and of the decoder."""
    settings = {
        **_TRUNKS[trunk],
        "encoder_router": routers[0],
        "decoder_router": routers[1],
        "encoder_sparse_every": every,
        "decoder_sparse_every": every,
        "sparse_placement": "last",
        "extra_dense_ffn": extra_dense_ffn,
    }
    derived = "" if total_billions is None else "; size derived from the shape"
    return NamedShape(
        settings=settings,
        balance_coefficient=0.01,
        z_coefficient=z_coefficient,
        total_billions=total_billions,
        gflops_per_token=gflops_per_token,
        dense_twin=f"t5_{trunk}",
        provenance=f"{_FLAXFORMER.format(name=name)}{derived}{source}.",
    )


def _switch(
    name: str, trunk: str, capacity: _Capacity, total_billions: float, published: str
) -> NamedShape:
    router = {"kind": "switch.v1", "num_experts": 128, "capacity": capacity.to_mapping()}
    return _sparse(
        name,
        trunk,
        (router, router),
        every=2,
        total_billions=total_billions,
        source=f", {published} in arXiv 2101.03961",
    )


def _top_two(
    num_experts: int, capacity: _Capacity, *, order: Literal["natural", "batch_priority"]
) -> dict[str, Any]:
    return {
        "kind": "gshard.v1",
        "num_experts": num_experts,
        "capacity": capacity.to_mapping(),
        "order": order,
        "normalize": False,
        "second_choice": "all",
    }


def _tokens_choose(trunk: str, total_billions: float | None) -> NamedShape:
    num_experts, capacity = (8 if trunk == "tiny" else 64), _Capacity(1.25, 2.0, 4096)
    return _sparse(
        f"tokens_choose_{trunk}",
        trunk,
        (
            _top_two(num_experts, capacity, order="batch_priority"),
            # Batch priority would let later tokens push out earlier ones.
            _top_two(num_experts, capacity, order="natural"),
        ),
        every=2 if trunk == "tiny" else 4,
        total_billions=total_billions,
    )


def _experts_choose(trunk: str, total_billions: float | None) -> NamedShape:
    num_experts = 8 if trunk == "tiny" else 64
    return _sparse(
        f"experts_choose_{trunk}",
        trunk,
        (
            {"kind": "expert_choice.v1", "num_experts": num_experts, "capacity_factor": 1.0},
            # It would look ahead in a decoder.
            _top_two(num_experts, _Capacity(1.0, 1.0, 4096), order="natural"),
        ),
        every=2,
        total_billions=total_billions,
    )


def _st_moe(
    name: str, trunk: str, num_experts: int, capacity: _Capacity, total: float, **rest: Any
) -> NamedShape:
    router = {
        "kind": "st_moe.v1",
        "num_experts": num_experts,
        "capacity": capacity.to_mapping(),
    }
    return _sparse(
        name,
        trunk,
        (router, router),
        every=4,
        total_billions=total,
        extra_dense_ffn=True,
        **rest,
    )


NAMED: Mapping[str, NamedShape] = {
    **{f"t5_{trunk}": _dense(trunk) for trunk in _TRUNKS},
    "switch_base": _switch("switch_base", "relu_base", _Capacity(1.25, 2.0, 8192), 7.42, "7.4"),
    "switch_large": _switch("switch_large", "relu_large", _Capacity(1.25, 2.0, 4096), 26.3, "26.3"),
    "switch_xxl": _switch("switch_xxl", "xxl", _Capacity(1.25, 4.0, 4096, minimum=2), 394.7, "395"),
    "tokens_choose_tiny": _tokens_choose("tiny", None),
    "tokens_choose_base": _tokens_choose("base", 2.03),
    "tokens_choose_large": _tokens_choose("large", 7.32),
    "tokens_choose_xl": _tokens_choose("xl", 26.6),
    "tokens_choose_xxl": _tokens_choose("xxl", 106.3),
    "experts_choose_tiny": _experts_choose("tiny", None),
    "experts_choose_base": _experts_choose("base", 3.82),
    "experts_choose_large": _experts_choose("large", 13.9),
    "experts_choose_xl": _experts_choose("xl", 50.4),
    "experts_choose_xxl": _experts_choose("xxl", 201.4),
    "st_moe_base": _st_moe(
        "st_moe_base", "base", 16, _Capacity(1.25, 2.0, 4096), 0.70, z_coefficient=1e-4
    ),
    "st_moe_xl": _st_moe(
        "st_moe_xl", "xl", 16, _Capacity(2.0, 4.0, 1024), 8.89, z_coefficient=1e-4
    ),
    "st_moe_32b": _st_moe(
        "st_moe_32b",
        "32b",
        64,
        _Capacity(1.25, 2.0, 4096),
        269.1,
        z_coefficient=1e-3,
        gflops_per_token=32.1,
        source=", 269 in arXiv 2202.08906; operations of arXiv 2305.14705",
    ),
}


def named_config(name: str) -> FlanMoeT5Config:
    """Return the configuration of a name in `NAMED`.

    Raises:
        ConfigError: if there is none; names those that there are, and the nearest.
    """
    if name not in NAMED:
        raise ConfigError(
            f"A FlanMoeT5 is named one of {listing(NAMED, limit=len(NAMED))}, but not `{name}`."
            f"{nearest_name_hint(name, NAMED)}"
        )
    return NAMED[name].config
