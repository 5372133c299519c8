"""flanmoe: dense or sparse language models into instruction-tuned Mixture-of-Experts, with cost and worth.

The names below are the public ones. Each is imported when it is first asked for, so `import flanmoe` is
quick and loads neither torch nor transformers.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from flanmoe.core.names import nearest_name_hint

if TYPE_CHECKING:
    from flanmoe.core.config import Config as Config
    from flanmoe.core.errors import FlanmoeError as FlanmoeError
    from flanmoe.core.ledger import Ledger as Ledger
    from flanmoe.core.rundir import RunDir as RunDir
    from flanmoe.core.seeds import SeedTree as SeedTree
    from flanmoe.data.example import Example as Example
    from flanmoe.data.example import Packed as Packed
    from flanmoe.data.example import PackedPair as PackedPair
    from flanmoe.data.example import Rendered as Rendered
    from flanmoe.data.mixture import Mixture as Mixture
    from flanmoe.data.mixture import MixtureConfig as MixtureConfig
    from flanmoe.data.packing import PackingConfig as PackingConfig
    from flanmoe.data.stream import PackedStream as PackedStream
    from flanmoe.data.tasks import Task as Task
    from flanmoe.data.tasks import TaskConfig as TaskConfig
    from flanmoe.evaluation.comparison import compare as compare
    from flanmoe.evaluation.suites.config import SuiteConfig as SuiteConfig
    from flanmoe.evaluation.suites.run import evaluate_suite as evaluate_suite
    from flanmoe.models.blocks import moe_blocks as moe_blocks
    from flanmoe.models.expert_dropout import set_expert_dropout as set_expert_dropout
    from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config as FlanMoeT5Config
    from flanmoe.models.flan_moe_t5.model import (
        FlanMoeT5ForConditionalGeneration as FlanMoeT5ForConditionalGeneration,
    )
    from flanmoe.models.flan_moe_t5.upcycle import T5UpcycleConfig as T5UpcycleConfig
    from flanmoe.models.flan_moe_t5.upcycle import upcycle_t5 as upcycle_t5
    from flanmoe.models.flops import count_flops as count_flops
    from flanmoe.models.freezing import freeze as freeze
    from flanmoe.models.freezing import what_trains as what_trains
    from flanmoe.models.loading import load_model as load_model
    from flanmoe.models.loading import load_tokenizer as load_tokenizer
    from flanmoe.models.memory import estimate_memory as estimate_memory
    from flanmoe.models.plan import count_parameters as count_parameters
    from flanmoe.models.upcycle import UpcycleConfig as UpcycleConfig
    from flanmoe.models.upcycle import upcycle as upcycle
    from flanmoe.moe.block import MoEBlock as MoEBlock
    from flanmoe.moe.losses import balance_loss as balance_loss
    from flanmoe.moe.losses import z_loss as z_loss
    from flanmoe.moe.recorder import RoutingRecorder as RoutingRecorder
    from flanmoe.moe.routing import Routing as Routing
    from flanmoe.stages.recipe import EvaluateStage as EvaluateStage
    from flanmoe.stages.recipe import PretrainStage as PretrainStage
    from flanmoe.stages.recipe import Recipe as Recipe
    from flanmoe.stages.recipe import TuneStage as TuneStage
    from flanmoe.stages.recipe import UpcycleStage as UpcycleStage
    from flanmoe.stages.recipe import UpcycleT5Stage as UpcycleT5Stage
    from flanmoe.statistics.expert_statistics import ExpertStatistics as ExpertStatistics
    from flanmoe.study.study import Study as Study
    from flanmoe.study.study_file import load_study as load_study
    from flanmoe.training.arguments import TuneConfig as TuneConfig
    from flanmoe.training.router_losses import RouterLossConfig as RouterLossConfig
    from flanmoe.training.trainer import SparseTrainer as SparseTrainer
    from flanmoe.training.tune import tune as tune

    __version__: str

# Where each public name lives; docs/index.md has the same table, and a test compares the two.
_HOMES = {
    "Config": "flanmoe.core.config",
    "EvaluateStage": "flanmoe.stages.recipe",
    "Example": "flanmoe.data.example",
    "ExpertStatistics": "flanmoe.statistics.expert_statistics",
    "FlanMoeT5Config": "flanmoe.models.flan_moe_t5.configuration",
    "FlanMoeT5ForConditionalGeneration": "flanmoe.models.flan_moe_t5.model",
    "FlanmoeError": "flanmoe.core.errors",
    "Ledger": "flanmoe.core.ledger",
    "Mixture": "flanmoe.data.mixture",
    "MixtureConfig": "flanmoe.data.mixture",
    "MoEBlock": "flanmoe.moe.block",
    "Packed": "flanmoe.data.example",
    "PackedPair": "flanmoe.data.example",
    "PackedStream": "flanmoe.data.stream",
    "PackingConfig": "flanmoe.data.packing",
    "PretrainStage": "flanmoe.stages.recipe",
    "Recipe": "flanmoe.stages.recipe",
    "Rendered": "flanmoe.data.example",
    "RouterLossConfig": "flanmoe.training.router_losses",
    "Routing": "flanmoe.moe.routing",
    "RoutingRecorder": "flanmoe.moe.recorder",
    "RunDir": "flanmoe.core.rundir",
    "SeedTree": "flanmoe.core.seeds",
    "SparseTrainer": "flanmoe.training.trainer",
    "Study": "flanmoe.study.study",
    "SuiteConfig": "flanmoe.evaluation.suites.config",
    "T5UpcycleConfig": "flanmoe.models.flan_moe_t5.upcycle",
    "Task": "flanmoe.data.tasks",
    "TaskConfig": "flanmoe.data.tasks",
    "TuneConfig": "flanmoe.training.arguments",
    "TuneStage": "flanmoe.stages.recipe",
    "UpcycleConfig": "flanmoe.models.upcycle",
    "UpcycleStage": "flanmoe.stages.recipe",
    "UpcycleT5Stage": "flanmoe.stages.recipe",
    "balance_loss": "flanmoe.moe.losses",
    "compare": "flanmoe.evaluation.comparison",
    "count_flops": "flanmoe.models.flops",
    "count_parameters": "flanmoe.models.plan",
    "estimate_memory": "flanmoe.models.memory",
    "evaluate_suite": "flanmoe.evaluation.suites.run",
    "freeze": "flanmoe.models.freezing",
    "load_model": "flanmoe.models.loading",
    "load_study": "flanmoe.study.study_file",
    "load_tokenizer": "flanmoe.models.loading",
    "moe_blocks": "flanmoe.models.blocks",
    "set_expert_dropout": "flanmoe.models.expert_dropout",
    "tune": "flanmoe.training.tune",
    "upcycle": "flanmoe.models.upcycle",
    "upcycle_t5": "flanmoe.models.flan_moe_t5.upcycle",
    "what_trains": "flanmoe.models.freezing",
    "z_loss": "flanmoe.moe.losses",
}

__all__ = [
    "Config",
    "EvaluateStage",
    "Example",
    "ExpertStatistics",
    "FlanMoeT5Config",
    "FlanMoeT5ForConditionalGeneration",
    "FlanmoeError",
    "Ledger",
    "Mixture",
    "MixtureConfig",
    "MoEBlock",
    "Packed",
    "PackedPair",
    "PackedStream",
    "PackingConfig",
    "PretrainStage",
    "Recipe",
    "Rendered",
    "RouterLossConfig",
    "Routing",
    "RoutingRecorder",
    "RunDir",
    "SeedTree",
    "SparseTrainer",
    "Study",
    "SuiteConfig",
    "T5UpcycleConfig",
    "Task",
    "TaskConfig",
    "TuneConfig",
    "TuneStage",
    "UpcycleConfig",
    "UpcycleStage",
    "UpcycleT5Stage",
    "__version__",
    "balance_loss",
    "compare",
    "count_flops",
    "count_parameters",
    "estimate_memory",
    "evaluate_suite",
    "freeze",
    "load_model",
    "load_study",
    "load_tokenizer",
    "moe_blocks",
    "set_expert_dropout",
    "tune",
    "upcycle",
    "upcycle_t5",
    "what_trains",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("flanmoe")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    # Tools ask for dunder names and expect a plain refusal.
    hint = "" if name.startswith("__") else nearest_name_hint(name, __all__)
    raise AttributeError(f"flanmoe has no `{name}`.{hint}")


def __dir__() -> list[str]:
    return __all__
